"""Refusals: rows that a format has no words for are never left out or changed in silence."""

from collections.abc import Callable, Mapping

from prism_assets.errors import CannotExport
from prism_assets.export.formats.handover import Handover, Row, named

# What a row may hold that not every format can say.
IS_TEXT = "a text without a conversation"
HAS_TOOLS = "definitions of tools"
HAS_CALLS = "calls of tools"
HAS_IDS = "ids or names at answers of tools"
HAS_REASONING = "reasoning beside the answer"
HAS_MASK = "assistant turns without loss"
_HOLDS: Mapping[str, Callable[[Row], bool]] = {
    IS_TEXT: lambda row: row.is_text,
    HAS_TOOLS: lambda row: row.tools is not None,
    HAS_CALLS: lambda row: any('"tool_calls"' in turn.extra for turn in row.turns),
    HAS_IDS: lambda row: any(turn.role == "tool" and turn.extra for turn in row.turns),
    HAS_REASONING: lambda row: any('"reasoning_content"' in turn.extra for turn in row.turns),
    HAS_MASK: lambda row: any(turn.role == "assistant" and not turn.learn for turn in row.turns),
}


def refuse(handover: Handover, name: str, instead: Mapping[str, str]) -> None:
    """Raise CannotExport where rows hold what the format `name` cannot say; `instead` names a format that can."""
    for what, other in instead.items():
        found = [row.name for row in handover.rows if _HOLDS[what](row)]
        if found:
            refuse_rows(handover, name, found, what, other)


def refuse_rows(handover: Handover, name: str, rows: list[str], what: str, other: str) -> None:
    """Raise CannotExport for these rows."""
    raise CannotExport(
        f"{len(rows):,} of {len(handover.rows):,} rows hold {what}, which {name} has no place for ({named(rows)}): "
        f"use --format {other}."
    )
