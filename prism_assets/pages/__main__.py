"""Writes every page that is made from the code into `docs/`, below the working folder or the one that is named."""

import argparse
from pathlib import Path

from prism_assets.pages import all_pages

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m prism_assets.pages", description=__doc__)
    parser.add_argument("docs", nargs="?", type=Path, default=Path("docs"))
    docs = parser.parse_args().docs
    for place, text in all_pages().items():
        (docs / place).parent.mkdir(parents=True, exist_ok=True)
        (docs / place).write_text(text, encoding="utf-8")
