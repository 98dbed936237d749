"""The asset `adapter`: one LoRA adapter per seed on what was selected; the published one is the first seed's."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from prism_assets.errors import DamagedArtifact
from prism_assets.identity import seed_partition, split_key
from prism_assets.metadata import picture
from prism_assets.project import Check, Project
from prism_assets.reference.engine import gradient_engine
from prism_assets.resources.lake import Artifact, Folder, Lake, Recipe, hash_table, verify
from prism_assets.stage import Made, Stage
from prism_assets.stats.losses import quarter_means
from prism_assets.work import Outcome, each_partition, stage_of

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

LEARNED = Check("training_learned", "The loss fell for every seed.")


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "adapter",
        group="training",
        kinds={"pytorch", "safetensors"},
        deps=["selection", "base_model"],
        checks=[LEARNED],
        loads_model=True,
    )
    def adapter(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """PEFT adapters fine-tuned from the base model on the selected rows, one per seed.

        An adapter depends on the rows it was trained on, not on how they were found: a ranking that changes without
        changing the selected rows retrains nothing.
        """
        stage = stage_of(project, context)
        return each_partition(context, stage, lambda key: _train_all(stage, key))

    return adapter


def _train_all(stage: Stage, key: str) -> Outcome:
    selection = stage.shown("selection", key)
    made = []
    for seed in stage.settings.seeds:
        made.append(make_adapter(stage, key, selection, seed))
        stage.show(made[-1].artifact, seed_partition(key, seed))
    return _outcome(stage, [one.artifact for one in made], sum(one.computed for one in made))


def make_adapter(stage: Stage, key: str, selection: Artifact, seed: int) -> Made:
    """The adapter fine-tuned with a seed on the rows of a selection; `key` names it."""
    recipe = adapter_recipe(stage, key, selection, seed)
    found = stage.lake.find(recipe)
    if found is not None:
        with suppress(DamagedArtifact):  # set aside, and trained again below: people load these files
            verify(stage.lake, found)
    return stage.make(
        recipe,
        lambda: Folder(
            lambda folder: _train(stage, key, trained_tokens(stage.lake.read_table(selection)), seed, folder)
        ),
    )


def adapter_recipe(stage: Stage, key: str, selection: Artifact, seed: int) -> Recipe:
    """What an adapter is made from."""
    return _recipe(stage, key, selection, seed, _rows_hash(stage, selection))


def are_of(stage: Stage, key: str, selection: Artifact) -> bool:
    """Whether the adapters that the lake shows for a partition, of every seed, are those of the rows of a selection and
    of today's settings."""
    rows = _rows_hash(stage, selection)
    return all(
        (shown := stage.shown_or_none("adapters", seed_partition(key, seed))) is not None
        and shown.fingerprint == _recipe(stage, key, selection, seed, rows).fingerprint
        for seed in stage.settings.seeds
    )


def _rows_hash(stage: Stage, selection: Artifact) -> str:
    return hash_table(trained_tokens(stage.lake.read_table(selection)))


def _recipe(stage: Stage, key: str, selection: Artifact, seed: int, rows: str) -> Recipe:
    return stage.recipe(
        "adapters",
        {
            "training": stage.settings.training.model_dump(),
            "lora": stage.lora_identity,
            "seed": seed,
            "dtype": stage.dtype,
        },
        {"model": stage.model_identity.fingerprint, "rows": rows},
        lineage={"selection": selection},
        partition=key,
    )


def trained_tokens(rows: "pa.Table") -> "pa.Table":
    """What an adapter learns of a selection. Sorted by id: the order of the ranking is no part of it."""
    return rows.select(["id", "input_ids", "loss_mask"]).sort_by("id")


def adapter_state(lake: Lake, adapter: Artifact) -> "dict[str, torch.Tensor]":
    """The LoRA tensors of an adapter, by parameter name."""
    from safetensors.torch import load_file

    return load_file(lake.local(adapter, "adapter_model.safetensors"))


def _train(stage: Stage, key: str, tokens: "pa.Table", seed: int, folder: Path) -> dict[str, Any]:
    """Fine-tune and write the adapter; returns what is noted of it."""
    from prism_assets.corpus.token_tables import from_table
    from prism_assets.sft.adapter_files import save_adapter
    from prism_assets.sft.trainer import Tracking, Training, fine_tune

    examples = from_table(tokens)
    training = Training(**stage.settings.training.model_dump())
    tracking = Tracking(
        stage.settings.training.report_to,
        stage.lake.log_folder(*split_key(key), f"seed-{seed}"),
        f"{'/'.join(split_key(key))}/seed-{seed}",
    )
    steps = training.number_of_steps(len(examples))
    with (
        stage.adapted(seed=seed) as peft_model,
        stage.progress(f"fine-tuning {key} seed {seed}", steps, "steps") as progress,
    ):
        result = fine_tune(
            gradient_engine(stage, peft_model),
            examples,
            training,
            seed=seed,
            tracking=tracking,
            progress=lambda done, _, loss: progress.update(done, f"(loss {loss:.3f})"),
        )
        # Nothing of how the rows were found: equal rows make equal adapters. The header names the selection.
        # A local model is named by its folder alone, for the same reason: a moved project has the same adapters.
        name = stage.settings.model.name
        name = Path(name).name if Path(name).is_dir() else name
        save_adapter(peft_model, folder, {"rows": len(examples), "seed": seed}, base_model=name)
    losses = [float(loss) for loss in result.losses]
    (folder / "losses.json").write_text(json.dumps(losses))
    facts = {"steps": result.steps, "rows": len(examples), "seed": seed, "losses": losses}
    return {**facts, "seconds": result.seconds}


def _outcome(stage: Stage, adapters: list[Artifact], computed: int) -> Outcome:
    from prism_assets.plots import loss_curve

    falls = {}
    for adapter in adapters:
        first_quarter, last_quarter = quarter_means(adapter.notes["losses"])
        falls[str(adapter.notes["seed"])] = first_quarter - last_quarter
    first = adapters[0]
    metadata: dict[str, Any] = {
        "published_adapter": dg.MetadataValue.path(str(stage.lake.local(first))),
        "rows": first.notes["rows"],
        "steps": first.notes["steps"],
        "seeds": list(stage.settings.seeds),
        "seconds": sum(adapter.notes["seconds"] for adapter in adapters),
        "loss": picture(loss_curve(first.notes["losses"]), "training loss"),
    }
    learned = LEARNED(all(fall > 0 for fall in falls.values()), loss_fell_by=falls)
    return Outcome(adapters, computed, metadata, [learned])
