"""The one schema of `prism.yaml`."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from prism_assets.settings.budget import Budget, parse_budget

STRATEGIES = (
    *("prism", "uniform", "less", "prism-unit"),  # one direction
    *("prism-cover", "prism-round-robin", "less-max"),  # several
    *("prism-mmr",),  # one direction, and candidates among each other
    *("bm25", "rds"),  # texts or hidden states, no gradients
    *("random", "length", "perplexity", "full"),  # no targets
)


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")


class Section(BaseModel):
    # Defaults are validated too, so that a default of 32 and a given 32 are the same float in a fingerprint.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _installed(trackers: tuple[str, ...]) -> tuple[str, ...]:
    """Said before any work: a tracker that is not there would stop a run at its first training step."""
    for name in trackers:
        if find_spec(name) is None:
            raise ValueError(f"{name} is not installed: `pip install {name}`, or leave it out")
    return trackers


def _harness_installed(tasks: tuple[str, ...]) -> tuple[str, ...]:
    if tasks and find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: `pip install 'prism-assets[benchmarks]'`, or leave benchmarks out")
    return tasks


class ModelSettings(Section):
    """The causal language model, from the Hugging Face hub or from a folder."""

    name: str = "Qwen/Qwen3-0.6B"
    revision: str = "main"
    adapter: str | None = Field(
        default=None, description="a PEFT LoRA folder to start from; its LoRA settings are then used"
    )
    # Left out of what is dumped: the adapter is what its files are, whatever its base is called.
    adapter_base: str | None = Field(
        default=None,
        exclude=True,
        description="the base_model_name_or_path of `adapter`, where that is `name` by another name",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on a GPU, else float32"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = Field(default=False, description="runs code that comes with the model: leave it off")


class LoraSettings(Section):
    """The low-rank adapter that is trained, and whose parameters carry the gradients."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear",
        description="names of modules or their ends, or a regular expression; all-linear: every linear layer of the text "
        "decoder but the output embeddings, routed experts and their routers",
    )
    rslora: bool = False
    exclude_modules: Annotated[str, Field(min_length=1)] | tuple[str, ...] = Field(
        default=(), description="modules that target_modules names and that are left as they are"
    )
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = Field(
        default=None, description="the decoder layers that are adapted, numbered from 0; null: all"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the adapter's inputs, in training alone")

    @model_serializer(mode="wrap")
    def _as_before_unless_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is dumped names an adapter in a lake, so settings that came later count where they are not the default."""
        later = {"exclude_modules": (), "layers": None, "dropout": 0.0}
        return {key: value for key, value in dump(self).items() if key not in later or getattr(self, key) != later[key]}

    @field_validator("layers")
    @classmethod
    def _in_order(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """[2, 1] and [1, 2] are the same layers, and the same adapter."""
        return None if layers is None else tuple(sorted(set(layers)))


class TokenizationSettings(Section):
    """How records become tokens."""

    max_length: int = Field(default=1024, ge=8)
    template: str = Field(default="auto", description="auto, chat, plain, or the text of a Jinja chat template")
    separator: str = Field(default="\n", description="between prompt and completion where no chat template is used")


class TrainingSettings(Section):
    """Fine-tuning on what was selected."""

    epochs: float = Field(default=3.0, gt=0)
    steps: int | None = Field(default=None, ge=1, description="the same number of optimiser steps for every strategy")
    batch_size: int = Field(default=16, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=2e-4, gt=0)
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    # Left out of what is dumped: where losses are shown is no part of what an adapter is.
    report_to: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], AfterValidator(_installed)] = Field(
        default=(), exclude=True, description="trackers that get the loss and learning rate of every step"
    )


class WarmupSettings(Section):
    """The short LoRA training whose checkpoints the gradients are taken at. Pinned until `generation` is raised."""

    share: float = Field(default=0.05, gt=0, le=1)
    min_rows: int = Field(default=64, ge=1, description="at least so many rows are sampled where the pool has them")
    epochs: float = Field(default=4.0, gt=0)
    batch_size: int = Field(default=16, ge=1)
    learning_rate: float = Field(default=2e-5, gt=0)
    checkpoints: int = Field(default=1, ge=1)
    generation: int = Field(default=1, ge=1)
    seed: int = 0


class FeatureSettings(Section):
    """What is stored of each candidate's gradient."""

    optimizer: Literal["sgd", "adam", "adam_step", "adam_less"] = "adam"
    sketch_dim: Annotated[int, Field(ge=1)] | Literal["exact"] = Field(
        default=4096, description="dimensions per checkpoint; exact: no sketch"
    )
    seed: int = 0
    token_budget: int | None = Field(default=None, ge=1, description="tokens in a batch; null: found automatically")


class CandidateSettings(Section):
    """Where candidates arrive."""

    inbox: Path = Path("data/candidates")
    at_rest_seconds: float = Field(default=2.0, ge=0, description="a file is taken once it has not changed for so long")


class TargetSettings(Section):
    """One capability (or repair) to select for: a few target examples and a held-out evaluation file."""

    examples: Path
    eval: Path


class PreferenceSettings(Section):
    """How the model's preference weights the targets."""

    temperature: float | None = Field(
        default=None, gt=0, description="null: 1, and for pairs a robust scale of the margins"
    )
    score: Literal["mean", "sum"] = Field(
        default="mean", description="mean or sum of a target's token log-probabilities; sum for plain targets only"
    )
    fisher_damping: float | None = Field(
        default=None,
        gt=0,
        description="corrects directions by the damped inverse of the warm-up sample's second moment, damped by this "
        "share of its trace (0.1, say); null: no correction",
    )
    probe_step: float = Field(
        default=0.02,
        gt=0,
        description="the measured step is as long as it takes to raise J by this share, to first order, along PRISM",
    )


class EvaluationSettings(Section):
    """How an adapter is judged on the held-out file."""

    max_new_tokens: int = Field(default=128, ge=1)
    batch_size: int = Field(default=32, ge=1)
    benchmarks: Annotated[tuple[str, ...], AfterValidator(_harness_installed)] = Field(
        default=(), description="tasks of lm-eval: names, or paths of task files (.yaml)"
    )
    benchmark_limit: int | None = Field(default=None, ge=1, description="documents of each task at most; null: all")


class TrustSettings(Section):
    """How much `prism trust` measures; what each figure costs is in docs/operations.md."""

    candidates: int = Field(default=48, ge=8, description="candidates on which a step of their own is taken")
    random_steps: int = Field(
        default=8, ge=1, description="random steps of the model after which the weights are formed anew"
    )
    held_out: int = Field(
        default=128, ge=1, description="at most so many held-out records are looked at after each step"
    )
    datamodel_subsets: Annotated[int, Field(ge=8)] | Literal[0] = Field(
        default=32, description="short fine-tunings on random subsets; 0: none"
    )
    datamodel_rows: int = Field(default=128, ge=16, description="candidates of which each subset holds half")
    seed: int = 0


class ExperimentSettings(Section):
    """`prism experiment`: how often the comparison of strategies is repeated."""

    splits: int = Field(
        default=3, ge=1, description="draws of targets and held-out records; the first is the files as they are"
    )
    redraw: Literal["apart", "together"] = Field(
        default="apart",
        description="apart: each file by itself, with replacement; together: both files' records dealt anew",
    )
    seeds: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="of fine-tuning in each split; null: `seeds`"
    )
    strategies: tuple[Literal[STRATEGIES], ...] | None = Field(  # pyright: ignore[reportInvalidTypeForm]
        default=None, min_length=1, description="null: `strategies`; uniform, less and random are always added"
    )


