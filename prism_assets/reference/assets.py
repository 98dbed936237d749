"""Reference: the base model's identity, the pinned warm-up sample and the warm-up checkpoints."""

import hashlib
import json
import math
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import dagster as dg

from prism_assets import stage
from prism_assets.corpus.assets import corpus_version
from prism_assets.settings import Settings
from resources.lake import Artifact, Lake, Recipe, digest
from resources.language_model import LanguageModel, ModelIdentity

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from peft import PeftModel

BASE_VERSION = 1
SAMPLE_VERSION = 1
WARMUP_VERSION = 1

GROUP = "reference"


def lora_identity(settings: Settings) -> dict[str, Any]:
    """What the LoRA parameters depend on; with a starting adapter its own configuration counts, not `lora:`."""
    return {"adapter": True} if settings.model.adapter else settings.lora.model_dump()


@contextmanager
def adapted(
    settings: Settings, model: LanguageModel, *, seed: int = 0, state: "Mapping[str, torch.Tensor] | None" = None
) -> "Iterator[PeftModel]":
    """The base model with the adapter that the settings describe, at `state` where one is given. Loading is on no
    stopwatch."""
    lora = settings.lora
    with ExitStack() as stack:
        with stage.uncounted():
            peft_model = stack.enter_context(
                model.adapted(
                    rank=lora.rank,
                    alpha=lora.alpha,
                    target_modules=lora.target_modules,
                    rslora=lora.rslora,
                    seed=seed,
                    state=state,
                )
            )
        yield peft_model


def base_model_recipe(identity: ModelIdentity) -> Recipe:
    """The recipe of the artefact `base_model` of a model."""
    return Recipe("base_model", BASE_VERSION, inputs={"files": identity.fingerprint})


@dg.asset(group_name=GROUP, kinds={"huggingface"}, code_version=str(BASE_VERSION))
def base_model(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    lake: Lake,
    language_model: LanguageModel,
) -> dg.MaterializeResult:
    """The identity of the language model: hashes of its weights, tokenizer and starting adapter."""
    import pyarrow as pa

    identity = language_model.identify()
    recipe = base_model_recipe(identity)
    artifact = lake.find(recipe)
    computed = artifact is None
    if artifact is None:
        row = {
            "architecture": identity.architecture,
            "weights": identity.weights,
            "tokenizer": identity.tokenizer,
            "adapter": identity.adapter,
            "weight_bytes": identity.parameters_on_disk,
        }
        notes = {"name": settings.model.name, "revision": settings.model.revision}
        artifact = lake.publish_table(recipe, pa.Table.from_pylist([row]), run_id=context.run_id, notes=notes)
    lake.point(artifact, run_id=context.run_id)
    return stage.each_partition(
        context,
        lambda _: stage.Outcome(
            [artifact],
            int(computed),
            {
                "name": settings.model.name,
                "architecture": identity.architecture,
                "weight_bytes": identity.parameters_on_disk,
                "adapter": settings.model.adapter or "none",
                "rows": stage.preview(lake.read_table(artifact).to_pylist()),
            },
        ),
    )


def warmup_scope(settings: Settings, model: LanguageModel) -> str:
    """What the pinned warm-up belongs to: model, tokens, LoRA and warm-up settings with their generation, no pool."""
    return digest(
        [
            SAMPLE_VERSION,
            WARMUP_VERSION,
            model.identify().fingerprint,
            corpus_version(settings, model),
            lora_identity(settings),
            settings.warmup.model_dump(),
            str(model.torch_dtype()),
        ]
    )[:12]


