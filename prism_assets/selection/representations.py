"""A door: hidden states of candidates and targets, computed the first time that a strategy asks for them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg

from prism_assets import stage
from prism_assets.features.assets import BLOCK_ROWS, vectors_of
from prism_assets.reference.assets import adapted
from prism_assets.settings import Settings
from resources.lake import Artifact, Lake, Recipe
from resources.language_model import LanguageModel

if TYPE_CHECKING:
    import numpy as np
    from peft import PeftModel

HIDDEN_STATES_VERSION = 1


def representation_identity(model: LanguageModel) -> dict[str, Any]:
    """What representations depend on beside the tokens: the model where fine-tuning starts. A fresh LoRA is zero, so
    `lora:` is no part of it."""
    return {"version": HIDDEN_STATES_VERSION, "model": model.identify().fingerprint, "dtype": str(model.torch_dtype())}


class Representations:
    """Tables of examples as unit vectors of the starting model, in blocks of at most 4,096 rows in the lake.

    A block is found by the content of its table, so an arrival costs its own shard; the model is loaded only where a
    block is missing, and given back at once.
    """

    def __init__(
        self, context: dg.AssetExecutionContext, settings: Settings, lake: Lake, model: LanguageModel
    ) -> None:
        self.context, self.settings, self.lake, self.model = context, settings, lake, model
        self.used: list[Artifact] = []  # every block that was asked for

    def of(self, tables: Sequence[Artifact]) -> "list[list[Artifact]]":
        """The blocks of each table of tokenised examples, in the order of its rows."""
        recipes = [
            Recipe(
                "hidden_states",
                HIDDEN_STATES_VERSION,
                {**representation_identity(self.model), "first_row": first},
                {"examples": table},
                partition=table.partition,
            )
            # Two files of equal content have one table.
            for table in {one.fingerprint: one for one in tables}.values()
            for first in range(0, table.notes["rows"], BLOCK_ROWS)
        ]
        found = {recipe.fingerprint: self.lake.find(recipe) for recipe in recipes}
        missing = [recipe for recipe in recipes if found[recipe.fingerprint] is None]
        if missing:
            rows = sum(min(BLOCK_ROWS, _table(one).notes["rows"] - one.settings["first_row"]) for one in missing)
            # A block has its own cost: it is not the selection's that happens to ask first.
            with (
                stage.uncounted(),
                adapted(self.settings, self.model) as peft_model,
                stage.progress(self.context, "hidden states", rows) as progress,
            ):
                for recipe in missing:
                    found[recipe.fingerprint] = self._publish(recipe, peft_model, progress)
        by_table: dict[str, list[Artifact]] = {}
        for recipe in recipes:
            by_table.setdefault(_table(recipe).fingerprint, []).append(found[recipe.fingerprint])
        self.used += found.values()
        return [by_table.get(table.fingerprint, []) for table in tables]

    def read(self, block: Artifact) -> "np.ndarray":
        """The unit vectors of a block, float32 [n, H]."""
        import numpy as np

        return vectors_of(self.lake.read_table(block, ["vector"])).astype(np.float32)

    def _publish(self, recipe: Recipe, peft_model: "PeftModel", progress: stage.Progress) -> Artifact:
        import numpy as np
        import pyarrow as pa

        from prism_assets.corpus.tokenization import from_table
        from prism_assets.features.hidden_states import representations

        stopwatch = stage.Stopwatch()
        table = self.lake.read_table(_table(recipe), ["id", "input_ids", "loss_mask"])
        rows = table.slice(recipe.settings["first_row"], BLOCK_ROWS)
        start = progress.done
        vectors = representations(
            peft_model,
            from_table(rows),
            token_budget=self.settings.features.token_budget,
            progress=lambda done, _: progress.update(start + done),
        ).astype(np.float16)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        content = pa.table({"id": rows["id"], "vector": column})
        notes = {"cost": stopwatch.cost()}
        return self.lake.publish_table(recipe, content, run_id=self.context.run_id, compression="none", notes=notes)


def _table(recipe: Recipe) -> Artifact:
    return recipe.inputs["examples"]
