"""The one schema of `prism.yaml`.

Environment variables override the file: `PRISM_SELECTION__BUDGET=10%` sets `selection.budget`. Relative paths are
relative to the file that names them. `PRISM_CONFIG` names the file where no other is given.
"""

import difflib
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

DEFAULT_FILE = "prism.yaml"
STRATEGIES = (
    *("prism", "uniform", "less", "prism-unit"),  # one direction
    *("prism-cover", "prism-round-robin", "less-max"),  # several
    *("prism-mmr",),  # one direction, and candidates among each other
    *("bm25", "rds"),  # texts or hidden states, no gradients
    *("random", "length", "perplexity", "full"),  # no targets
)
# Variables of ours that override nothing.
_NO_SETTINGS = {"PRISM_CONFIG", "PRISM_REAL_DATA"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")


class SettingsError(Exception):
    """`prism.yaml` (or an environment variable) must be changed; the message says where and how."""


class _Section(BaseModel):
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


class ModelSettings(_Section):
    """The causal language model, from the Hugging Face hub or from a folder."""

    name: str = "Qwen/Qwen3-0.6B"
    revision: str = "main"
    adapter: str | None = Field(None, description="a PEFT LoRA folder to start from; its LoRA settings are then used")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on a GPU, else float32")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = Field(False, description="runs code that comes with the model: leave it off")


class LoraSettings(_Section):
    """The low-rank adapter that is trained, and whose parameters carry the gradients."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    target_modules: str | tuple[str, ...] = "all-linear"
    rslora: bool = False


class TokenizationSettings(_Section):
    """How records become tokens."""

    max_length: int = Field(1024, ge=8)
    template: str = Field("auto", description="auto, chat, plain, or the text of a Jinja chat template")
    separator: str = Field("\n", description="between prompt and completion where no chat template is used")


class TrainingSettings(_Section):
    """Fine-tuning on what was selected."""

    epochs: float = Field(3.0, gt=0)
    steps: int | None = Field(None, ge=1, description="the same number of optimiser steps for every strategy")
    batch_size: int = Field(16, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    # Left out of what is dumped: where losses are shown is no part of what an adapter is.
    report_to: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], AfterValidator(_installed)] = Field(
        (), exclude=True, description="trackers that get the loss and learning rate of every step"
    )


class WarmupSettings(_Section):
    """The short LoRA training whose checkpoints the gradients are taken at. Pinned until `generation` is raised."""

    share: float = Field(0.05, gt=0, le=1)
    min_rows: int = Field(64, ge=1, description="at least so many rows are sampled where the pool has them")
    epochs: float = Field(4.0, gt=0)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(2e-5, gt=0)
    checkpoints: int = Field(1, ge=1)
    generation: int = Field(1, ge=1)
    seed: int = 0


class FeatureSettings(_Section):
    """What is stored of each candidate's gradient."""

    optimizer: Literal["sgd", "adam", "adam_step", "adam_less"] = "adam"
    sketch_dim: Annotated[int, Field(ge=1)] | Literal["exact"] = Field(
        4096, description="dimensions per checkpoint; exact: no sketch"
    )
    seed: int = 0
    token_budget: int | None = Field(None, ge=1, description="tokens in a batch; null: found automatically")


class CandidateSettings(_Section):
    """Where candidates arrive."""

    inbox: Path = Path("data/candidates")
    at_rest_seconds: float = Field(2.0, ge=0, description="a file is taken once it has not changed for so long")


class TargetSettings(_Section):
    """One capability (or repair) to select for: a few target examples and a held-out evaluation file."""

    examples: Path
    eval: Path


class PreferenceSettings(_Section):
    """How the model's preference weights the targets."""

    temperature: float | None = Field(None, gt=0, description="null: 1, and for pairs a robust scale of the margins")
    score: Literal["mean", "sum"] = Field(
        "mean", description="mean or sum of a target's token log-probabilities; sum for plain targets only"
    )
    fisher_damping: float | None = Field(
        None,
        gt=0,
        description="corrects directions by the damped inverse of the warm-up sample's second moment, damped by this "
        "share of its trace (0.1, say); null: no correction",
    )
    probe_step: float = Field(0.02, gt=0, description="the measured step is as long as it takes to raise J by this share, to first order, along PRISM")


class EvaluationSettings(_Section):
    """How an adapter is judged on the held-out file."""

    max_new_tokens: int = Field(128, ge=1)
    batch_size: int = Field(32, ge=1)
    benchmarks: Annotated[tuple[str, ...], AfterValidator(_harness_installed)] = Field(
        (), description="tasks of lm-eval: names, or paths of task files (.yaml)"
    )
    benchmark_limit: int | None = Field(None, ge=1, description="documents of each task at most; null: all")


class TrustSettings(_Section):
    """How much `prism trust` measures; what each figure costs is in docs/operations.md."""

    candidates: int = Field(48, ge=8, description="candidates on which a step of their own is taken")
    random_steps: int = Field(8, ge=1, description="random steps of the model after which the weights are formed anew")
    held_out: int = Field(128, ge=1, description="at most so many held-out records are looked at after each step")
    datamodel_subsets: Annotated[int, Field(ge=8)] | Literal[0] = Field(
        32, description="short fine-tunings on random subsets; 0: none"
    )
    datamodel_rows: int = Field(128, ge=16, description="candidates of which each subset holds half")
    seed: int = 0


class ExperimentSettings(_Section):
    """`prism experiment`: how often the comparison of strategies is repeated."""

    splits: int = Field(3, ge=1, description="draws of targets and held-out records; the first is the files as they are")
    redraw: Literal["apart", "together"] = Field(
        "apart", description="apart: each file by itself, with replacement; together: both files' records dealt anew"
    )
    seeds: tuple[int, ...] | None = Field(None, min_length=1, description="of fine-tuning in each split; null: `seeds`")
    strategies: tuple[Literal[STRATEGIES], ...] | None = Field(
        None, min_length=1, description="null: `strategies`; uniform, less and random are always added"
    )


class StorageSettings(_Section):
    """Where results live."""

    root: Path = Path("prism-lake")
    report: Path = Path("report")


class Budget(BaseModel):
    """How much is selected: rows, a share of the canonical live rows, or completion tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["rows", "share", "tokens"]
    amount: float = Field(gt=0)

    @model_validator(mode="after")
    def _at_most_everything(self) -> "Budget":
        if self.kind == "share" and self.amount > 1:
            raise ValueError("a share is at most 1")
        return self

    def __str__(self) -> str:
        if self.kind == "share":
            return f"{self.amount * 100:g}%"
        return f"{self.amount:.0f}{' tokens' if self.kind == 'tokens' else ''}"


def parse_budget(value: Any) -> Any:
    """`500` (rows), `"5%"` (share of the live pool) or `"200k tokens"`; raises ValueError with these forms."""
    if isinstance(value, Budget | dict):
        return value
    text = str(value).strip().lower().replace("_", "").replace(",", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[km]?)\s*(tokens?|rows?)?", text)
    if not match:
        raise ValueError(f"{value!r} is no budget: write 500 (rows), 5% (share of the pool) or 200k tokens")
    number, unit, noun = float(match[1]), match[2], match[3] or ""
    if unit == "%":
        if noun or not 0 < number <= 100:
            raise ValueError(f"{value!r} is no share of the pool: write a percentage above 0% and up to 100%")
        return Budget(kind="share", amount=number / 100)
    number *= {"": 1, "k": 1e3, "m": 1e6}[unit]
    if number < 1 or number != int(number):
        raise ValueError(f"{value!r} is no whole number of at least 1")
    return Budget(kind="tokens" if noun.startswith("token") else "rows", amount=number)


class SelectionSettings(_Section):
    """How the ranking is cut."""

    budget: Annotated[Budget, BeforeValidator(parse_budget)] = Budget(kind="share", amount=0.05)
    seed: int = 0
    rerank: float = Field(
        0.0,
        ge=0,
        description="strategies with one direction score the top of their ranking again without a sketch: so many "
        "budgets' worth of rows (4 is plenty); 0: off",
    )


def _safe_name(name: str) -> str:
    if not _NAME.match(name):
        raise ValueError("a target's name is made of letters, digits, '_', '-' and '.', and starts with one of the first")
    return name


class Settings(_Section):
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
    strategies: tuple[Literal[STRATEGIES], ...] = Field(
        ("prism", "prism-cover", "uniform", "less", "random"), min_length=1
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    storage: StorageSettings = StorageSettings()
    trust: TrustSettings = TrustSettings()

    @model_validator(mode="after")
    def _fisher_needs_a_diagonal(self) -> "Settings":
        if self.preference.fisher_damping is not None and self.features.optimizer not in ("sgd", "adam"):
            raise ValueError(
                f"preference.fisher_damping needs features.optimizer sgd or adam: {self.features.optimizer} is not linear "
                "in the gradient"
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


def config_path(given: str | os.PathLike | None = None) -> Path:
    """The file to read: the one given, else `PRISM_CONFIG`, else `prism.yaml` here."""
    return Path(given or os.environ.get("PRISM_CONFIG") or DEFAULT_FILE).expanduser().resolve()


def load_settings(given: str | os.PathLike | None = None) -> Settings:
    """Read, override from the environment, validate, and make paths absolute.

    Raises SettingsError that names the file, the key and the mend.
    """
    path = config_path(given)
    if not path.is_file():
        raise SettingsError(f"There is no {path}. `prism init` writes a commented one; --config or PRISM_CONFIG name another.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold keys and values at its top, such as `targets:`; it holds {type(content).__name__}.")
    return from_mapping(content, path)


class _StrictLoader(yaml.SafeLoader):
    """YAML's plain types; a key that stands twice is an error, where PyYAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` stands there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def from_mapping(content: dict[str, Any], path: Path) -> Settings:
    """Settings from the content of the file at `path`. Raises SettingsError."""
    try:
        settings = Settings(**_overridden(content))
    except ValidationError as error:
        raise SettingsError("\n".join([f"{path} needs a change:", *map(_explain, error.errors())])) from error
    except TypeError as error:  # a key that is no string
        raise SettingsError(f"{path}: every key at the top must be a word ({error}).") from error
    settings = _absolute(settings, path.parent)
    _require_folders(settings, path)
    return settings


def _require_folders(settings: Settings, path: Path) -> None:
    """Raise SettingsError where a file stands in the place of a folder."""
    folders = {
        "candidates.inbox": settings.candidates.inbox,
        "storage.root": settings.storage.root,
        "storage.report": settings.storage.report,
    }
    for key, folder in folders.items():
        there = next(one for one in (folder, *folder.parents) if one.exists())
        if not there.is_dir():
            raise SettingsError(f"{path} needs a change:\n  {key}: {there} is a file; name a folder, there or to be made.")


def _overridden(content: dict[str, Any]) -> dict[str, Any]:
    """The content with `PRISM_<KEY>__<KEY>…` from the environment laid over it; values are read as YAML."""
    for name, text in sorted(os.environ.items()):
        keys = name.removeprefix("PRISM_").lower().split("__")
        if not name.startswith("PRISM_") or name in _NO_SETTINGS:
            continue
        section = Settings.model_fields.get(keys[0])
        known = getattr(section.annotation, "model_fields", None) if section and len(keys) > 1 else None
        if section is None or (known is not None and keys[1] not in known):
            raise SettingsError(f"The environment variable {name} names no key of prism.yaml; {_nearest_variable(name)}")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SettingsError(f"The environment variable {name} is not YAML: {error}") from error
        for key in reversed(keys):
            value = {key: value}
        content = _merge(content, value)
    return content


def _nearest_variable(name: str) -> str:
    """Advice on a variable whose name fits no key: the nearest one that does."""
    known = [f"PRISM_{section}".upper() for section in Settings.model_fields]
    for section, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Section):
            known += [f"PRISM_{section}__{key}".upper() for key in field.annotation.model_fields]
    by_flat = {one.replace("__", "_"): one for one in known} | {f"PRISM_{one.split('__')[-1]}": one for one in known if "__" in one}
    near = difflib.get_close_matches(name.upper().replace("__", "_"), by_flat, n=1, cutoff=0.6)
    return f"did you mean {by_flat[near[0]]}?" if near else "a key of a section is written PRISM_SECTION__KEY."


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: _merge(below.get(key), value) for key, value in above.items()}
    return above


