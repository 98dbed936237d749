"""What the trust in one target is measured from, and the candidates that are tried."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from prism_assets.features.anchor_artifacts import shown_anchors
from prism_assets.features.gradient_pass import GradientPass
from prism_assets.resources.lake import Artifact
from prism_assets.selection.direction_artifacts import COMPARED, load_direction, make_directions, shown_inputs
from prism_assets.selection.pool import Pool, indexed_pool
from prism_assets.selection.strategies import STRATEGIES
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

# What a training step and the fine-tunings on subsets depend on; length and accumulation are their own.
TRAINING_SETTINGS = {"learning_rate", "batch_size", "scheduler", "warmup_ratio", "weight_decay"}
# Our former weighting of pairs, whose objective is another one: how far does it raise the published J?
STEPPED = ("prism-sigmoid",)


class TrustInputs(NamedTuple):
    """What the trust in one target is measured from."""

    name: str
    weights: Artifact
    directions: dict[str, Artifact]
    # Directions along which nothing is measured but steps of growing size: of pairs the former weighting.
    stepped: dict[str, Artifact]
    targets: Artifact
    eval_examples: Artifact
    features: Artifact


def trust_inputs(work: GradientPass, name: str) -> TrustInputs:
    """What the lake shows of a target now; a direction that is stepped along alone is made where it is missing. Raises
    NotMadeYet."""
    stage = work.stage
    weights = stage.shown("target_weights", name)
    stepped = [STRATEGIES[one] for one in STEPPED] if weights.notes["kind"] == "pairs" else []
    return TrustInputs(
        name,
        weights,
        {one: stage.shown("target_directions", name, one) for one in COMPARED},
        make_directions(work, shown_inputs(stage, name), stepped).by_strategy,
        shown_anchors(stage, name),
        stage.shown("eval_examples", name),
        stage.shown("target_features", name),
    )


def tried_candidates(stage: Stage, inputs: TrustInputs) -> "tuple[pa.Table, pa.Table]":
    """The candidates on which single steps are taken, and those that subsets are drawn from."""
    from prism_assets.trust.sample import spread_over_scores

    pool = indexed_pool(stage)
    scores = {name: pool.scores(load_direction(stage.lake, one).query) for name, one in inputs.directions.items()}

    def sample(number: int) -> "pa.Table":
        chosen = spread_over_scores(scores, number)
        return _rows(pool, chosen, {name: values[chosen] for name, values in scores.items()})

    options = stage.settings.trust
    return sample(options.candidates), sample(options.datamodel_rows if options.datamodel_subsets else 0)


def _rows(pool: Pool, positions: "np.ndarray", scores: "Mapping[str, np.ndarray]") -> "pa.Table":
    """Rows of the pool: id, tokens, and the stored score under each strategy."""
    import pyarrow as pa

    schema = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_()))])
    table = schema.empty_table()
    if len(positions):
        table = pool.rows_at(positions, schema.names).select(schema.names).cast(schema)
    for name, values in scores.items():
        table = table.append_column(f"score_{name}", pa.array(values, pa.float64()))
    return table
