"""Numbers and names as the report writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from prism_assets.text import listed, visible

MISSING = "–"


def visible_value(value: Any) -> Any:
    """What a page shows of a value, as `text.visible`; for Jinja's `finalize`. Finished HTML stays as it is."""
    return visible(value) if type(value) is str else value


# ---- text of numbers


def as_number(value: Any) -> float | None:
    """A finite number as float; None for None, text, booleans, mappings, NaN and infinity."""
    if value is None or isinstance(value, (str, bool, Mapping)):
        return None
    return float(value) if math.isfinite(value) else None


def mean_of(entry: Mapping[str, Any], metric: str) -> float | None:
    """The mean of a metric in an entry of report.json, None where there is none."""
    return as_number((entry.get(metric) or {}).get("mean"))


def mean_and_std(entry: Mapping[str, Any], metric: str) -> str:
    """`0.512 ± 0.031` of a metric in an entry; without the deviation where it is unknown."""
    mean, std = mean_of(entry, metric), as_number((entry.get(metric) or {}).get("std"))
    if mean is None:
        return MISSING
    return figure_text(mean) if std is None else f"{figure_text(mean)} ± {figure_text(std)}"


def figure_text(value: Any, decimals: int = 3) -> str:
    """`0.512`, with a minus sign (−) where negative; a dash where there is no number."""
    number = as_number(value)
    return MISSING if number is None else f"{number:.{decimals}f}".replace("-", "−")


def gap_text(difference: float) -> str:
    """`0.031` of a difference that is not negative; `2.1e-05` where it would round to zero."""
    return f"{difference:.3f}" if difference >= 0.0005 else f"{difference:.1e}"


def signed(value: Any) -> str:
    """`+0.0310`, or `+2.10e-05` below 0.01; a dash where there is no number."""
    number = as_number(value)
    if number is None:
        return MISSING
    text = f"{number:+.4f}" if abs(number) >= 0.01 or number == 0 else f"{number:+.2e}"
    return text.replace("-", "−")


def mixture_text(target: Mapping[str, Any]) -> str:
    """What rows are removed from."""
    return f"of the source {target['mixture']}" if target.get("mixture") else "the whole pool"


def general(value: Any) -> str:
    """Up to six significant digits; a dash where there is no number."""
    number = as_number(value)
    return MISSING if number is None else f"{number:.6g}".replace("-", "−")


def count_text(value: Any) -> str:
    """`12,345`; a dash where there is no number."""
    number = as_number(value)
    return MISSING if number is None else f"{number:,.0f}"


def with_highest_mean(means: Mapping[str, float]) -> tuple[str, str]:
    """The name of highest mean (the first of several), and who has it: equal figures are called equal."""
    highest = max(means.values())
    best = [name for name, mean in means.items() if mean == highest]
    return best[0], f"{listed(best)} have the same highest mean" if best[1:] else f"{best[0]} has the highest mean"


def clipped(text: Any, longest: int) -> str:
    """The first `longest` characters of a text, and how many more there are."""
    whole = "" if text is None else str(text)
    if len(whole) <= longest:
        return whole
    return f"{whole[:longest]}… ({len(whole) - longest:,} more characters)"


def pretty(value: Any) -> str:
    """A tree of settings as indented JSON; empty where there is nothing."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) if value else ""