@dg.asset(
    group_name=GROUP,
    kinds={"parquet"},
    code_version=str(SAMPLE_VERSION),
    deps=["live_pool"],
    check_specs=[
        dg.AssetCheckSpec(
            "sample_covers_pool",
            asset="warmup_sample",
            description="At least half of the live pool was there when the warm-up sample was drawn. Otherwise raise "
            "`warmup.generation`: a new warm-up and a new feature version follow.",
        )
    ],
)
def warmup_sample(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    lake: Lake,
    language_model: LanguageModel,
) -> dg.MaterializeResult:
    """The random share of the pool that the warm-up trains on, drawn once a generation and then kept.

    The rows are copied, so a retired shard takes nothing away. New shards do not change the sample: a new warm-up
    would make every gradient feature stale.
    """
    scope = warmup_scope(settings, language_model)
    version = corpus_version(settings, language_model)
    pool = lake.require("live_pool", None, version)
    artifact = _pinned_sample(lake, scope)
    computed = artifact is None
    if artifact is None:
        artifact = _draw_sample(settings, lake, pool, version, scope, context.run_id)
    lake.point(artifact, None, scope, context.run_id)
    eligible = set(artifact.notes["shards"])
    live = lake.read_table(pool, ["shard", "canonical_rows"]).to_pylist()
    rows = sum(row["canonical_rows"] for row in live)
    share = sum(row["canonical_rows"] for row in live if row["shard"] in eligible) / max(rows, 1)
    return stage.each_partition(
        context,
        lambda _: stage.Outcome(
            [artifact],
            int(computed),
            {
                "dagster/row_count": artifact.notes["rows"],
                "generation": settings.warmup.generation,
                "sampled_from_shards": len(eligible),
                "rows": stage.preview(lake.read_table(artifact, ["source", "prompt", "completion"]).slice(0, 8).to_pylist()),
            },
            {"sample_covers_pool": (share >= 0.5, {"share_of_live_pool": share})},
        ),
    )


def _pinned_sample(lake: Lake, scope: str) -> Artifact | None:
    """The sample of this scope; the first one drawn where the head was lost, for a new one would start everything anew."""
    drawn = [one for one in lake.artifacts("warmup_sample") if one.header["version"] == scope]
    return lake.head("warmup_sample", None, scope) or min(drawn, key=lambda one: one.header["created"], default=None)


def _draw_sample(
    settings: Settings, lake: Lake, pool: Artifact, version: str, scope: str, run_id: str
) -> Artifact:
    """The `share` of canonical rows with the smallest keyed hash, so the order of arrival does not matter."""
    import pyarrow as pa

    warmup = settings.warmup
    parts, keys = [], []
    for row in lake.read_table(pool).to_pylist():
        rows = lake.read_table(lake.require("candidates", row["shard"], version))
        excluded = set(row["excluded_rows"])
        kept = [position for position in range(rows.num_rows) if position not in excluded]
        rows = rows.take(pa.array(kept, pa.int64()))  # no row may be left
        parts.append(rows)
        keys += [
            hashlib.sha256(f"{warmup.seed}:{warmup.generation}:{one}".encode()).hexdigest()
            for one in rows["id"].to_pylist()
        ]
    everything = pa.concat_tables(parts)
    wanted = min(len(keys), max(warmup.min_rows, math.ceil(warmup.share * len(keys))))
    chosen = sorted(range(len(keys)), key=keys.__getitem__)[:wanted]
    recipe = Recipe(
        "warmup_sample",
        SAMPLE_VERSION,
        settings=warmup.model_dump(include={"share", "min_rows", "seed", "generation"}),
        inputs={"scope": scope, "pool": pool},
        version=scope,
    )
    shards = [row["shard"] for row in lake.read_table(pool, ["shard"]).to_pylist()]
    return lake.find(recipe) or lake.publish_table(
        recipe, everything.take(chosen), run_id=run_id, notes={"shards": shards}
    )


class WarmupCheckpoint(NamedTuple):
    """One point θ_k: the LoRA parameters, the learning rate that led there and AdamW's state."""

    step: int
    mean_learning_rate: float
    lora: "dict[str, torch.Tensor]"
    exp_avg: "dict[str, torch.Tensor]"
    exp_avg_sq: "dict[str, torch.Tensor]"
    optimizer_step: int
    betas: tuple[float, float]
    eps: float


