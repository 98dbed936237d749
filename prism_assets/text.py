"""Texts of data as people see them: in a terminal, a log, a page or a card nothing of them acts.

Every text that comes from a file (records, ids, sources, names of files) passes through here on its way out.
"""

import re
from collections.abc import Iterable

# What a terminal obeys (C0 without tab and line feed, DEL, C1), what reorders or hides text (bidirectional controls,
# characters without width or glyph, tags), and what is no character (surrogates). Of the variation selectors those that
# emoji use stay.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    "\ud800-\udfff]"
)
_BACKTICKS = re.compile("`+")


def visible(text: str) -> str:
    """`text` with each character that acts or hides as its escape (`\\x1b`, `\\u202e`); lines and tabs stay."""
    return _HIDDEN.sub(_escape, text.replace("\r\n", "\n"))


def _escape(match: re.Match[str]) -> str:
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def in_json(written: str) -> str:
    """JSON with these characters as JSON's own escapes: what is read is the same value."""
    return _HIDDEN.sub(_json_escape, written)


def _json_escape(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))


def one_line(text: str, width: int) -> str:
    """`text` as `visible`, every run of white space as one space, and its end cut off beyond `width` characters."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def as_code(text: str) -> str:
    """`text` in Markdown as code on one line: no link, picture or HTML in it is live."""
    line = visible(" ".join(text.split())) or " "
    fence = "`" * (1 + max(map(len, _BACKTICKS.findall(line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def as_cell(text: str) -> str:
    """As `as_code`, in a cell of a Markdown table."""
    return as_code(text).replace("|", "\\|")


def listed(names: Iterable[str]) -> str:
    """`a`, `a and b` or `a, b and c`, for at least one name."""
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last
