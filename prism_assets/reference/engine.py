"""The gradient engine as the settings describe it: for the warm-up, features, fine-tuning and evaluation alike."""

from typing import TYPE_CHECKING

from prism_assets.stage import Stage

if TYPE_CHECKING:
    from peft import PeftModel

    from prism_assets.gradients.engine import GradientEngine


def gradient_engine(stage: Stage, peft_model: "PeftModel") -> "GradientEngine":
    """The engine of an adapted model, within the memory that the settings allow. Raises UnsupportedModelError."""
    from prism_assets.gradients.engine import GradientEngine

    return GradientEngine(
        peft_model,
        token_budget=stage.settings.features.token_budget,
        memory=stage.settings.execution.memory_limit,
    )
