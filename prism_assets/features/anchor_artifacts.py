"""What the anchors of target examples are made from, and those that the lake shows."""

from typing import Any

from prism_assets.errors import LakeError
from prism_assets.identity import target_of_split
from prism_assets.resources.lake import Artifact, Recipe
from prism_assets.stage import Stage

# Of these every example has an anchor; of the others the file's records decide.
MADE = ("choices", "generated", "shuffled")


def shown_anchors(stage: Stage, name: str) -> Artifact:
    """The target examples that directions are to be made of.

    Raises NotMadeYet where there are none, LakeError where they are those of earlier target files or settings.
    """
    found, targets = stage.shown("target_anchors", name), stage.shown("targets", name)
    if found.fingerprint != anchors_recipe(stage, targets, name).fingerprint:
        raise LakeError(
            f"target_anchors of {name} are those of earlier target files or settings: materialise target_anchors "
            "first, or run `prism run`."
        )
    return found


def anchors_kind(stage: Stage, name: str) -> str | None:
    """`targets.<name>.anchors`, also for a split of the target."""
    return stage.settings.targets[target_of_split(name)].anchors


def anchors_recipe(stage: Stage, targets: Artifact, name: str) -> Recipe:
    """What the anchors of these targets are made from."""
    kind = anchors_kind(stage, name)
    inputs: dict[str, Any] = {"targets": targets}
    if kind == "generated":
        inputs["warmup"] = stage.warmup
    if kind in MADE:
        inputs["tokenizer"] = stage.model_identity.tokenizer
    settings: dict[str, Any] = {"anchors": kind or "given"}
    if kind in MADE:
        settings["tokenization"] = stage.settings.tokenization.model_dump()
    if is_removal(stage, name):
        settings["swapped"] = True
    return stage.recipe("target_anchors", settings, inputs, partition=name)


def is_removal(stage: Stage, name: str) -> bool:
    """Whether the target, also that of a split, names rows to be removed."""
    return stage.settings.targets[target_of_split(name)].use == "remove"
