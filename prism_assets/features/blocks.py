"""Feature rows as tables, and where the blocks of a shard are read."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prism_assets.errors import StageError
from prism_assets.resources.lake import Artifact, Lake

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.gradients.engine import FeatureRows

BLOCK_ROWS = 4096


def feature_table(ids: Sequence[str], passes: "Sequence[FeatureRows]") -> "pa.Table":
    """Rows [n] with unit blocks of each checkpoint side by side: vector float16 [C·K], norms float64 [C]."""
    import numpy as np
    import pyarrow as pa

    blocks, reasons = [], np.array([None] * len(ids), dtype=object)
    for one in passes:
        usable = np.array([reason is None for reason in one.refused], dtype=bool)
        unit = np.zeros_like(one.rows)
        unit[usable] = one.rows[usable] / one.norms[usable, None]
        blocks.append(unit.astype(np.float16))
        for position in np.flatnonzero(~usable):
            reasons[position] = reasons[position] or one.refused[position]
    vectors = np.concatenate(blocks, axis=1)
    vectors[[reason is not None for reason in reasons]] = 0
    return pa.table(
        {
            "id": pa.array(ids, pa.string()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
            "norm": per_checkpoint(passes, "norms"),
            "gradient_norm": per_checkpoint(passes, "gradient_norms"),
            "mean_log_prob": per_checkpoint(passes, "mean_log_probs"),
            "refused": pa.array(reasons.tolist(), pa.string()),
        }
    )


def per_checkpoint(passes: "Sequence[FeatureRows]", name: str) -> "pa.Array":
    """A number of each row at each checkpoint, as lists float64 [C]."""
    import numpy as np
    import pyarrow as pa

    return pa.array(np.stack([getattr(one, name) for one in passes], axis=1).tolist(), pa.list_(pa.float64()))


def vectors_of(table: "pa.Table") -> "np.ndarray":
    """The column `vector` as float16 [n, C·K]."""
    import numpy as np

    column = table["vector"].combine_chunks()
    column = column if not hasattr(column, "chunks") else column.chunk(0)
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float16, copy=False)
    return values.reshape(len(column), column.type.list_size)


def is_usable(table: "pa.Table") -> "np.ndarray":
    """The mask [n] of the rows that have no reason in the column `refused`."""
    import numpy as np

    return np.array([reason is None for reason in table["refused"].to_pylist()], dtype=bool)


def refused_rows(table: "pa.Table") -> int:
    """How many rows have a reason in the column `refused`."""
    return int((~is_usable(table)).sum())


def weighted_mean(pairs: Sequence[tuple[float | None, int]]) -> float | None:
    """Mean of (value, weight), values that are None or not finite left out; None where nothing is left."""
    finite = [(value, weight) for value, weight in pairs if value is not None and math.isfinite(value)]
    total = sum(weight for _, weight in finite)
    return sum(value * weight for value, weight in finite) / total if total else None


def blocks_of(lake: Lake, features: Artifact) -> list[Artifact | None]:
    """The blocks of a shard's features in row order; None where one is missing or was found damaged."""
    return [lake.get("feature_blocks", name) for name in lake.read_table(features, ["block"])["block"].to_pylist()]


def read_blocks(lake: Lake, features: Artifact, columns: Sequence[str]) -> "pa.Table":
    """Columns of all rows of a shard's features, in the order of the shard. Raises StageError for a missing block."""
    import pyarrow as pa

    tables = []
    for position, block in enumerate(blocks_of(lake, features)):
        if block is None:
            raise StageError(
                f"Feature block {position + 1} of shard {features.partition} is missing or damaged: materialise "
                f"candidate_features[{features.partition}] again, it rebuilds that block alone."
            )
        tables.append(lake.read_table(block, columns))
    return pa.concat_tables(tables)