class StorageSettings(Section):
    """Where results live."""

    root: Path = Path("prism-lake")
    report: Path = Path("report")


class SelectionSettings(Section):
    """How the ranking is cut."""

    budget: Annotated[Budget, BeforeValidator(parse_budget)] = Budget(kind="share", amount=0.05)
    seed: int = 0
    rerank: float = Field(
        default=0.0,
        ge=0,
        description="strategies with one direction score the top of their ranking again without a sketch: so many "
        "budgets' worth of rows (4 is plenty); 0: off",
    )


def _safe_name(name: str) -> str:
    if not _NAME.match(name):
        raise ValueError(
            "a target's name is made of letters, digits, '_', '-' and '.', and starts with one of the first"
        )
    return name


class ExecutionSettings(Section):
    """What the work may take. No result depends on it, up to the rounding of larger or smaller matrix products."""

    memory: Literal["auto"] | ByteSize = Field(
        default="auto",
        description="what a process may hold where it computes, the model included: 6GB, say; auto: what is free, less a "
        "tenth. Batches are halved and activations recomputed to keep to it",
    )


class Settings(Section):
    """All of `prism.yaml`. Every key is optional but the data: `candidates.inbox` has a default, `targets` none."""

    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    tokenization: TokenizationSettings = TokenizationSettings()
    warmup: WarmupSettings = WarmupSettings()
    features: FeatureSettings = FeatureSettings()
    candidates: CandidateSettings = CandidateSettings()
    targets: dict[Annotated[str, AfterValidator(_safe_name)], TargetSettings] = Field(min_length=1)
    preference: PreferenceSettings = PreferenceSettings()
    selection: SelectionSettings = SelectionSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    experiment: ExperimentSettings = ExperimentSettings()
    strategies: tuple[Literal[STRATEGIES], ...] = Field(  # pyright: ignore[reportInvalidTypeForm]
        default=("prism", "prism-cover", "uniform", "less", "random"), min_length=1
    )
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    storage: StorageSettings = StorageSettings()
    trust: TrustSettings = TrustSettings()
    execution: ExecutionSettings = ExecutionSettings()

    @model_validator(mode="after")
    def _fisher_needs_a_diagonal(self) -> "Settings":
        if self.preference.fisher_damping is not None and self.features.optimizer not in ("sgd", "adam"):
            raise ValueError(
                f"preference.fisher_damping needs features.optimizer sgd or adam: {self.features.optimizer} is not linear "
                "in the gradient"
            )
        return self

    @model_validator(mode="after")
    def _one_adapter(self) -> "Settings":
        if self.model.adapter_base is not None and self.model.adapter is None:
            raise ValueError("model.adapter_base is about model.adapter, which is not set: leave it out")
        own = [name for name in ("exclude_modules", "layers", "dropout") if getattr(self.lora, name)]
        if self.model.adapter is not None and own:
            raise ValueError(f"lora.{own[0]} has no effect beside model.adapter, whose own configuration counts")
        return self

    @model_validator(mode="after")
    def _no_repetition(self) -> "Settings":
        for section, place in ((self, ""), (self.experiment, "experiment.")):
            for name in ("strategies", "seeds"):
                values = getattr(section, name) or ()
                if len(set(values)) != len(values):
                    raise ValueError(f"{place}{name} names something twice: {', '.join(map(str, values))}")
        return self
