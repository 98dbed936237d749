"""The one schema of `prism.yaml`."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ByteSize,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from prism_assets.compat import MOST_INDEX_DIMENSIONS
from prism_assets.settings.budget import Budget
from prism_assets.settings.method import CurvatureSettings, PreferenceSettings, SelectionSettings, TargetSettings
from prism_assets.settings.protection import LimitSettings, UiSettings
from prism_assets.settings.section import ColumnName, Section

STRATEGIES = (
    *("prism", "uniform", "less", "prism-unit", "prism-sigmoid"),  # one direction
    *("prism-cover", "prism-round-robin", "less-max"),  # several
    *("prism-mmr",),  # one direction, and candidates among each other
    *("bm25", "rds"),  # texts or hidden states, no gradients
    *("random", "length", "perplexity", "full"),  # no targets
    "oracle",  # labels
)


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")


def _installed(trackers: tuple[str, ...]) -> tuple[str, ...]:
    """Checked before any work: a tracker that is not installed would stop a run at its first training step."""
    for name in trackers:
        if find_spec(name) is None:
            raise ValueError(f"{name} is not installed: `pip install {name}`, or leave it out")
    return trackers


def _harness_installed(tasks: tuple[str, ...]) -> tuple[str, ...]:
    if tasks and find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: `pip install 'prism-assets[benchmarks]'`, or leave benchmarks out")
    return tasks


def _bitsandbytes_installed(quantization: str) -> str:
    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"bitsandbytes is not installed, which makes {quantization} of a model: "
            "`pip install 'prism-assets[quantized]'`, or leave quantization out"
        )
    return quantization


class ModelSettings(Section):
    """The causal language model, from the Hugging Face hub or from a folder."""

    name: str = Field(
        default="Qwen/Qwen3-0.6B", description="A model on the Hugging Face hub, or a folder; safetensors only."
    )
    revision: str = Field(default="main", description="The branch, tag or commit of a model on the hub.")
    adapter: str | None = Field(
        default=None,
        description="A PEFT LoRA folder to start from, whose LoRA settings are then used; null: a fresh adapter.",
    )
    # Left out of what is dumped: the adapter is what its files are, whatever its base is called.
    adapter_base: str | None = Field(
        default=None,
        exclude=True,
        description="The base_model_name_or_path of `adapter`, where that is `name` by another name; null: the same.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="The type of the base weights; auto: bfloat16 on a GPU, else float32. On CPUs that compute in "
        "bfloat16 it saves time at a small change of the ranking (docs/operations.md).",
    )
    quantization: Annotated[Literal["none", "nf4", "int8"], AfterValidator(_bitsandbytes_installed)] = Field(
        default="none",
        description="Whether the linear layers are quantised when they are loaded, by bitsandbytes (QLoRA): nf4, in 4 "
        "bits, or int8; none: the checkpoint as it is, which may be quantised by bitsandbytes already.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the model runs; auto: a GPU where torch finds one, else the CPU."
    )
    trust_remote_code: bool = Field(
        default=False, description="Whether Python code that comes with the model is run: leave it off."
    )

    @model_serializer(mode="wrap")
    def _as_before_unless_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is dumped says whether assets are stale, so a setting that came later counts where it is not the
        default."""
        return {key: value for key, value in dump(self).items() if key != "quantization" or value != "none"}


