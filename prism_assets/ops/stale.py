"""Which selections of the lake are not those of today's inputs and settings, and why."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prism_assets.errors import LakeError, SettingsError
from prism_assets.identity import join_key
from prism_assets.resources.lake import Artifact, Recipe
from prism_assets.stage import Stage

if TYPE_CHECKING:
    from prism_assets.selection.strategies import Strategy


def why_outdated(stage: Stage, target: str, strategy: "Strategy") -> str | None:
    """Why the selection that the lake shows is not the one of today's inputs and settings; None where it is."""
    from prism_assets.selection.direction_artifacts import expected_direction
    from prism_assets.selection.selection_inputs import selection_inputs, selection_recipe
    from prism_assets.selection.strategies import STRATEGIES

    key = join_key(target, strategy.name)
    shown = stage.shown_or_none("selection", key)
    if shown is None:
        return "not made yet"
    try:
        if strategy.needs_direction or "direction" in strategy.reads:
            weighed = strategy if strategy.needs_direction else STRATEGIES["prism"]
            direction = stage.shown_or_none("target_directions", target, weighed.name)
            why = direction and _difference(direction, expected_direction(stage, target, weighed))
            if why:
                return f"its direction: {why}"
        inputs = selection_inputs(stage, target, strategy)
        return _difference(shown, selection_recipe(stage, strategy, inputs, key))
    except (LakeError, SettingsError) as error:  # something that it is made from is not there yet, or never will be
        return str(error)


def newer_than_shown(stage: Stage, target: str, strategy: "Strategy") -> list[str]:
    """What the selection that the lake shows does not know of yet: files of the inbox, newer inputs, other settings."""
    from prism_assets.corpus.candidates import inbox_files

    waiting = []
    if stage.settings.candidates.inbox.is_dir():
        keys = inbox_files(stage, at_rest_seconds=0)
        unread = sum(stage.shown_or_none("candidates", key) is None for key in keys)
        if unread:
            waiting.append(f"{unread:,} of {len(keys):,} files of the inbox are not read yet")
    why = why_outdated(stage, target, strategy)
    return [*waiting, *([why] if why else [])]


def untrained(stage: Stage, keys: Iterable[str]) -> list[str]:
    """Those of the partitions whose selection is made, and whose adapters are not those of its rows and of today's
    settings."""
    from prism_assets.training.adapter import are_of

    selections = {key: stage.shown_or_none("selection", key) for key in keys}
    return [key for key, one in selections.items() if one is not None and not are_of(stage, key, one)]


# What the names in an artefact's header are called in prism.yaml.
_SETTINGS = {
    "weights": "preference.temperature or preference.score",
    "budget": "selection.budget",
    "seed": "selection.seed",
    "rerank": "selection.rerank",
    "row_scale": "selection.row_scale",
    "groups": "preference.groups",
    "temperature": "preference.temperature",
    "score": "preference.score",
}


def _difference(shown: Artifact, expected: Recipe) -> str | None:
    """What an artefact was made from or by, and would not be today; None where it would be the same."""
    if shown.fingerprint == expected.fingerprint:
        return None
    made_from, before = shown.header["inputs"], shown.header["settings"]
    # As the header holds them: what was a tuple is a list there.
    today = json.loads(json.dumps(dict(expected.settings)))
    settings = [key for key in sorted({*before, *today}) if before.get(key) != today.get(key)]
    inputs = [
        role
        for role, one in expected.inputs.items()
        if isinstance(one, Artifact) and made_from.get(role, {}).get("content_hash") != one.content_hash
    ]
    if settings:
        inputs = [role for role in inputs if role in made_from]  # the others came with a setting
    if inputs:
        settings = [key for key in settings if key != "weights"]  # they follow from targets and their gradients
    changed = [*(_SETTINGS.get(key, key) for key in settings), *inputs]
    return f"other {', '.join(changed)}" if changed else "an older version of this code"
