"""A door: exact scores of a shortlist. The sketch's noise is taken out of what is selected, not out of the whole pool.

    score_i = Σ_k (η̄_k / Σ_l η̄_l) ⟨t_k, Γ_ik⟩ / (‖t_k‖ ‖Γ_ik‖)        nothing sketched

One gradient pass a checkpoint over the shortlist, each gradient multiplied with the direction while it is there. Last
bits depend on which rows share a batch, so batches must not depend on what else is in the pool: the rows of a shard are
cut into tiers by their sketched scores, a tier is always worked on as a whole, and what it gave is remembered by
direction and shard features. So a selection does not depend on the order of arrival, and an arrival costs the tiers that
it newly needs.
"""

from typing import TYPE_CHECKING

from prism_assets.features.assets import GradientPass, IndexedShard, gradient_pass, read_blocks
from prism_assets.selection.pool import LivePool
from prism_assets.selection.target_direction import load_direction
from prism_assets.settings import Settings
from resources.lake import Artifact, Lake
from resources.language_model import LanguageModel

if TYPE_CHECKING:
    import numpy as np

# Rows of a tier: a few batches' worth.
TIER = 64


def exact_scores(
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    warmup: Artifact,
    direction: Artifact,
    pool: LivePool,
    positions: "np.ndarray",
) -> "np.ndarray":
    """Scores float32 [k] of positions [k] of the pool without a sketch."""
    import numpy as np

    query, _ = load_direction(lake, direction)
    shards = {one.shard: one for one in pool.segments}
    wanted: dict[str, list[int]] = {}
    for shard, row in pool.places(positions):
        wanted.setdefault(shard, []).append(row)
    found: dict[str, np.ndarray] = {}
    pending: dict[str, list[np.ndarray]] = {}
    for shard, rows in wanted.items():
        found[shard] = _remembered(lake, direction, shards[shard])
        unknown = set(np.asarray(rows)[np.isnan(found[shard][rows])].tolist())
        if unknown:
            pending[shard] = [one for one in _tiers(lake, pool, query, shards[shard]) if unknown & set(one.tolist())]
    if pending:
        with gradient_pass(settings, model, warmup) as work:
            _compute(lake, work, direction, pool, shards, pending, found)
    return np.array([found[shard][row] for shard, row in pool.places(positions)], dtype=np.float32)


def _name(direction: Artifact, shard: IndexedShard) -> str:
    return f"scores/exact-{direction.content_hash[:32]}/{shard.features}"


def _remembered(lake: Lake, direction: Artifact, shard: IndexedShard) -> "np.ndarray":
    """What is known of a shard's rows, float32 [n]; NaN where nothing is."""
    import numpy as np

    data = lake.recall(_name(direction, shard))
    if data is None or len(data) != 4 * shard.rows:
        return np.full(shard.rows, np.nan, np.float32)
    return np.frombuffer(data, np.float32).copy()


def _tiers(lake: Lake, pool: LivePool, query: "np.ndarray", shard: IndexedShard) -> "list[np.ndarray]":
    """The shard's usable rows in tiers of `TIER` by descending sketched score; a tier's rows ascend.

    They follow from shard and direction alone: rows that only this pool leaves out are among them.
    """
    import numpy as np

    stored = read_blocks(lake, lake.get("candidate_features", shard.features), ["refused"])
    usable = np.flatnonzero([reason is None for reason in stored["refused"].to_pylist()])
    scores = pool.shard_scores(query)[shard.shard][usable]
    ranked = usable[np.argsort(-scores, kind="stable")]
    return [np.sort(ranked[start : start + TIER]) for start in range(0, len(ranked), TIER)]


def _compute(
    lake: Lake,
    work: GradientPass,
    direction: Artifact,
    pool: LivePool,
    shards: dict[str, IndexedShard],
    pending: "dict[str, list[np.ndarray]]",
    found: "dict[str, np.ndarray]",
) -> None:
    """Fills `found` with the exact scores of the pending tiers, shard by shard, and remembers them."""
    import numpy as np

    from prism_assets.corpus.tokenization import from_table
    from prism_assets.features.sketch import DirectionProducts
    from prism_assets.selection.direction import norm, relative_rates

    _, vectors = load_direction(lake, direction)
    rates = relative_rates([one.mean_learning_rate for one in work.checkpoints])
    engine = work.at(work.checkpoints[-1])
    products = [DirectionProducts([vector], engine.device, engine.dtype) for vector in vectors]
    for shard, tiers in pending.items():
        for rows in tiers:
            examples = from_table(pool.candidates(shard, ["input_ids", "loss_mask"]).take(rows))
            scores = np.zeros(len(rows))
            for checkpoint, rate, vector, product in zip(work.checkpoints, rates, vectors, products, strict=True):
                result = work.at(checkpoint).feature_rows(
                    examples, sketch=product, preconditioner=work.preconditioner(checkpoint)
                )
                with np.errstate(invalid="ignore", divide="ignore"):
                    scores += rate * result.rows[:, 0].astype(np.float64) / (result.norms * norm(vector))
            found[shard][rows] = np.where(np.isfinite(scores), scores, -np.inf)
        lake.remember(_name(direction, shards[shard]), found[shard].tobytes())