class LoraSettings(Section):
    """The low-rank adapter that is trained, and whose parameters the gradients are taken by."""

    rank: int = Field(default=16, ge=1, description="The rank r of the factors A [r, in] and B [out, r].")
    alpha: float = Field(
        default=32, gt=0, description="The product B A is scaled by alpha / rank, or by alpha / √rank with rslora."
    )
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear",
        description="Names of modules or their ends, or a regular expression; all-linear: every linear layer of the "
        "text decoder but the output embeddings, routed experts and their routers.",
    )
    rslora: bool = Field(default=False, description="Whether the scaling is that of rank-stabilised LoRA.")
    exclude_modules: Annotated[str, Field(min_length=1)] | tuple[str, ...] = Field(
        default=(), description="Modules that target_modules names and that are left as they are."
    )
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = Field(
        default=None, description="The decoder layers that are adapted, numbered from 0; null: all."
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="The share of the adapter's inputs that is dropped in training; none is elsewhere.",
    )

    @model_serializer(mode="wrap")
    def _as_before_unless_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is dumped names an adapter in a lake, so settings that came later count where they are not the
        default."""
        later = {"exclude_modules": (), "layers": None, "dropout": 0.0}
        return {key: value for key, value in dump(self).items() if key not in later or getattr(self, key) != later[key]}

    @field_validator("layers")
    @classmethod
    def _in_order(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        """[2, 1] and [1, 2] are the same layers, and the same adapter."""
        return None if layers is None else tuple(sorted(set(layers)))


class TokenizationSettings(Section):
    """How records become tokens."""

    max_length: int = Field(
        default=1024,
        ge=8,
        description="Tokens of an example at most; a longer one loses the start of its prompt, never its completion.",
    )
    template: str = Field(
        default="auto",
        description="auto (the tokenizer's chat template where it has one, else plain), chat, plain, or the text of a "
        "Jinja chat template.",
    )
    separator: str = Field(
        default="\n", description="The text between prompt and completion where no chat template is used."
    )


class TrainingSettings(Section):
    """Fine-tuning on what was selected, with AdamW."""

    epochs: float = Field(default=3.0, gt=0, description="Passes over the selected rows.")
    steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimiser steps, the same number for every strategy, in place of epochs; null: by epochs.",
    )
    batch_size: int = Field(default=16, ge=1, description="Examples in a batch.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Batches whose gradients make one optimiser step.")
    learning_rate: float = Field(default=2e-4, gt=0, description="The highest learning rate.")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear", description="The schedule of the learning rate over the steps."
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, lt=1, description="The share of steps over which the learning rate rises to its highest."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    # Left out of what is dumped: where losses are shown is no part of what an adapter is.
    report_to: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], AfterValidator(_installed)] = Field(
        default=(), exclude=True, description="Trackers that get the loss and learning rate of every step."
    )


class WarmupSettings(Section):
    """The short LoRA training whose checkpoints the gradients are taken at. Pinned until `generation` is raised."""

    share: float = Field(default=0.05, gt=0, le=1, description="The share of the pool that is sampled for it.")
    min_rows: int = Field(default=64, ge=1, description="The fewest rows that are sampled, where the pool has so many.")
    epochs: float = Field(default=4.0, gt=0, description="Passes over the sample.")
    batch_size: int = Field(default=16, ge=1, description="Examples in a batch.")
    learning_rate: float = Field(default=2e-5, gt=0, description="The highest learning rate.")
    checkpoints: int = Field(
        default=1,
        ge=1,
        description="Checkpoints, evenly spaced, the last step included; features grow in proportion to their number.",
    )
    generation: int = Field(
        default=1,
        ge=1,
        description="Raise it to draw a new sample from today's pool and train again; every gradient feature follows.",
    )
    seed: int = Field(
        default=0, description="The seed of the sample, of the fresh adapter and of the order of training."
    )
    optimizer_state: Path | None = Field(
        default=None,
        description="The optimiser state of the run that made model.adapter, in place of a training here: a Trainer's "
        "checkpoint with optimizer.pt, or FSDP's optimizer.bin or optimizer_0; null: the warm-up trains.",
    )

    @model_serializer(mode="wrap")
    def _as_before_unless_set(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is dumped names a scope of the lake, so a setting that came later counts where it is not the default."""
        found = dump(self)
        return {key: value for key, value in found.items() if key != "optimizer_state" or value is not None}


class FeatureSettings(Section):
    """What is stored of each candidate's gradient."""

    optimizer: Literal["sgd", "adam", "adam_step", "adam_less"] = Field(
        default="sgd",
        description="The preconditioner that a gradient goes through (docs/method.md, Candidate rows); sgd: none, as "
        "PRISM is published.",
    )
    sketch_dim: Annotated[int, Field(ge=1)] | Literal["exact"] = Field(
        default=4096,
        description="Dimensions of the sketch per checkpoint, 2 bytes each in a row; exact: no sketch.",
    )
    seed: int = Field(default=0, description="The seed of the sketch.")
    token_budget: int | None = Field(
        default=None,
        ge=1,
        description="Tokens in a batch of the gradient pass, padding included; null: 512 on a CPU, 32,768 on a GPU.",
    )


class CandidateSettings(Section):
    """Where candidates arrive."""

    inbox: Path = Field(
        default=Path("data/candidates"),
        description="The folder of candidate files (JSON Lines, JSON arrays, Parquet, CSV, TSV, Arrow), subfolders "
        "included.",
    )
    columns: dict[ColumnName, str] = Field(
        default={},
        exclude=True,
        description="By the name that is expected (`prompt`, `completion`, `messages`, …) the files' own column: "
        "{prompt: question, completion: answer}; a record without such a column is rejected.",
    )
    at_rest_seconds: float = Field(
        default=2.0,
        ge=0,
        description="Seconds for which a file must not have changed before the sensor takes it.",
    )
    # Left out of what is dumped: how a file got into the inbox is no part of what is made of it.
    follow_links: bool = Field(
        default=False,
        exclude=True,
        description="Whether a symbolic link in the inbox may lead to a file outside of it.",
    )


