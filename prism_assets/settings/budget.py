"""Budgets: rows, a share of the pool, or completion tokens."""

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Budget(BaseModel):
    """How much is selected: rows, a share of the canonical live rows, or completion tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["rows", "share", "tokens"]
    amount: float = Field(gt=0)

    @model_validator(mode="after")
    def _at_most_everything(self) -> "Budget":
        if self.kind == "share" and self.amount > 1:
            raise ValueError("a share is at most 1")
        return self

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{self.amount * 100:g}%"
        return f"{self.amount:.0f}{' tokens' if self.kind == 'tokens' else ''}"


def parse_budget(value: Any) -> Any:
    """`500` (rows), `"5%"` (share of the live pool) or `"200k tokens"`; raises ValueError with these forms."""
    if isinstance(value, Budget | dict):
        return value
    text = str(value).strip().lower().replace("_", "").replace(",", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[km]?)\s*(tokens?|rows?)?", text)
    if not match:
        raise ValueError(f"{value!r} is no budget: write 500 (rows), 5% (share of the pool) or 200k tokens")
    number, unit, noun = float(match[1]), match[2], match[3] or ""
    if unit == "%":
        if noun or not 0 < number <= 100:
            raise ValueError(f"{value!r} is no share of the pool: write a percentage above 0% and up to 100%")
        return Budget(kind="share", amount=number / 100)
    number *= {"": 1, "k": 1e3, "m": 1e6}[unit]
    if number < 1 or number != int(number):
        raise ValueError(f"{value!r} is no whole number of at least 1")
    return Budget(kind="tokens" if noun.startswith("token") else "rows", amount=number)
