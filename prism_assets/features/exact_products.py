"""Exact inner products of candidates' gradients with directions, taken in a gradient pass while they are there.

    cos_ik = ⟨t_k, Γ_ik⟩ / (‖t_k‖ ‖Γ_ik‖)        nothing sketched; float32 [n, C] of a block of features and a direction

A pass costs the same whatever the number of directions, so one takes those of all targets and strategies that the lake
shows: where they are made before a shard arrives, which is so every day but the first, its exact products come with its
features. What a pass gave is remembered by block and direction, and depends on them alone, to the last bit: a block is
always worked on as a whole, and a direction is multiplied by itself.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from prism_assets.features import blocks
from prism_assets.features.gradient_pass import GradientPass
from prism_assets.resources.lake import Artifact, Lake
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np

    from prism_assets.gradients.engine import FeatureRows
    from prism_assets.gradients.sketch import Projection

# Directions of one pass: each is as large as the adapter, in float32, and held on the device.
MOST_AT_ONCE = 32


def shown_directions(stage: Stage) -> list[Artifact]:
    """The directions that the lake shows, of the settings' targets and strategies."""
    asked = ((target, strategy) for target in stage.settings.targets for strategy in stage.settings.strategies)
    found = (stage.shown_or_none("target_directions", target, strategy) for target, strategy in asked)
    return [one for one in found if one is not None]


def read_vectors(lake: Lake, direction: Artifact) -> list[dict[str, Any]]:
    """The vectors t_k of a direction at each checkpoint: parameter name -> tensor."""
    return vectors_among(lake.read_tensors(direction))


def vectors_among(tensors: dict[str, Any]) -> list[dict[str, Any]]:
    """The vectors t_k among the tensors of a direction."""
    vectors: list[dict[str, Any]] = [{} for _ in range(len(tensors["norms"]))]
    for name, tensor in tensors.items():
        if name.startswith("t/"):
            _, position, parameter = name.split("/", 2)
            vectors[int(position)][parameter] = tensor
    return vectors


class ExactProducts:
    """Cosines of gradients with some directions, as they come out of the gradient passes of one run."""

    def __init__(self, work: GradientPass, directions: Iterable[Artifact]) -> None:
        """`directions` that say the same, of strategies or targets that agree, count once."""
        from prism_assets.gradients.vectors import norm

        self.work, self.lake = work, work.stage.lake
        self.directions = list({one.content_hash: one for one in directions}.values())[:MOST_AT_ONCE]
        self._vectors = [read_vectors(self.lake, one) for one in self.directions]
        self._lengths = [[norm(vector) for vector in vectors] for vectors in self._vectors]

    def projections(self) -> "list[Projection]":
        """The products at each checkpoint, for a gradient pass."""
        from prism_assets.gradients.sketch import DirectionProducts

        engine = self.work.at(self.work.checkpoints[-1])
        at_each = zip(*self._vectors, strict=True)
        return [DirectionProducts(list(vectors), engine.device, engine.dtype) for vectors in at_each]

    def remember(self, block: str, passes: "Sequence[FeatureRows]") -> None:
        """Keep the cosines of a block (its fingerprint), from passes whose last values of a row are the products."""
        import numpy as np

        for number, direction in enumerate(self.directions):
            cosines = np.full((len(passes[0].norms), len(passes)), np.nan, np.float32)
            for checkpoint, one in enumerate(passes):
                usable = np.array([reason is None for reason in one.refused], dtype=bool)
                products = one.rows[usable, number - len(self.directions)].astype(np.float64)
                cosines[usable, checkpoint] = products / (one.norms[usable] * self._lengths[number][checkpoint])
            self.lake.remember(_name(direction, block), cosines.tobytes())


def remembered(lake: Lake, direction: Artifact, block: str, rows: int) -> "np.ndarray | None":
    """The cosines of a block's rows with a direction, float32 [n, C], NaN where refused; None where not known."""
    import numpy as np

    data = lake.recall(_name(direction, block))
    if data is None or len(data) % (4 * max(rows, 1)):
        return None
    return np.frombuffer(data, np.float32).reshape(rows, -1)


def missing_products(stage: Stage, direction: Artifact, features: Iterable[Artifact]) -> int:
    """How many rows of these shards' features have no known product with a direction."""
    missing = 0
    for one in features:
        for block in blocks.blocks_of(stage.lake, one):
            if block is None or stage.lake.recall(_name(direction, block.fingerprint)) is None:
                missing += blocks.BLOCK_ROWS if block is None else block.notes["rows"]
    return missing


def _name(direction: Artifact, block: str) -> str:
    return f"products/{direction.content_hash[:32]}/{block}"
