"""Writes every page that is made from the code into `docs/`, below the working folder or the one that is named."""

import sys
from pathlib import Path

from prism_assets.pages import all_pages

if __name__ == "__main__":
    docs = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    for place, text in all_pages().items():
        (docs / place).parent.mkdir(parents=True, exist_ok=True)
        (docs / place).write_text(text, encoding="utf-8")
