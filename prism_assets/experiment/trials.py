"""The trials of an experiment: which there are, and the splits that they work from."""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from prism_assets.errors import UnusableTargets
from prism_assets.experiment.summary import COMPARED_WITH
from prism_assets.features.gradient_pass import gradient_pass
from prism_assets.features.target_anchors import make_anchors
from prism_assets.features.target_features import make_target_features
from prism_assets.identity import split_name, trial_partition
from prism_assets.resources.lake import Artifact, Rows
from prism_assets.selection.curvature import sample_features
from prism_assets.selection.direction_artifacts import (
    DirectionInputs,
    make_directions,
)
from prism_assets.selection.selection_inputs import OfTarget
from prism_assets.settings import Settings
from prism_assets.stage import Made, Stage

if TYPE_CHECKING:
    import pyarrow as pa


def strategies_of(settings: Settings) -> list[str]:
    """The strategies of an experiment: those of the settings, and those that every one is compared with."""
    return list(dict.fromkeys([*(settings.experiment.strategies or settings.strategies), *COMPARED_WITH]))


def seeds_of(settings: Settings) -> tuple[int, ...]:
    """The seeds of fine-tuning in each split."""
    return settings.experiment.seeds or settings.seeds


def trial_keys(settings: Settings, target: str) -> list[str]:
    """The heads of all trials of a target."""
    return [
        trial_partition(target, strategy, split, seed)
        for strategy in strategies_of(settings)
        for split in range(settings.experiment.splits)
        for seed in seeds_of(settings)
    ]


class Split(NamedTuple):
    """What the strategies of one split work from."""

    name: str
    number: int
    targets: Artifact  # with their anchors
    held_out: Artifact
    features: Artifact
    directions: Mapping[str, Artifact]  # of the strategies that have one

    def of_target(self) -> OfTarget:
        """The argument `of_target` of `selection_inputs` that gives this split's own artefacts."""
        known: dict[tuple[str, str | None], Artifact] = {
            ("target_anchors", None): self.targets,
            ("target_features", None): self.features,
        }
        known |= {("target_directions", name): one for name, one in self.directions.items()}
        return lambda table, strategy: known[table, strategy]


class PreparedSplits(NamedTuple):
    """All splits of a target, and how many artefacts were made for them."""

    splits: list[Split]
    computed: int


def prepare_splits(stage: Stage, target: str) -> PreparedSplits:
    """Records, target gradients and directions of every split, with the model loaded once."""
    from prism_assets.selection.strategies import STRATEGIES

    given = stage.shown("targets", target), stage.shown("eval_examples", target)
    wanted = [STRATEGIES[name] for name in strategies_of(stage.settings)]
    with_direction = {one.name: one for one in wanted if one.needs_direction}
    if any("direction" in one.reads for one in wanted):
        with_direction["prism"] = STRATEGIES["prism"]
    splits, computed = [], 0
    with gradient_pass(stage) as work:
        curvature = sample_features(work)
        for number in range(stage.settings.experiment.splits):
            name = split_name(target, number)
            drawn, held_out = _redrawn(stage, target, number, *given)
            targets = make_anchors(work, drawn.artifact, name)
            features = make_target_features(work, targets.artifact, name)
            inputs = DirectionInputs(name, features.artifact, targets.artifact, held_out.artifact, curvature)
            directions, made = make_directions(work, inputs, with_direction.values())
            computed += drawn.computed + targets.computed + held_out.computed + features.computed + made
            splits.append(Split(name, number, targets.artifact, held_out.artifact, features.artifact, directions))
    return PreparedSplits(splits, computed)


def _redrawn(stage: Stage, target: str, number: int, targets: Artifact, held_out: Artifact) -> tuple[Made, Made]:
    """Targets and held-out records of a split; those of split 0 are there already."""
    if number == 0:
        return Made(targets, 0), Made(held_out, 0)
    from prism_assets.experiment.splits import redraw

    how = stage.settings.experiment.redraw

    @cache
    def drawn() -> "tuple[pa.Table, pa.Table]":
        given = stage.lake.read_table(targets), stage.lake.read_table(held_out)
        try:
            return redraw(*given, number, how)
        except ValueError as error:
            raise UnusableTargets(f"targets.{target}: {error}.") from error

    settings = {"split": number, "redraw": how}
    inputs = {"targets": targets, "eval_examples": held_out}
    recipes = [
        stage.recipe(table, settings, inputs, partition=split_name(target, number), version=targets.header["version"])
        for table in ("targets", "eval_examples")
    ]
    return stage.make(recipes[0], lambda: Rows(drawn()[0])), stage.make(recipes[1], lambda: Rows(drawn()[1]))