class EvaluationSettings(Section):
    """How an adapter is evaluated on the held-out file."""

    max_new_tokens: int = Field(default=128, ge=1, description="Tokens that are generated at most for exact match.")
    batch_size: int = Field(default=32, ge=1, description="Prompts that are generated from at a time.")
    benchmarks: Annotated[tuple[str, ...], AfterValidator(_harness_installed)] = Field(
        default=(), description="Tasks of lm-eval: names, or paths of task files (.yaml)."
    )
    benchmark_limit: int | None = Field(
        default=None, ge=1, description="Documents of each benchmark task at most; null: all."
    )


class TrustSettings(Section):
    """How much `prism trust` measures; what each figure costs is in docs/operations.md."""

    candidates: int = Field(default=48, ge=8, description="Candidates on which a step of their own is taken.")
    random_steps: int = Field(
        default=8, ge=1, description="Random steps of the model after which the weights are computed again."
    )
    held_out: int = Field(default=128, ge=1, description="Held-out records at most that are evaluated after each step.")
    datamodel_subsets: Annotated[int, Field(ge=8)] | Literal[0] = Field(
        default=32, description="Short fine-tunings on random subsets; 0: none."
    )
    datamodel_rows: int = Field(default=128, ge=16, description="Candidates of which each subset holds half.")
    seed: int = Field(default=0, description="The seed of random steps, subsets and held-out records.")


class ExperimentSettings(Section):
    """`prism experiment`: how often the comparison of strategies is repeated."""

    splits: int = Field(
        default=3,
        ge=1,
        description="Draws of target examples and held-out records; the first is the files as they are.",
    )
    redraw: Literal["apart", "together"] = Field(
        default="apart",
        description="apart: each file by itself, with replacement; together: both files' records pooled and split "
        "again.",
    )
    seeds: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="The seeds of fine-tuning in each split; null: those of `seeds`."
    )
    strategies: tuple[Literal[STRATEGIES], ...] | None = Field(  # pyright: ignore[reportInvalidTypeForm]
        default=None,
        min_length=1,
        description="The strategies compared; null: those of `strategies`. uniform, less and random are always added.",
    )


class StorageSettings(Section):
    """Where results are stored."""

    root: Path = Field(default=Path("prism-lake"), description="The folder of the lake, made when first needed.")
    report: Path = Field(default=Path("report"), description="The folder of the report over all targets.")
    out: Path = Field(
        default=Path("out"),
        description="The folder of the selected rows, `<target>/<strategy>.jsonl` and `.parquet`, which `prism select` "
        "and `prism run` write.",
    )


def _safe_name(name: str) -> str:
    if not _NAME.match(name) or "..." in name:
        raise ValueError(
            "a target's name is made of letters, digits, '_', '-' and '.' (never three dots in a row, which mean a "
            "range of partitions), and starts with a letter or digit"
        )
    return name


class ExecutionSettings(Section):
    """Limits of the work. No result depends on them, up to the rounding of larger or smaller matrix products."""

    memory: Literal["auto"] | ByteSize = Field(
        default="auto",
        description="Memory that a process may use on its device, the model included, such as 6GB; auto: what is free, "
        "minus a tenth. Batches are halved and activations recomputed to keep to it.",
    )

    @property
    def memory_limit(self) -> int | None:
        """`memory` in bytes; None for as much as is free."""
        return None if self.memory == "auto" else int(self.memory)


