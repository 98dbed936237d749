"""The asset `warmup_checkpoints`: short LoRA training on the pinned sample; gradients are taken at its checkpoints."""

from pathlib import Path
from typing import Any

import dagster as dg

from prism_assets.metadata import picture
from prism_assets.project import Check, Project
from prism_assets.reference.checkpoints import write_checkpoints
from prism_assets.reference.engine import gradient_engine
from prism_assets.reference.rehearsal import rehearse
from prism_assets.resources.lake import Artifact, Folder
from prism_assets.stage import Stage
from prism_assets.stats.losses import quarter_means
from prism_assets.work import Outcome, stage_of, the_whole

LEARNED = Check(
    "warmup_learned", "The loss fell during the warm-up; passes where an optimiser state took the place of a training."
)


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "warmup_checkpoints",
        group="reference",
        kinds={"pytorch", "safetensors"},
        deps=["base_model", "warmup_sample"],
        checks=[LEARNED],
        loads_model=True,
    )
    def warmup_checkpoints(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """LoRA warm-up on the pinned sample: parameters at one or several checkpoints, with Adam's moments by name."""
        stage = stage_of(project, context)
        sample = stage.shown("warmup_sample")
        settings = {
            "lora": stage.lora_identity,
            "warmup": stage.settings.warmup.model_dump(exclude={"share", "min_rows", "generation", "optimizer_state"}),
            "dtype": stage.dtype,
        }
        inputs = {"model": stage.model_identity.fingerprint, "sample": sample}
        if stage.optimizer_state:  # then no row is trained on, and none decides anything
            inputs = {"model": stage.model_identity.fingerprint, "optimizer_state": stage.optimizer_state}
        checkpoints, computed = stage.make(
            stage.recipe("warmup_checkpoints", settings, inputs),
            lambda: Folder(lambda folder: (_take if stage.optimizer_state else _train)(stage, sample, folder)),
        )
        stage.show(checkpoints)
        return the_whole(context, stage, _outcome(stage, checkpoints, computed))

    return warmup_checkpoints


def _train(stage: Stage, sample: Artifact, folder: Path) -> dict[str, Any]:
    """Train and write the checkpoints; returns what is noted of them."""
    from prism_assets.corpus.token_tables import from_table
    from prism_assets.sft.trainer import Training, fine_tune

    adapted = rehearse(stage)
    warmup = stage.settings.warmup
    examples = from_table(stage.lake.read_table(sample))
    training = Training(epochs=warmup.epochs, batch_size=warmup.batch_size, learning_rate=warmup.learning_rate)
    steps = training.number_of_steps(len(examples))
    with stage.adapted(seed=warmup.seed) as peft_model, stage.progress("warm-up", steps, "steps") as progress:
        result = fine_tune(
            gradient_engine(stage, peft_model),
            examples,
            training,
            seed=warmup.seed,
            checkpoints=warmup.checkpoints,
            progress=lambda done, _, loss: progress.update(done, f"(loss {loss:.3f})"),
        )
    write_checkpoints(folder, result.checkpoints)
    return {
        "steps": result.steps,
        "losses": list(result.losses),
        "seconds": result.seconds,
        "adapted": adapted._asdict(),
    }


def _take(stage: Stage, _: Artifact, folder: Path) -> dict[str, Any]:
    """Write the starting adapter as it is, with the moments of the run that made it; returns what is noted of them."""
    from prism_assets.sft.optimizer_state import read_optimizer_state

    adapted, path = rehearse(stage), stage.settings.warmup.optimizer_state
    assert path is not None
    with stage.adapted() as peft_model:
        state = read_optimizer_state(path, peft_model)
        write_checkpoints(folder, [state.at(peft_model)])
    return {
        "steps": state.step,
        "losses": [],
        "optimizer_state": {"path": str(path), "matched_by": state.form, "betas": list(state.betas), "eps": state.eps},
        "adapted": adapted._asdict(),
    }


def _outcome(stage: Stage, checkpoints: Artifact, computed: int) -> Outcome:
    from prism_assets.plots import loss_curve

    losses: Any = checkpoints.notes["losses"]
    taken: Any = checkpoints.notes.get("optimizer_state")
    if taken is not None:
        metadata = {"steps": checkpoints.notes["steps"], "checkpoints": 1, **taken, "betas": str(taken["betas"])}
        return Outcome([checkpoints], computed, metadata, [LEARNED(True, moments_of=taken["path"])])
    first, last = quarter_means(losses)
    adapted: Any = checkpoints.notes.get("adapted", {})  # not noted by the first releases
    metadata = {
        **{f"adapted_{name}": value for name, value in adapted.items() if value},
        "steps": len(losses),
        "checkpoints": stage.settings.warmup.checkpoints,
        "mean_loss_first_quarter": first,
        "mean_loss_last_quarter": last,
        "loss": picture(loss_curve(losses)),
    }
    return Outcome([checkpoints], computed, metadata, [LEARNED(last < first, first_quarter=first, last_quarter=last)])
