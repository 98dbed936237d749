"""Mean losses at the start and at the end of a training."""

from collections.abc import Sequence


def quarter_means(losses: Sequence[float]) -> tuple[float, float]:
    """Mean loss of the first and of the last quarter of the steps [steps >= 1], at least one step each."""
    window = max(1, len(losses) // 4)
    return sum(losses[:window]) / window, sum(losses[-window:]) / window
