"""The gradient pass of a run: model, checkpoints and sketch, loaded on first use and once for all partitions."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from prism_assets.compat import MOST_INDEX_DIMENSIONS
from prism_assets.errors import UnsuitableSetting
from prism_assets.progress import uncounted
from prism_assets.reference.checkpoints import WarmupCheckpoint, read_checkpoints
from prism_assets.reference.engine import gradient_engine
from prism_assets.resources.lake import verify
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import torch

    from prism_assets.gradients.engine import FeatureRows, GradientEngine
    from prism_assets.gradients.preconditioner import Preconditioner
    from prism_assets.gradients.sketch import Projection

Value = TypeVar("Value")


class GradientPass:
    """Gradients at the warm-up's checkpoints. Loads model, checkpoints and sketch on first use; `gradient_pass` opens
    one."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        verify(stage.lake, stage.warmup)  # every gradient is taken at these weights
        self.checkpoints: list[WarmupCheckpoint] = read_checkpoints(stage.lake.local(stage.warmup))
        self._stack = ExitStack()
        self._engine: GradientEngine | None = None
        self._start: dict[str, torch.Tensor] = {}
        self._remembered: tuple[Any, Any] = (None, None)

    def close(self) -> None:
        """Give the model back."""
        self._stack.close()

    def at(self, checkpoint: WarmupCheckpoint | None) -> "GradientEngine":
        """The gradient engine with its parameters at a checkpoint, or (None) where fine-tuning starts."""
        if self._engine is None:
            with uncounted():  # else the first user would pay for the others
                self._engine = self._build()
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self._engine.model, checkpoint.lora if checkpoint else self._start)
        return self._engine

    def _build(self) -> "GradientEngine":
        from peft import get_peft_model_state_dict

        peft_model = self._stack.enter_context(self.stage.adapted())
        self._start = {name: value.clone() for name, value in get_peft_model_state_dict(peft_model).items()}
        return gradient_engine(self.stage, peft_model)

    def remember(self, key: Any, make: Callable[[], Value]) -> Value:
        """What was made last under this key, else what `make` gives: for what several partitions ask for in turn."""
        if self._remembered[0] != key:
            self._remembered = (None, None)  # before the next one is made, as it may be large
            self._remembered = (key, make())
        return self._remembered[1]

    def projection(self, engine: "GradientEngine") -> "Projection":
        """The sketch of the settings, or exact features. Raises UnsuitableSetting where a row would have more
        dimensions than an index takes."""
        from prism_assets.gradients.sketch import ExactFeatures, Sketch

        features = self.stage.settings.features
        if features.sketch_dim == "exact":
            width = engine.num_parameters * len(self.checkpoints)
            if width > MOST_INDEX_DIMENSIONS:
                raise UnsuitableSetting(
                    f"features.sketch_dim exact makes rows of {width:,} dimensions ({len(self.checkpoints)} x the "
                    f"adapter's {engine.num_parameters:,} parameters), and an index takes {MOST_INDEX_DIMENSIONS:,} "
                    "at most: set a number, and selection.rerank for exact scores at the top of the ranking"
                )
            return ExactFeatures(engine.parameter_shapes)
        return Sketch(features.sketch_dim, features.seed)

    def preconditioner(self, checkpoint: WarmupCheckpoint, kind: str | None = None) -> "Preconditioner":
        """The frozen optimiser state of a checkpoint in a form (default: the one that the settings name)."""
        from prism_assets.gradients.preconditioner import Moments, Preconditioner

        moments = {name: Moments(checkpoint.exp_avg[name], checkpoint.exp_avg_sq[name]) for name in checkpoint.exp_avg}
        return Preconditioner.build(
            kind or self.stage.settings.features.optimizer,
            moments,
            step=checkpoint.optimizer_step,
            betas=checkpoint.betas,
            eps=checkpoint.eps,
        )

    def candidate_rows(
        self,
        examples: Sequence[Any],
        progress: Callable[[int], None] | None = None,
        projections: "Sequence[Projection] | None" = None,
    ) -> "list[FeatureRows]":
        """The preconditioned rows of examples at each checkpoint, sketched or as `projections` (one a checkpoint) make
        them. `progress` is called with the number of examples done, over all passes."""
        passes: list[FeatureRows] = []
        for position, checkpoint in enumerate(self.checkpoints):
            engine = self.at(checkpoint)
            before = position * len(examples)
            passes.append(
                engine.feature_rows(
                    examples,
                    sketch=self.projection(engine) if projections is None else projections[position],
                    preconditioner=self.preconditioner(checkpoint),
                    progress=None if progress is None else (lambda done, _, b=before: progress(b + done)),
                )
            )
            if progress is not None:
                progress(before + len(examples))
        return passes


@contextmanager
def gradient_pass(stage: Stage) -> Iterator[GradientPass]:
    """A `GradientPass` that gives the model back at the end."""
    work = GradientPass(stage)
    try:
        yield work
    finally:
        work.close()