class Settings(Section):
    """All of `prism.yaml`. Every key is optional but the data: `candidates.inbox` has a default, `targets` none."""

    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    tokenization: TokenizationSettings = TokenizationSettings()
    warmup: WarmupSettings = WarmupSettings()
    features: FeatureSettings = FeatureSettings()
    candidates: CandidateSettings = CandidateSettings()
    limits: LimitSettings = LimitSettings()
    targets: dict[Annotated[str, AfterValidator(_safe_name)], TargetSettings] = Field(
        min_length=1, description="What to select for, by name; each has `examples` and `eval`."
    )
    preference: PreferenceSettings = PreferenceSettings()
    curvature: CurvatureSettings = CurvatureSettings()
    selection: SelectionSettings = SelectionSettings()
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    experiment: ExperimentSettings = ExperimentSettings()
    strategies: tuple[Literal[STRATEGIES], ...] = Field(  # pyright: ignore[reportInvalidTypeForm]
        default=("prism", "prism-cover", "uniform", "less", "random"),
        min_length=1,
        description="The strategies that select, are fine-tuned on and are compared (docs/strategies.md).",
    )
    seeds: tuple[int, ...] = Field(
        default=(0, 1, 2), min_length=1, description="The seeds of fine-tuning; the first one's adapter is published."
    )
    train: Literal["manual", "nightly", "on_arrival"] = Field(
        default="manual",
        description="When fine-tuning and evaluation follow new selections without a hand: never, every night for "
        "those that changed, or as soon as all selections of an arrival are made. `prism run` trains in any case, "
        "`prism select` never.",
    )
    storage: StorageSettings = StorageSettings()
    trust: TrustSettings = TrustSettings()
    execution: ExecutionSettings = ExecutionSettings()
    ui: UiSettings = UiSettings()

    def budget_of(self, target: str) -> Budget:
        """How much is selected, or removed, for a target."""
        return self.targets[target].budget or self.selection.budget

    @model_validator(mode="after")
    def _oracle_has_labels(self) -> "Settings":
        without = [name for name, target in self.targets.items() if target.label is None]
        if "oracle" in (*self.strategies, *(self.experiment.strategies or ())) and without:
            raise ValueError(
                f"the strategy oracle removes the rows that a label names, and targets.{without[0]} has no label: name "
                "one (use: remove), or leave oracle out"
            )
        return self

    @model_validator(mode="after")
    def _curvature_fits_the_rows(self) -> "Settings":
        kind, optimizer = self.curvature.kind, self.features.optimizer
        if kind != "none" and optimizer not in ("sgd", "adam"):
            raise ValueError(
                f"curvature.kind {kind} needs features.optimizer sgd or adam: {optimizer} is not linear in the gradient"
            )
        if kind == "adam" and optimizer == "adam":
            raise ValueError(
                "curvature.kind adam is for features.optimizer sgd: with adam the rows have Adam's diagonal already, "
                "and it would count twice"
            )
        if kind == "ekfac" and optimizer != "sgd":
            raise ValueError(
                f"curvature.kind ekfac needs features.optimizer sgd, not {optimizer}: Kronecker factors are those of "
                "gradients as they are"
            )
        return self

    @model_validator(mode="after")
    def _rows_fit_an_index(self) -> "Settings":
        dim, checkpoints = self.features.sketch_dim, self.warmup.checkpoints
        if dim != "exact" and dim * checkpoints > MOST_INDEX_DIMENSIONS:
            raise ValueError(
                f"features.sketch_dim {dim:,} x warmup.checkpoints {checkpoints} makes rows of {dim * checkpoints:,} "
                f"dimensions, and an index takes {MOST_INDEX_DIMENSIONS:,} at most: lower one of them"
            )
        return self

    @model_validator(mode="after")
    def _row_scale_needs_a_diagonal(self) -> "Settings":
        if self.selection.row_scale != "unit" and self.features.optimizer not in ("sgd", "adam"):
            raise ValueError(
                f"selection.row_scale {self.selection.row_scale} needs features.optimizer sgd or adam: "
                f"{self.features.optimizer} is not linear in the gradient, so its rows have no length to be scaled to"
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
    def _moments_of_the_starting_adapter(self) -> "Settings":
        if self.warmup.optimizer_state is None:
            return self
        if self.model.adapter is None:
            raise ValueError(
                "warmup.optimizer_state is of the run that made model.adapter, which is not set: name the adapter"
            )
        idle = [name for name in ("epochs", "batch_size", "learning_rate") if name in self.warmup.model_fields_set]
        if idle or self.warmup.checkpoints != 1:
            name = idle[0] if idle else "checkpoints"
            raise ValueError(
                f"warmup.{name} has no effect beside warmup.optimizer_state, with which nothing is trained and "
                "gradients are taken at model.adapter as it is: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _no_repetition(self) -> "Settings":
        for section, place in ((self, ""), (self.experiment, "experiment.")):
            for name in ("strategies", "seeds"):
                values = getattr(section, name) or ()
                if len(set(values)) != len(values):
                    raise ValueError(f"{place}{name} names something twice: {', '.join(map(str, values))}")
        return self
