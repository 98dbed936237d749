"""Training: one LoRA adapter per seed on what was selected; the published adapter is the first seed's."""

import json
from pathlib import Path
from typing import Any

import dagster as dg

from prism_assets import stage
from prism_assets.partitions import target_strategies_of
from prism_assets.reference.assets import adapted, lora_identity, pad_token_id
from prism_assets.selection.assets import split_key
from prism_assets.settings import Settings
from resources.lake import Artifact, Lake, Recipe, hash_table
from resources.language_model import LanguageModel

TRAINING_VERSION = 1

GROUP = "training"


def seed_partition(key: str, seed: int) -> str:
    """The head of one seed of a target and strategy."""
    return f"{key}/seed-{seed}"


def build_adapter(settings: Settings) -> dg.AssetsDefinition:
    """The asset `adapter`, one partition per target and strategy of the settings."""

    @dg.asset(
        partitions_def=target_strategies_of(settings),
        group_name=GROUP,
        kinds={"pytorch", "safetensors"},
        code_version=str(TRAINING_VERSION),
        deps=["selection", "base_model"],
        backfill_policy=dg.BackfillPolicy.single_run(),
        pool="model",
        check_specs=[
            dg.AssetCheckSpec("training_learned", asset="adapter", description="The loss fell for every seed.")
        ],
    )
    def adapter(
        context: dg.AssetExecutionContext,
        settings: dg.ResourceParam[Settings],
        lake: Lake,
        language_model: LanguageModel,
    ) -> dg.MaterializeResult:
        """PEFT adapters fine-tuned from the base model on the selected rows, one per seed.

        An adapter depends on the rows it was trained on, not on how they were found: a ranking that changes without
        changing the selected rows retrains nothing.
        """

        def train(key: str) -> stage.Outcome:
            selection = lake.require("selection", key)
            rows = lake.read_table(selection)
            published, computed = [], 0
            for seed in settings.seeds:
                artifact, made = publish_adapter(context, settings, lake, language_model, key, selection, rows, seed)
                lake.point(artifact, seed_partition(key, seed), run_id=context.run_id)
                published.append(artifact)
                computed += made
            return _training_outcome(published, computed, settings)

        return stage.each_partition(context, train)

    return adapter


def publish_adapter(
    context: dg.AssetExecutionContext,
    settings: Settings,
    lake: Lake,
    model: LanguageModel,
    key: str,
    selection: Artifact,
    rows: Any,
    seed: int,
) -> tuple[Artifact, int]:
    """The adapter fine-tuned with a seed on the rows of a selection; `key` names it."""
    from prism_assets.corpus.tokenization import from_table
    from prism_assets.training.sft import fine_tune, number_of_steps, save_adapter

    # Sorted by id: the order of the ranking is not part of what an adapter is.
    tokens = rows.select(["id", "input_ids", "loss_mask"]).sort_by("id")
    recipe = Recipe(
        "adapters",
        TRAINING_VERSION,
        {
            "training": settings.training.model_dump(),
            "lora": lora_identity(settings),
            "seed": seed,
            "dtype": str(model.torch_dtype()),
        },
        {"model": model.identify().fingerprint, "rows": hash_table(tokens)},
        lineage={"selection": selection},
        partition=key,
    )
    artifact = lake.find(recipe)
    if artifact is not None:
        return artifact, 0
    examples = from_table(tokens)
    options = settings.training
    steps = number_of_steps(
        len(examples), options.epochs, options.steps, options.batch_size, options.gradient_accumulation
    )
    with adapted(settings, model, seed=seed) as peft_model, stage.progress(
        context, f"fine-tuning {key} seed {seed}", steps, "steps"
    ) as progress:
        stopwatch = stage.Stopwatch()
        result = fine_tune(
            peft_model,
            examples,
            seed=seed,
            epochs=options.epochs,
            max_steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_ratio=options.warmup_ratio,
            scheduler=options.scheduler,
            weight_decay=options.weight_decay,
            gradient_accumulation=options.gradient_accumulation,
            pad_token_id=pad_token_id(model),
            report_to=options.report_to,
            tracking=settings.storage.root / "tracking" / Path(*split_key(key)) / f"seed-{seed}",
            run_name=f"{'/'.join(split_key(key))}/seed-{seed}",
            progress=lambda done, total, loss: progress.update(done, f"(loss {loss:.3f})"),
        )

        def write(folder: Any) -> dict[str, Any]:
            # Nothing of how the rows were found: equal rows make equal adapters. The header names the selection.
            # A local model is named by its folder alone, for the same reason: a moved project has the same adapters.
            name = Path(settings.model.name).name if Path(settings.model.name).is_dir() else settings.model.name
            save_adapter(peft_model, folder, {"rows": len(examples), "seed": seed}, base_model=name)
            losses = [float(loss) for loss in result.losses]
            (folder / "losses.json").write_text(json.dumps(losses))
            facts = {"steps": result.steps, "rows": len(examples), "seed": seed, "losses": losses}
            return {**facts, "seconds": result.seconds, "cost": stopwatch.cost()}

        return lake.publish_folder(recipe, write, run_id=context.run_id), 1


def _training_outcome(published: list[Artifact], computed: int, settings: Settings) -> stage.Outcome:
    from prism_assets.evaluation.plots import as_markdown_image, loss_curve

    falls = {}
    for seed, artifact in zip(settings.seeds, published, strict=True):
        losses = artifact.notes["losses"]
        window = max(1, len(losses) // 4)
        falls[str(seed)] = sum(losses[:window]) / window - sum(losses[-window:]) / window
    first = published[0]
    return stage.Outcome(
        published,
        computed,
        {
            "published_adapter": dg.MetadataValue.path(str(first.path)),
            "rows": first.notes["rows"],
            "steps": first.notes["steps"],
            "seeds": list(settings.seeds),
            "seconds": sum(artifact.notes["seconds"] for artifact in published),
            "loss": dg.MetadataValue.md(as_markdown_image(loss_curve(first.notes["losses"]), "training loss")),
        },
        {"training_learned": (all(fall > 0 for fall in falls.values()), {"loss_fell_by": falls})},
    )
