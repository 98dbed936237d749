"""Labels that say which rows of a mixture are harmful, for judging alone: no ranking sees them.

They are a field of the candidates' records (`targets.<name>.label`), kept in the table `candidate_fields`.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.errors import SettingsError
from prism_assets.resources.lake import Artifact
from prism_assets.selection.pool import Pool
from prism_assets.settings import TargetSettings
from prism_assets.stage import Stage

if TYPE_CHECKING:
    from prism_assets.resources.lake import Lake

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def harmful_rows(stage: Stage, pool: Pool, target: str) -> dict[str, bool]:
    """Whether each labelled row of the pool is harmful, by its id; rows without the label are left out.

    Raises SettingsError, naming file and line, for a value that says neither, and where no row has the label, or all of
    them the same.
    """
    settings = stage.settings.targets[target]
    assert settings.label is not None
    found: dict[str, bool] = {}
    for shard, mask in zip(pool.shards, pool.allowed, strict=True):
        table = stage.lake.read_table(stage.shown("candidate_fields", shard))
        for row, counts in zip(table.to_pylist(), mask, strict=True):
            value = json.loads(row["fields"]).get(settings.label) if counts else None
            if value is not None:
                found[row["id"]] = _is_harmful(value, settings, f"{shard}, line {row['line']}", target)
    if len(set(found.values())) < 2:
        said = f"all {len(found)} rows that have it say the same" if found else "no row of the mixture has it"
        raise SettingsError(
            f"targets.{target}.label: {settings.label!r} tells no rows apart: {said}. Name another field, or leave it "
            "out."
        )
    return found


def _is_harmful(value: Any, settings: TargetSettings, where: str, target: str) -> bool:
    if settings.label_values:
        return str(value) in settings.label_values
    text = str(value).lower()
    if text not in _TRUTH:
        raise SettingsError(
            f"targets.{target}.label: {settings.label!r} is {value!r} ({where}), neither true nor false; name the "
            f"values that are harmful in targets.{target}.label_values."
        )
    return _TRUTH[text]


class Found(NamedTuple):
    """How well a ranking finds the harmful rows of a mixture."""

    auroc: float  # the probability that a harmful row ranks above another, ties counting half
    average_precision: float
    labelled: int
    harmful: int
    removed_harmful: int  # of the removed rows


def found_by(lake: "Lake", kept: Artifact, removed: Artifact, harmful: Mapping[str, bool]) -> Found:
    """Judge what was removed, and the order of the rest. Rows without a rank count as equal, below all others."""
    import numpy as np

    from prism_assets.stats.ranks import area_under_curve, average_precision

    first, rest = (lake.read_table(one, ["id", "rank"]).to_pylist() for one in (removed, kept))
    rows = [(row, place < len(first)) for place, row in enumerate([*first, *rest]) if row["id"] in harmful]
    labels = np.array([harmful[row["id"]] for row, _ in rows])
    scores = np.array([-np.inf if row["rank"] is None else -float(row["rank"]) for row, _ in rows])
    gone = np.array([taken for _, taken in rows])
    return Found(
        area_under_curve(scores, labels),
        average_precision(scores, labels),
        len(labels),
        int(labels.sum()),
        int((labels & gone).sum()),
    )