def load_checkpoints(artifact: Artifact) -> list[WarmupCheckpoint]:
    """The checkpoints of a `warmup_checkpoints` artefact, in training order."""
    from safetensors.torch import load_file

    checkpoints = []
    for entry in json.loads((artifact.path / "checkpoints.json").read_text()):
        tensors = load_file(artifact.path / entry.pop("file"))
        kinds: dict[str, dict[str, torch.Tensor]] = {"lora": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, tensor in tensors.items():
            kind, _, parameter = name.partition("/")
            kinds[kind][parameter] = tensor
        entry["betas"] = tuple(entry["betas"])
        checkpoints.append(WarmupCheckpoint(**entry, **kinds))
    return checkpoints


@dg.asset(
    group_name=GROUP,
    kinds={"pytorch", "safetensors"},
    code_version=str(WARMUP_VERSION),
    deps=["base_model", "warmup_sample"],
    pool="model",
    check_specs=[
        dg.AssetCheckSpec("warmup_learned", asset="warmup_checkpoints", description="The loss fell during the warm-up.")
    ],
)
def warmup_checkpoints(
    context: dg.AssetExecutionContext,
    settings: dg.ResourceParam[Settings],
    lake: Lake,
    language_model: LanguageModel,
) -> dg.MaterializeResult:
    """LoRA warm-up on the pinned sample: the parameters at one or several checkpoints, with Adam's moments by name."""
    scope = warmup_scope(settings, language_model)
    sample = lake.require("warmup_sample", None, scope)
    recipe = Recipe(
        "warmup_checkpoints",
        WARMUP_VERSION,
        settings={
            "lora": lora_identity(settings),
            "warmup": settings.warmup.model_dump(exclude={"share", "min_rows", "generation"}),
            "dtype": str(language_model.torch_dtype()),
        },
        inputs={"model": language_model.identify().fingerprint, "sample": sample},
        version=scope,
    )
    artifact = lake.find(recipe)
    computed = artifact is None
    if artifact is None:
        artifact = _warm_up(context, settings, lake, language_model, recipe, sample)
    lake.point(artifact, None, scope, context.run_id)
    losses = artifact.notes["losses"]
    window = max(1, len(losses) // 4)
    first, last = sum(losses[:window]) / window, sum(losses[-window:]) / window
    return stage.each_partition(
        context,
        lambda _: stage.Outcome(
            [artifact],
            int(computed),
            {
                "steps": len(losses),
                "checkpoints": settings.warmup.checkpoints,
                "mean_loss_first_quarter": first,
                "mean_loss_last_quarter": last,
                "loss": _loss_plot(losses),
            },
            {"warmup_learned": (last < first, {"first_quarter": first, "last_quarter": last})},
        ),
    )


def _warm_up(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    recipe: Recipe,
    sample: Artifact,
) -> Artifact:
    from safetensors.torch import save_file

    from prism_assets.corpus.tokenization import from_table
    from prism_assets.training.sft import fine_tune, number_of_steps

    warmup = settings.warmup
    examples = from_table(lake.read_table(sample))
    with adapted(settings, model, seed=warmup.seed) as peft_model, stage.progress(
        context, "warm-up", number_of_steps(len(examples), warmup.epochs, None, warmup.batch_size, 1), "steps"
    ) as progress:
        stopwatch = stage.Stopwatch()
        result = fine_tune(
            peft_model,
            examples,
            seed=warmup.seed,
            epochs=warmup.epochs,
            batch_size=warmup.batch_size,
            learning_rate=warmup.learning_rate,
            checkpoints=warmup.checkpoints,
            pad_token_id=pad_token_id(model),
            progress=lambda done, total, loss: progress.update(done, f"(loss {loss:.3f})"),
        )

    def write(folder: "Any") -> dict[str, Any]:
        entries = []
        for position, checkpoint in enumerate(result.checkpoints):
            name = f"checkpoint-{position}.safetensors"
            tensors = {
                f"{kind}/{parameter}": tensor.detach().cpu().contiguous()
                for kind, state in (
                    ("lora", checkpoint.lora_state),
                    ("exp_avg", checkpoint.exp_avg),
                    ("exp_avg_sq", checkpoint.exp_avg_sq),
                )
                for parameter, tensor in state.items()
            }
            save_file(tensors, folder / name)
            entries.append(
                {
                    "file": name,
                    "step": checkpoint.step,
                    "mean_learning_rate": checkpoint.mean_learning_rate,
                    "optimizer_step": checkpoint.optimizer_step,
                    "betas": list(checkpoint.betas),
                    "eps": checkpoint.eps,
                }
            )
        (folder / "checkpoints.json").write_text(json.dumps(entries, indent=1))
        cost = stopwatch.cost()
        return {"steps": result.steps, "losses": list(result.losses), "seconds": result.seconds, "cost": cost}

    return lake.publish_folder(recipe, write, run_id=context.run_id)


def pad_token_id(model: LanguageModel) -> int:
    """The token that fills batches; it is masked everywhere, so EOS serves where the tokenizer has none."""
    tokenizer = model.tokenizer()
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _loss_plot(losses: list[float]) -> dg.MetadataValue:
    from prism_assets.evaluation.plots import as_markdown_image, loss_curve

    return dg.MetadataValue.md(as_markdown_image(loss_curve(losses)))
