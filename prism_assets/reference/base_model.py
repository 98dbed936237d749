"""The asset `base_model`: the identity of the language model."""

import dagster as dg

from prism_assets.metadata import preview
from prism_assets.project import Project
from prism_assets.resources.lake import Recipe, Rows
from prism_assets.stage import Stage
from prism_assets.work import Outcome, stage_of, the_whole


def build(project: Project) -> dg.AssetsDefinition:
    @project.asset("base_model", group="reference", kinds={"huggingface"})
    def base_model(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        """The identity of the language model: hashes of its weights, tokenizer and starting adapter."""
        stage = stage_of(project, context)
        artifact, computed = stage.make(base_model_recipe(stage), lambda: _identity(stage))
        stage.show(artifact)
        model = stage.settings.model
        metadata = {
            "name": model.name,
            "architecture": stage.model_identity.architecture,
            "weight_bytes": stage.model_identity.parameters_on_disk,
            "precision": stage.dtype,
            "adapter": model.adapter or "none",
            "rows": preview(stage.lake.read_table(artifact).to_pylist()),
        }
        return the_whole(context, stage, Outcome([artifact], computed, metadata))

    return base_model


def base_model_recipe(stage: Stage) -> Recipe:
    """The recipe of the artefact `base_model` of today's model."""
    return stage.recipe("base_model", inputs={"files": stage.model_identity.fingerprint})


def _identity(stage: Stage) -> Rows:
    import pyarrow as pa

    identity = stage.model_identity
    row = {
        "architecture": identity.architecture,
        "weights": identity.weights,
        "tokenizer": identity.tokenizer,
        "adapter": identity.adapter,
        "weight_bytes": identity.parameters_on_disk,
    }
    notes = {"name": stage.settings.model.name, "revision": stage.settings.model.revision}
    return Rows(pa.Table.from_pylist([row]), notes)
