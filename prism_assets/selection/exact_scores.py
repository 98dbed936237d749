"""Exact scores: of a shortlist (`selection.rerank: 4`), or of all rows (`all`). Nothing of the sketch's noise is left.

    score_i = Σ_k (η̄_k / Σ_l η̄_l) ⟨t_k, Γ_ik⟩ / (‖t_k‖ ‖Γ_ik‖)        nothing sketched

With `selection.row_scale` mean it is not divided by ‖Γ_ik‖, with sum it is multiplied with the supervised tokens too.

Of all rows (`whole_scores`): `features.exact_products` has the cosines of most rows from their gradient pass; where a
direction is newer than the features, one more pass makes those of all directions that the lake shows.

Of a shortlist (`exact_scores`): one gradient pass a checkpoint over it. Last bits depend on which rows share a batch,
so batches must not depend on what else is in the pool: the rows of a shard are cut into tiers by their sketched scores,
a tier is always worked on as a whole, and what it gave is remembered by direction and shard features. So a selection
does not depend on the order of arrival, and an arrival costs the tiers that it newly needs.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prism_assets.errors import LakeError, StageError
from prism_assets.features.blocks import blocks_of
from prism_assets.features.exact_products import ExactProducts, remembered, shown_directions
from prism_assets.features.gradient_pass import GradientPass, gradient_pass
from prism_assets.features.index_parts import IndexedShard
from prism_assets.progress import Progress
from prism_assets.reference.checkpoints import learning_rates
from prism_assets.resources.lake import Artifact, Lake
from prism_assets.selection.direction_artifacts import load_direction
from prism_assets.selection.pool import Pool, usable_rows

if TYPE_CHECKING:
    import numpy as np

    from prism_assets.gradients.batching import Tokenized
    from prism_assets.settings import RowScale

# Rows of a tier: a few batches' worth.
TIER = 64


def exact_scores(pool: Pool, direction: Artifact, positions: "np.ndarray") -> "np.ndarray":
    """Scores float32 [k] of positions [k] of the pool without a sketch."""
    import numpy as np

    lake = pool.lake
    shards = {one.shard: one for one in pool.segments}
    places = pool.places(positions)
    wanted: dict[str, list[int]] = {}
    for shard, row in places:
        wanted.setdefault(shard, []).append(row)
    found = {shard: _remembered(pool, direction, shards[shard]) for shard in wanted}
    unknown = {shard: {row for row in rows if np.isnan(found[shard][row])} for shard, rows in wanted.items()}
    if any(unknown.values()):
        stored = load_direction(lake, direction)
        sketched = pool.shard_scores(stored.query)
        pending = {
            shard: [tier for tier in _tiers(lake, shards[shard], sketched[shard]) if rows & set(tier.tolist())]
            for shard, rows in unknown.items()
            if rows
        }
        with gradient_pass(pool.stage) as work:
            exact = ExactScorer(work, stored.vectors)
            with pool.stage.progress(
                "exact scores", sum(len(t) for tiers in pending.values() for t in tiers)
            ) as progress:
                for shard, tiers in pending.items():
                    for rows in tiers:
                        found[shard][rows] = _tier_scores(pool, exact, shard, rows)
                        progress.advance(len(rows))
                    lake.remember(_name(pool, direction, shards[shard]), found[shard].tobytes())
    return np.array([found[shard][row] for shard, row in places], dtype=np.float32)


def whole_scores(pool: Pool, direction: Artifact) -> "np.ndarray":
    """Scores float32 [n] of all rows of the pool without a sketch; a gradient pass over the blocks whose products with
    the direction are not known."""
    found = known_scores(pool, direction)
    if found is None:
        _make_products(pool, direction)
        found = known_scores(pool, direction)
    if found is None:
        raise StageError(f"The exact products with {direction.fingerprint} could not be kept: is the lake read-only?")
    return found


def known_scores(pool: Pool, direction: Artifact) -> "np.ndarray | None":
    """As `whole_scores`, computing no gradient: None where a product is not known."""
    import numpy as np

    from prism_assets.selection.direction import relative_rates, row_factors

    parts = []
    for segment, mask in zip(pool.segments, pool.allowed, strict=True):
        cosines = [
            remembered(pool.lake, direction, block.fingerprint, block.notes["rows"])
            for block in _blocks(pool.lake, segment)
        ]
        if any(one is None for one in cosines):
            return None
        parts.append(np.concatenate([one for one in cosines if one is not None])[mask])
    scale = pool.stage.settings.selection.row_scale
    norms = np.array(pool.stored("norm")) if scale != "unit" else np.ones((pool.size, 1))
    tokens = pool.column("completion_tokens")["completion_tokens"].to_numpy()
    rates = relative_rates(learning_rates(pool.lake.local(pool.stage.warmup)))
    return ((np.concatenate(parts) * row_factors(scale, norms, tokens)) @ rates).astype(np.float32)


def _make_products(pool: Pool, direction: Artifact) -> None:
    """The missing products of all blocks, with this direction and with those that the lake shows."""
    from prism_assets.corpus.token_tables import from_table

    lake, stage = pool.lake, pool.stage
    directions = [direction, *shown_directions(stage)]
    pending: list[tuple[str, int, Artifact]] = []  # shard, first row, block
    for segment in pool.segments:
        first = 0
        for block in _blocks(lake, segment):
            if remembered(lake, direction, block.fingerprint, block.notes["rows"]) is None:
                pending.append((segment.shard, first, block))
            first += block.notes["rows"]
    with gradient_pass(stage) as work:
        exact = ExactProducts(work, directions)
        projections = exact.projections()
        total = sum(block.notes["rows"] for _, _, block in pending) * len(work.checkpoints)
        with stage.progress("exact scores", total) as progress:
            for shard, first, block in pending:
                rows = pool.candidates(shard, ["input_ids", "loss_mask"]).slice(first, block.notes["rows"])
                before = progress.done
                done = partial(_advance, progress, before)
                exact.remember(block.fingerprint, work.candidate_rows(from_table(rows), done, projections))
                progress.update(before + rows.num_rows * len(work.checkpoints))


def _advance(progress: Progress, before: int, done: int) -> None:
    progress.update(before + done)


def _blocks(lake: Lake, segment: IndexedShard) -> list[Artifact]:
    features = lake.get("candidate_features", segment.features)
    found = [] if features is None else blocks_of(lake, features)
    if features is None or None in found:
        raise LakeError(
            f"Shard {segment.shard} lost features: materialise candidate_features[{segment.shard}] and "
            "candidate_index again, or run `prism run`."
        )
    return [one for one in found if one is not None]


class ExactScorer:
    """The exact scores of any examples by one direction, t_k of each checkpoint in `vectors`; prepared once."""

    def __init__(self, work: GradientPass, vectors: list[dict[str, Any]]) -> None:
        from prism_assets.gradients.sketch import DirectionProducts
        from prism_assets.gradients.vectors import norm
        from prism_assets.selection.direction import relative_rates

        self.work = work
        engine = work.at(work.checkpoints[-1])
        self._products = [DirectionProducts([vector], engine.device, engine.dtype) for vector in vectors]
        self._preconditioners = [work.preconditioner(one) for one in work.checkpoints]
        self._lengths = [norm(vector) for vector in vectors]
        self._rates = relative_rates([one.mean_learning_rate for one in work.checkpoints])
        self._scale: RowScale = work.stage.settings.selection.row_scale

    def of(self, examples: "Sequence[Tokenized]") -> "np.ndarray":
        """Scores float64 [n]; not finite where a gradient is unusable."""
        import numpy as np

        from prism_assets.selection.direction import row_factors

        tokens = np.array([np.count_nonzero(example.loss_mask) for example in examples])
        scores = np.zeros(len(examples))
        for checkpoint, rate, length, product, preconditioner in zip(
            self.work.checkpoints, self._rates, self._lengths, self._products, self._preconditioners, strict=True
        ):
            engine = self.work.at(checkpoint)
            result = engine.feature_rows(examples, sketch=product, preconditioner=preconditioner)
            with np.errstate(invalid="ignore", divide="ignore"):
                cosines = result.rows[:, 0].astype(np.float64) / (result.norms * length)
            scores += rate * cosines * row_factors(self._scale, result.norms[:, None], tokens)[:, 0]
        return scores


def _tier_scores(pool: Pool, exact: ExactScorer, shard: str, rows: "np.ndarray") -> "np.ndarray":
    import numpy as np

    from prism_assets.corpus.token_tables import from_table

    scores = exact.of(from_table(pool.candidates(shard, ["input_ids", "loss_mask"]).take(rows)))
    return np.where(np.isfinite(scores), scores, -np.inf)


def _name(pool: Pool, direction: Artifact, shard: IndexedShard) -> str:
    scale = pool.stage.settings.selection.row_scale
    return f"scores/exact{'' if scale == 'unit' else f'-{scale}'}-{direction.content_hash[:32]}/{shard.features}"


def _remembered(pool: Pool, direction: Artifact, shard: IndexedShard) -> "np.ndarray":
    """What is known of a shard's rows, float32 [n]; NaN where nothing is."""
    import numpy as np

    data = pool.lake.recall(_name(pool, direction, shard))
    if data is None or len(data) != 4 * shard.rows:
        return np.full(shard.rows, np.nan, np.float32)
    return np.frombuffer(data, np.float32).copy()


def _tiers(lake: Lake, shard: IndexedShard, sketched: "np.ndarray") -> "list[np.ndarray]":
    """The shard's usable rows in tiers of `TIER` by descending sketched score [n]; a tier's rows ascend.

    They follow from shard and direction alone: rows that only this pool leaves out are among them.
    """
    import numpy as np

    usable = np.flatnonzero(usable_rows(lake, shard))
    ranked = usable[np.argsort(-sketched[usable], kind="stable")]
    return [np.sort(ranked[start : start + TIER]) for start in range(0, len(ranked), TIER)]
