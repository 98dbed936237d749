"""The training that the settings ask for, as numbers that every trainer has a name for."""

from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.errors import CannotExport

if TYPE_CHECKING:
    from prism_assets.settings import Settings


class Plan(NamedTuple):
    """Model, adapter and training of a project's settings; what differs from tool to tool is only what it is called."""

    model: str  # a hub name, or the whole path of a folder
    revision: str | None  # None for a folder
    trust_remote_code: bool
    starting_adapter: str | None
    quantization: str
    dtype: str
    rank: int
    alpha: float
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers: list[int] | None
    rslora: bool
    dropout: float
    epochs: float
    steps: int | None  # in place of epochs
    warmup_steps: int
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    scheduler: str
    weight_decay: float
    max_grad_norm: float
    seed: int


def plan_of(settings: "Settings", rows: int) -> Plan:
    """The plan of a fine-tuning on so many rows."""
    import math
    from pathlib import Path

    from prism_assets.sft.trainer import Training

    model, lora, training = settings.model, settings.lora, settings.training
    found = Training(**training.model_dump())
    local = Path(model.name).is_dir()
    return Plan(
        model=str(Path(model.name).resolve()) if local else model.name,
        revision=None if local else model.revision,
        trust_remote_code=model.trust_remote_code,
        starting_adapter=_resolved(model.adapter),
        quantization=model.quantization,
        dtype=model.dtype,
        rank=lora.rank,
        alpha=_whole(lora.alpha),
        target_modules=_listed(lora.target_modules),
        exclude_modules=_listed(lora.exclude_modules),
        layers=None if lora.layers is None else list(lora.layers),
        rslora=lora.rslora,
        dropout=lora.dropout,
        epochs=_whole(training.epochs),
        steps=training.steps,
        warmup_steps=math.ceil(training.warmup_ratio * found.number_of_steps(rows)),
        batch_size=training.batch_size,
        gradient_accumulation=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        scheduler=training.scheduler,
        weight_decay=training.weight_decay,
        max_grad_norm=found.max_grad_norm,
        seed=settings.seeds[0],
    )


def whole_alpha(plan: Plan, tool: str) -> int:
    """`lora.alpha` for a tool that takes whole numbers alone. Raises CannotExport where it is none."""
    if not float(plan.alpha).is_integer():
        raise CannotExport(f"lora.alpha is {plan.alpha:g}, and {tool} takes whole numbers: use --format trl.")
    return int(plan.alpha)


def without_nothing(options: dict[str, Any]) -> dict[str, Any]:
    """Those options that say something: None, False, empty texts and lists are what a tool does unasked."""
    return {name: value for name, value in options.items() if value not in (None, False, "", [], ())}


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number


def _listed(names: "str | tuple[str, ...]") -> str | list[str]:
    return names if isinstance(names, str) else list(names)


def _resolved(name: str | None) -> str | None:
    from pathlib import Path

    return str(Path(name).resolve()) if name and Path(name).is_dir() else name
