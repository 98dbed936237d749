"""The rehearsal: the gradient engine and one step of training, tried on two short sequences before any work.

What a model or its adapter has that cannot be used shows here, in seconds, and not after the warm-up. Where a module is
refused, other settings are tried until the engine takes them, and the message has them to paste.
"""

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.errors import LibraryChanged, UnsupportedModelError, UserMistake
from prism_assets.reference.engine import gradient_engine
from prism_assets.resources.model.lora_targets import ALL_LINEAR, end_of_name, lora_targets
from prism_assets.settings.schema import LoraSettings
from prism_assets.stage import Stage

if TYPE_CHECKING:
    from prism_assets.corpus.encoder import TokenizedExample

_TEXT = "One, two and three make six."
_IN_THE_ADAPTER = "base_model.model."  # what PEFT puts before a module's name
_MOST_KINDS = 50  # of modules that are left out, one after the other

# What was rehearsed in this process: the same model and adapter need no second time.
_rehearsed: dict[str, "Rehearsal"] = {}


class Rehearsal(NamedTuple):
    """An adapter that gradients and training work with."""

    layers: int  # adapted linear layers
    parameters: int  # of the adapter
    left_out: str  # what `all-linear` does not adapt in this model; empty: nothing


def rehearse(stage: Stage) -> Rehearsal:
    """Take a gradient and a step of training with the model and adapter of the settings; both are as before afterwards.

    Raises UnsupportedModelError, which names the module, with settings that work where there are any; ModelError where
    the adapter cannot be put on the model at all.
    """
    what = [stage.model_identity.fingerprint, stage.dtype, str(stage.model.torch_device())]
    key = json.dumps([*what, stage.lora_identity])
    if key not in _rehearsed:
        try:
            _rehearsed[key] = _once(stage)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error}{_advice(stage, error)}", error.module) from error
    return _rehearsed[key]


def _once(stage: Stage) -> Rehearsal:
    import numpy as np
    import torch

    from prism_assets.sft.trainer import Training, fine_tune

    examples = _examples(stage)
    doing = "a gradient of"
    try:
        with stage.adapted() as peft_model:
            engine = gradient_engine(stage, peft_model)
            found = engine.weighted_gradient(examples, [0.5, 0.5])
            if not (np.isfinite(found.mean_log_probs).all() and all(map(_finite, found.gradient.values()))):
                raise UnsupportedModelError("log-probabilities or gradients of two short sequences are not finite")
            doing = "a step of training on"
            with torch.random.fork_rng(devices=[]):
                fine_tune(engine, examples, Training(steps=1, batch_size=len(examples)), seed=0)
            return Rehearsal(len(engine.layers), engine.num_parameters, _left_out(stage))
    except (UserMistake, LibraryChanged):
        raise
    except Exception as error:  # whatever the model's own code, PEFT or transformers raise
        what = stage.model_identity.architecture
        raise UnsupportedModelError(
            f"{what}: {doing} two short sequences fails with {type(error).__name__}: {error}"
        ) from error


def _finite(values: Any) -> bool:
    return bool(values.isfinite().all())


def _examples(stage: Stage) -> "list[TokenizedExample]":
    """Two sequences of different lengths, of the tokenizer's own tokens: ids that stand for images are not among
    them."""
    import numpy as np

    from prism_assets.corpus.encoder import TokenizedExample

    ids = stage.model.tokenizer()(_TEXT, add_special_tokens=False)["input_ids"]
    ids = (list(ids) * 8)[:8]
    return [TokenizedExample(np.array(one, np.int32), np.arange(len(one)) >= len(one) // 2) for one in (ids, ids[:5])]


def _left_out(stage: Stage) -> str:
    if stage.settings.model.adapter:
        return ""
    lora = stage.settings.lora
    return lora_targets(stage.model.base(), lora.target_modules, lora.exclude_modules, lora.layers).left_out


# -- settings that work -------------------------------------------------------------------------------------------


def _advice(stage: Stage, error: UnsupportedModelError) -> str:
    """Lines for prism.yaml with which the rehearsal goes well; empty where none are found."""
    lora = stage.settings.lora
    if stage.settings.model.adapter:
        return "\nmodel.adapter adapts it: start from an adapter that does not." if error.module else ""
    if isinstance(lora.exclude_modules, str):
        return ""
    for target_modules in dict.fromkeys((lora.target_modules, ALL_LINEAR)):
        accepted = _accepted(stage, lora.model_copy(update={"target_modules": target_modules}))
        if accepted is None:
            continue
        try:
            rehearsal = _once(stage.with_settings(lora=accepted))
        except UserMistake:
            continue
        wanted = accepted.model_dump(mode="json", include={"target_modules", "exclude_modules"})
        if target_modules == lora.target_modules:
            del wanted["target_modules"]
        lines = "".join(f"\n    {key}: {json.dumps(value)}" for key, value in wanted.items())
        return f"\nWith these lines in prism.yaml it works ({rehearsal.layers} layers are adapted):\n  lora:{lines}"
    return ""


def _accepted(stage: Stage, lora: LoraSettings) -> LoraSettings | None:
    """The settings with as many modules excluded as the engine refuses, by what they are called in every layer."""
    excluded = list(lora.exclude_modules)
    for _ in range(_MOST_KINDS):
        tried = lora.model_copy(update={"exclude_modules": tuple(excluded)})
        try:
            with stage.with_settings(lora=tried).adapted() as peft_model:
                gradient_engine(stage, peft_model)
            return _shortened(stage, tried, len(lora.exclude_modules))
        except UnsupportedModelError as error:
            kind = end_of_name((error.module or "").removeprefix(_IN_THE_ADAPTER))
            if not kind or kind in excluded:
                return None
            excluded.append(kind)
        except Exception:  # nothing is left to adapt, or the model's own code fails whatever is adapted
            return None
    return None


def _shortened(stage: Stage, lora: LoraSettings, given: int) -> LoraSettings:
    """The same modules, excluded by names as short as they can be; the first `given` stay as the user wrote them."""
    base = stage.model.base()
    kept = lora_targets(base, lora.target_modules, lora.exclude_modules, lora.layers).modules
    if isinstance(kept, str):
        return lora
    short = list(lora.exclude_modules[:given])
    for kind in lora.exclude_modules[given:]:
        parts = kind.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        short.append(next((end for end in ends if not any(f".{one}".endswith(f".{end}") for one in kept)), kind))
    return lora.model_copy(update={"exclude_modules": tuple(dict.fromkeys(short))})