def _absolute(settings: Settings, folder: Path) -> Settings:
    def at(path: Path) -> Path:
        return (folder / path.expanduser()).resolve()

    def local(name: str | None) -> str | None:
        """A model folder is written like a path (./x, ../x, /x, ~/x) or exists; everything else is a hub name."""
        if name and (name.startswith((".", "/", "~")) or (folder / name).is_dir()):
            return str(at(Path(name)))
        return name

    return settings.model_copy(
        update={
            "model": settings.model.model_copy(
                update={"name": local(settings.model.name), "adapter": local(settings.model.adapter)}
            ),
            "candidates": settings.candidates.model_copy(update={"inbox": at(settings.candidates.inbox)}),
            "targets": {
                name: TargetSettings(examples=at(target.examples), eval=at(target.eval))
                for name, target in settings.targets.items()
            },
            "evaluation": settings.evaluation.model_copy(
                update={
                    "benchmarks": tuple(
                        str(at(Path(one))) if one.endswith((".yaml", ".yml")) else one for one in settings.evaluation.benchmarks
                    )
                }
            ),
            "storage": StorageSettings(root=at(settings.storage.root), report=at(settings.storage.report)),
        }
    )


def _explain(error: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _keys_beside(error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        advice = f"did you mean `{near[0]}`?" if near else f"known here: {', '.join(known)}."
        return f"  {place}: unknown key; {advice}"
    if error["type"] == "missing":
        return f"  {place}: is missing."
    given = repr(error.get("input"))
    shown = "" if isinstance(error.get("input"), dict) else f" (given: {given[:80]})"
    return f"  {place or 'top'}: {error['msg'].removeprefix('Value error, ')}{shown}."


def _keys_beside(location: tuple[Any, ...]) -> list[str]:
    """The known keys at the level of the last part of a location."""
    level: Any = Settings
    for part in location[:-1]:
        if level is Settings and part == "targets":
            level = "names"
        elif level == "names":
            level = TargetSettings
        else:
            level = level.model_fields[part].annotation
    return sorted(level.model_fields)
