"""Why a candidate ranks where it does: its score as a sum over targets, and its place in a ranking.

With the target vector t_k = Σ_j w_kj g_kj of checkpoint k (raw gradients g_kj), its sketch S t_k, the stored unit row
Γ̂_k of the candidate and learning rates η̄_k that sum to 1, the score is linear in the targets:

    score = Σ_k η̄_k <S t_k, Γ̂_k> / ‖t_k‖ = Σ_j contribution_j,
    contribution_j = Σ_k η̄_k w_kj a_kj,   a_kj = <S g_kj, Γ̂_k> / ‖t_k‖.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from prism_assets.selection.direction import relative_rates


class Contributions(NamedTuple):
    """The score of one candidate by targets; `weights * influences == values`."""

    weights: np.ndarray  # float64 [m], Σ_k η̄_k w_kj
    influences: np.ndarray  # float64 [m], what one unit of the target's weight adds to the score
    values: np.ndarray  # float64 [m], they sum to the sketched score


def target_contributions(
    sketches: np.ndarray,
    weights: np.ndarray,
    row: np.ndarray,
    norms: Sequence[float],
    learning_rates: Sequence[float],
) -> Contributions:
    """What each of m targets adds to a candidate's score.

    `sketches` [m, C, K] holds S g_kj (raw), `weights` [C, m] the w_kj, `row` [C, K] the candidate's unit rows,
    `norms` [C] the exact ‖t_k‖, `learning_rates` [C] the η̄_k in any scale. A target whose weight vanishes at every
    checkpoint adds nothing; its influence is then Σ_k η̄_k a_kj.
    """
    rates = np.array(relative_rates(learning_rates))
    cosines = np.einsum("mck,ck->cm", sketches.astype(np.float64), row.astype(np.float64))
    cosines /= np.asarray(norms, np.float64)[:, None]  # a_kj [C, m]
    values = rates @ (weights * cosines)
    mean_weights = rates @ np.asarray(weights, np.float64)
    used = mean_weights > 0
    influences = np.where(used, values / np.where(used, mean_weights, 1), rates @ cosines)
    return Contributions(mean_weights, influences, values)


def rank_of(score: float, name: str, scores: np.ndarray, names: np.ndarray) -> int:
    """The rank, from 1, of (score, name) among the scores [n] of the names [n]: descending, ties by ascending name.

    The candidate itself may be among them or not.
    """
    return 1 + int((scores > score).sum()) + sum(other < name for other in names[scores == score])


class StrategyRank(NamedTuple):
    """A candidate's place in one strategy's ranking of the canonical live rows."""

    strategy: str
    rank: int | None  # None where the strategy orders only what it selects, and this row is not among it
    of: int  # rows that are ranked
    score: float | None  # None for a strategy without scores
    selected: bool | None  # whether it is in that strategy's current selection; None where there is none
    # What rank and score are by: "exact" scores, in a selection that was re-ranked and holds the row, else the
    # "sketch", which makes the shortlist there, if anything; None for a strategy without a direction.
    by: str | None = None


class Earlier(NamedTuple):
    """The place under the same strategy in an earlier feature version."""

    version: str
    used: str  # when the version was last worked on, UTC
    rank: int | None
    of: int
    score: float | None
    note: str  # why there is no rank


class Neighbour(NamedTuple):
    """Another candidate with a similar gradient."""

    similarity: float  # mean over checkpoints of the sketched rows' inner product, about the cosine
    id: str
    shard: str
    row: int
    source: str | None
    prompt: str
    completion: str


class TargetPart(NamedTuple):
    """One target's part of the score."""

    id: str
    prompt: str
    completion: str
    weight: float
    influence: float
    contribution: float


@dataclass(frozen=True)
class Explanation:
    """All that `prism explain` shows of a candidate."""

    target: str
    strategy: str
    version: str
    id: str
    record_id: str | None
    shard: str
    row: int
    line: int
    source: str | None
    prompt: str
    completion: str
    mean_log_prob: float  # at the last checkpoint
    gradient_norm: float
    score: float  # what the index ranks by, from the stored sketch
    reranked: bool  # whether the current selection took the sketch's first rows only as a shortlist
    exact_score: float | None  # the same without a sketch: what the score approximates
    why_not_exact: str
    parts: list[TargetPart]  # by descending contribution
    curvature: float | None  # score minus the parts, where the direction was corrected for curvature
    sketch_error: float | None  # exact score minus the parts (and the curvature)
    rounding: float  # without a correction: score minus the parts, about 1e-7
    ranks: list[StrategyRank]
    neighbours: list[Neighbour]
    earlier: list[Earlier]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        content = asdict(self)
        for name in ("parts", "ranks", "neighbours", "earlier"):
            content[name] = [one._asdict() for one in getattr(self, name)]
        return content

    def score_rows(self, limit: int | None = None) -> list[tuple[str, float | None, float | None, float]]:
        """Rows (what, weight, influence, contribution) that sum to the last one.

        The last is the exact score where it was computed (the sketch's error is a row of its own then), else the
        score. With a limit the targets of smallest absolute contribution are added up in one row.
        """
        largest = sorted(range(len(self.parts)), key=lambda j: -abs(self.parts[j].contribution))
        shown = set(largest if limit is None else largest[:limit])
        rows: list[tuple[str, float | None, float | None, float]] = [
            (f"{one.prompt} → {one.completion}", one.weight, one.influence, one.contribution)
            for j, one in enumerate(self.parts)
            if j in shown
        ]
        rest = [one for j, one in enumerate(self.parts) if j not in shown]
        if rest:
            added = sum(one.weight for one in rest), sum(one.contribution for one in rest)
            rows.append((f"{len(rest)} more targets", added[0], None, added[1]))
        if self.curvature is not None:
            rows.append(("curvature correction", None, None, self.curvature))
        if self.exact_score is not None and self.sketch_error is not None:
            rows.append(("sketch error", None, None, self.sketch_error))
            rows.append(("exact score", None, None, self.exact_score))
        else:
            rows.append(("rounding", None, None, self.rounding))
            rows.append(("score", None, None, self.score))
        return rows
