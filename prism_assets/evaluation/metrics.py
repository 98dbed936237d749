"""Held-out metrics: mean log-probability and target preference, and their summary over seeds.

Pure functions on arrays; higher is better for every metric.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prism_assets.stats.vectors import finite_vector


def held_out(
    mean_log_probs: Sequence[float] | np.ndarray, margins: Sequence[float] | np.ndarray | None = None
) -> dict[str, float | None]:
    """Mean log-probability and mean target preference (τ = 1) of n held-out examples.

    `mean_log_probs` [n]: s_j, the mean log-probability (nats per token) of each completion; for pairs, of
    the wanted one. `margins` [n], for pairs only: s_wanted − s_unwanted.

    Returns `mean_log_prob` = mean_j s_j, and `target_preference` = mean_j exp(s_j) for plain examples or
    mean_j sigmoid(margin_j), the mean preference for the wanted completion, for pairs; of pairs also `margin` =
    mean_j margin_j and `pair_accuracy`, the share of positive margins (a tie counts one half), both None of plain
    examples. One minus pair_accuracy is how often the unwanted completion is preferred: of an honest and a dishonest
    answer the dishonesty rate.

    Raises ValueError where there is no example, a value is not finite or the lengths differ.
    """
    scores = finite_vector("mean_log_probs", mean_log_probs)
    margin = accuracy = None
    if margins is None:
        preferences = np.exp(scores)
    else:
        differences = finite_vector("margins", margins)
        if differences.shape != scores.shape:
            raise ValueError(f"{len(scores)} mean_log_probs but {len(differences)} margins: one of each per pair")
        preferences = np.exp(-np.logaddexp(0.0, -differences))  # sigmoid, without overflow
        margin, accuracy = float(differences.mean()), float((0.5 + 0.5 * np.sign(differences)).mean())
    return {
        "mean_log_prob": float(scores.mean()),
        "target_preference": float(preferences.mean()),
        "margin": margin,
        "pair_accuracy": accuracy,
    }


def choice_correct(log_likelihoods: Sequence[float] | np.ndarray, right: int) -> bool:
    """Whether the option at `right` has the largest summed log-probability [options]; the first of equal ones counts,
    as in `acc` of lm-eval's multiple-choice tasks. Options end with the turn's end token here."""
    return int(np.argmax(finite_vector("log_likelihoods", log_likelihoods))) == right


def mean_over_seeds(values_per_seed: Sequence[float | None]) -> dict[str, float | int | None] | None:
    """`{"mean", "std", "seeds"}` of one metric over seeds; std is the sample's (ddof = 1), null for one seed.

    None where every value is None: the metric does not exist for these data. Raises ValueError where there is
    no seed, only some seeds have a value, or a value is not finite.
    """
    missing = [value is None for value in values_per_seed]
    if missing and all(missing):
        return None
    if any(missing):
        raise ValueError(f"the metric is missing for seed(s) number {np.flatnonzero(missing).tolist()} only")
    values = finite_vector("values_per_seed", values_per_seed)
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "std": std, "seeds": len(values)}
