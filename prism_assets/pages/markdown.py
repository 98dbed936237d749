"""Pieces of Markdown that the pages share."""

import re
from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a bar within a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines)


def codes(names: Iterable[str]) -> str:
    """Names as code, with commas; a dash where there are none."""
    return ", ".join(f"`{one}`" for one in names) or "–"


def prose(docstring: str | None) -> str:
    """A docstring as paragraphs without line breaks of its own; `<name>` does not become HTML."""
    paragraphs = re.split(r"\n\s*\n", (docstring or "").strip())
    flat = "\n\n".join(" ".join(one.split()) for one in paragraphs)
    parts = re.split(r"(`[^`]*`)", flat)  # code stays as it is
    return "".join(one if one.startswith("`") else one.replace("<", "&lt;") for one in parts)


def page(*parts: str) -> str:
    """Parts with an empty line between them."""
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"
