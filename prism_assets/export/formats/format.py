"""What a format is: files, how they are written, and how the tool that reads them is called."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prism_assets.export.formats.handover import Handover

TEMPLATE = "chat_template.jinja"
JSON_LINES = "train.jsonl"
PARQUET = "train.parquet"
OUTPUT = "output"  # where a trainer writes, beside the files


class Format(NamedTuple):
    """One format of `prism export --format`."""

    files: tuple[str, ...]  # what it writes, beside README.md and adapter/
    write: Callable[[Path, Handover], None]  # raises CannotExport for rows that the format cannot hold
    use: Callable[[Handover], list[str]]  # Markdown: what the files hold and how they are used
    has_tokens: bool = False  # whether the tokens that were scored are handed over, not text
    trains: bool = True  # whether a configuration is among the files, which leaves an adapter in `OUTPUT`


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, in UTF-8."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_yaml(path: Path, options: Mapping[str, Any], comment: str) -> None:
    """A configuration under a comment of one line, in the order of its options."""
    import yaml

    text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
    path.write_text(f"# {comment}\n{text}", encoding="utf-8")


def fenced(language: str, *lines: str) -> list[str]:
    """Lines as a block of code."""
    return [f"```{language}", *lines, "```", ""]
