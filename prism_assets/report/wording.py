"""Numbers and names as the report writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

MISSING = "–"


# ---- text of numbers


def as_number(value: Any) -> float | None:
    if value is None or isinstance(value, (str, bool, Mapping)):
        return None
    return float(value) if math.isfinite(value) else None


def mean_of(entry: Mapping[str, Any], metric: str) -> float | None:
    return as_number((entry.get(metric) or {}).get("mean"))


def mean_and_std(entry: Mapping[str, Any], metric: str) -> str:
    mean, std = mean_of(entry, metric), as_number((entry.get(metric) or {}).get("std"))
    if mean is None:
        return MISSING
    return figure_text(mean) if std is None else f"{figure_text(mean)} ± {figure_text(std)}"


def figure_text(value: Any, decimals: int = 3) -> str:
    number = as_number(value)
    return MISSING if number is None else f"{number:.{decimals}f}".replace("-", "−")


def gap_text(difference: float) -> str:
    return f"{difference:.3f}" if difference >= 0.0005 else f"{difference:.1e}"


def signed(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return MISSING
    text = f"{number:+.4f}" if abs(number) >= 0.01 or number == 0 else f"{number:+.2e}"
    return text.replace("-", "−")


def general(value: Any) -> str:
    number = as_number(value)
    return MISSING if number is None else f"{number:.6g}".replace("-", "−")


def count_text(value: Any) -> str:
    number = as_number(value)
    return MISSING if number is None else f"{number:,.0f}"


def listed(names: Iterable[str]) -> str:
    *head, last = names
    return f"{', '.join(head)} and {last}" if head else last


def clipped(text: Any, longest: int) -> str:
    whole = "" if text is None else str(text)
    if len(whole) <= longest:
        return whole
    return f"{whole[:longest]}… ({len(whole) - longest:,} more characters)"


def pretty(value: Any) -> str:
    """A tree of settings as indented JSON; empty where there is nothing."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) if value else ""
