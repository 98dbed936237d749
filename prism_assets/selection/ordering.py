"""The order of rows by score, and how many of them fit a budget."""

from collections.abc import Sequence

import numpy as np

from prism_assets.errors import UnsuitableSetting


def cut(completion_tokens: np.ndarray, *, kind: str, amount: float, pool_rows: int) -> int:
    """How many rows of a ranking fit the budget.

    `completion_tokens` [n] is in ranking order. rows: min(amount, n). share: the nearest whole number of rows to
    amount × pool_rows, at least 1. tokens: the longest prefix whose sum is at most the amount.
    Raises UnsuitableSetting where not even the first row fits a token budget.
    """
    if kind == "tokens":
        fits = int(np.searchsorted(np.cumsum(completion_tokens), amount, side="right"))
        if fits == 0 and len(completion_tokens):
            raise UnsuitableSetting(
                f"the budget of {amount:.0f} tokens does not hold even the first row "
                f"({int(completion_tokens[0])} completion tokens): raise selection.budget"
            )
        return fits
    rows = amount if kind == "rows" else max(1, round(amount * pool_rows))
    return int(min(rows, len(completion_tokens)))


def order_by_score(scores: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """Row positions [n] by descending score [n]; ties by ascending id."""
    return np.lexsort((np.asarray(ids), -np.asarray(scores)))
