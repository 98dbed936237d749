"""Target features as weightings see them: preference scores, norms, and which target examples are usable."""

from typing import TYPE_CHECKING

from prism_assets.corpus.target_set import target_set
from prism_assets.errors import LakeError, SettingsError
from prism_assets.features.blocks import is_usable
from prism_assets.resources.lake import Artifact
from prism_assets.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.strategies import TargetScores


def require_made_of(features: Artifact, targets: Artifact) -> None:
    """Raise LakeError where these target features are not those of these targets: the files have changed in between."""
    if features.header["inputs"]["targets"]["content_hash"] != targets.content_hash:
        raise LakeError(
            f"target_features of {targets.partition} are those of earlier target files: materialise target_features "
            "first, or run `prism run`."
        )


def scores_of(settings: Settings, features: "pa.Table", targets: "pa.Table") -> "tuple[TargetScores, np.ndarray]":
    """What a weighting may look at, over the usable target examples, and the positions [m'] of these.

    With `preference.score: sum`, scores and norms are those of the summed log-probabilities.
    Raises SettingsError where that is asked for pairs.
    """
    import numpy as np

    from prism_assets.selection.strategies import TargetScores

    pairs = target_set(targets).pairs
    positions = usable_targets(features)
    rows = features.take(positions)
    tokens = tokens_counted(settings, targets.take(positions), pairs)
    return (
        TargetScores(
            np.array(rows["score"].to_pylist()).T * tokens,
            np.array(rows["norm"].to_pylist()).T * tokens,
            "pairs" if pairs else "plain",
            settings.preference.temperature,
            np.array(rows["base_score"].to_pylist()),
        ),
        positions,
    )


def usable_targets(features: "pa.Table") -> "np.ndarray":
    """Positions [m'] of the target examples whose gradient was not refused."""
    import numpy as np

    return np.flatnonzero(is_usable(features))


def as_made(settings: Settings, weights: Artifact) -> Settings:
    """The settings with the temperature and the kind of score that published target weights were made with."""
    made = {"temperature": weights.notes["temperature"], "score": weights.header["settings"].get("score", "mean")}
    return settings.model_copy(update={"preference": settings.preference.model_copy(update=made)})


def tokens_counted(settings: Settings, targets: "pa.Table", pairs: bool) -> "np.ndarray":
    """What turns a mean log-probability into the preference score, float64 [m]: 1, or the supervised tokens."""
    import numpy as np

    if settings.preference.score == "mean":
        return np.ones(targets.num_rows)
    if pairs:
        raise SettingsError(
            "preference.score: sum is for plain targets; pairs of different lengths have no common number of tokens: "
            "use mean."
        )
    return np.array([sum(mask) for mask in targets["loss_mask"].to_pylist()], dtype=np.float64)
