"""The asset `trust`: for every target, whether its weights, directions and scores hold, and what that means."""

from typing import TYPE_CHECKING, Any

import dagster as dg

from prism_assets.features.gradient_pass import GradientPass, gradient_pass
from prism_assets.metadata import picture
from prism_assets.project import Check, Project
from prism_assets.resources.lake import Artifact, Recipe, Rows, hash_table
from prism_assets.selection.target_scores import as_made
from prism_assets.selection.thresholds import FEWEST_EFFECTIVE
from prism_assets.stage import Stage
from prism_assets.trust.inputs import TRAINING_SETTINGS, TrustInputs, tried_candidates, trust_inputs
from prism_assets.trust.verdict import CHECKS, LEAST_CORRELATION, MOST_FLIPPED, findings
from prism_assets.work import Outcome, each_partition, stage_of

if TYPE_CHECKING:
    import pyarrow as pa

_DESCRIPTIONS = {
    "weights_not_concentrated": f"The weights rest on at least {FEWEST_EFFECTIVE:g} effective targets.",
    "preferences_stable": f"A random step as long as one training step flips at most {MOST_FLIPPED:.0%} of the target "
    "pairs, and the weights agree across checkpoints.",
    "first_order_reaches": "Measured and predicted change of J agree within a factor of two as far along PRISM as one "
    "training step on the best candidate goes.",
    "single_steps_agree": "A step on a single candidate changes J in the order of the stored scores: rank correlation "
    f"of at least {LEAST_CORRELATION}, and above zero beyond its 95% interval.",
    "held_out_follows": "The same steps change the mean log-probability of held-out examples in the order of the "
    "stored scores: rank correlation above zero beyond its 95% interval.",
    "subsets_predicted": "Summed scores predict what short fine-tunings on random subsets do to J: the rank "
    "correlation (linear datamodeling score) is above zero beyond its 95% interval.",
}
_CHECKS = {name: Check(name, _DESCRIPTIONS[name]) for name in CHECKS}


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset(
        "trust",
        group="trust",
        kinds={"pytorch", "parquet"},
        deps=["target_direction", "candidate_index", "targets", "target_anchors", "warmup_checkpoints"],
        checks=list(_CHECKS.values()),
        loads_model=True,
    )
    def trust(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """Whether a target's scores can be trusted, measured: weights after small steps, first order over growing
        steps, scores against what training on single candidates and on random subsets changes.

        Costly, so never started automatically: `prism trust TARGET`, the job `check_trust`, or its weekly schedule.
        """
        stage = stage_of(project, context)
        with gradient_pass(stage) as work:
            return each_partition(context, stage, lambda name: _measure_target(work, name))

    return trust


def _measure_target(work: GradientPass, name: str) -> Outcome:
    from prism_assets.trust.measurement import measure

    stage = work.stage
    inputs = trust_inputs(work, name)
    tried = tried_candidates(stage, inputs)

    def measured() -> Rows:
        rows, notes = measure(work, inputs, tried)
        return Rows(rows, notes)

    trust, computed = stage.make(_recipe(stage, inputs, tried), measured)
    stage.show(trust, name)
    return _outcome(stage, trust, computed)


def _recipe(stage: Stage, inputs: TrustInputs, tried: "tuple[pa.Table, pa.Table]") -> Recipe:
    import pyarrow as pa

    settings = stage.settings
    made = as_made(settings, inputs.weights).preference
    return stage.recipe(
        "trust",
        {
            "trust": settings.trust.model_dump(),
            "probe_step": settings.preference.probe_step,
            "temperature": inputs.weights.notes["temperature"],
            **({"score": made.score} if made.score != "mean" else {}),
            "training": settings.training.model_dump(include=TRAINING_SETTINGS),
            "features": stage.feature_identity,
        },
        {
            **inputs.directions,
            **inputs.stepped,
            "weights": inputs.weights,
            "targets": inputs.targets,
            "eval_examples": inputs.eval_examples,
            "features": inputs.features,
            "warmup": stage.warmup,
            # The rows that are tried, not the pool: an arrival that leaves them alone changes nothing.
            "candidates": hash_table(pa.concat_tables(list(tried))),
        },
        lineage={"index": stage.shown("candidate_index")},
        partition=inputs.name,
    )


def trust_of(stage: Stage, target: str) -> dict[str, Any] | None:
    """The measurements of a target in today's feature version, None where it was not measured."""
    found = stage.shown_or_none("trust", target)
    return None if found is None else dict(found.notes)


def _outcome(stage: Stage, trust: Artifact, computed: int) -> Outcome:
    from prism_assets import plots

    notes = trust.notes
    found = findings(notes)
    rows = [row for row in stage.lake.read_table(trust).to_pylist() if row["strategy"] == "prism"]
    pictures = {
        "steps": plots.growing_steps(notes["growing_steps"]),
        "candidates": plots.predicted_and_measured(
            [row for row in rows if row["measure"] == "single_step"],
            title="A step on one candidate alone",
            xlabel="stored influence score",
        ),
    }
    if notes["datamodel"] is not None:
        pictures["subsets"] = plots.predicted_and_measured(
            [row for row in rows if row["measure"] == "subset"],
            title="Short fine-tunings on random subsets",
            xlabel="sum of the subset's scores",
        )
    figures = {key: notes[key] for key in ("random_steps", "growing_steps", "single_steps", "datamodel")}
    return Outcome(
        [trust],
        computed,
        {
            "verdict": dg.MetadataValue.md("\n".join(f"- **{one.question}** {one.sentence}" for one in found)),
            **{name: picture(image, name) for name, image in pictures.items()},
            "figures": dg.MetadataValue.json(figures),
            "seconds": sum(one["wall"] for one in notes["seconds"].values()),
        },
        # What was not measured has not failed; the sentence says so.
        [
            _CHECKS[one.check](one.passed is not False, measured=one.passed is not None, says=one.sentence)
            for one in found
        ],
    )
