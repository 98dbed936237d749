"""Hidden states of candidates and targets, computed the first time that a strategy asks for them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prism_assets.features.blocks import BLOCK_ROWS, vectors_of
from prism_assets.identity import hidden_state_identity
from prism_assets.progress import Progress, uncounted
from prism_assets.resources.lake import Artifact, Recipe, Rows
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np
    from peft import PeftModel

_Part = tuple[Artifact, int, Recipe]  # a table, the first row of a block of it, the block's recipe


class Representations:
    """Tables of examples as unit vectors of the starting model, in blocks of at most 4,096 rows in the lake.

    A block is found by the content of its table, so an arrival costs its own shard; the model is loaded only where a
    block is missing, and given back at once.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.used: list[Artifact] = []  # every block that was asked for

    def of(self, tables: Sequence[Artifact]) -> list[list[Artifact]]:
        """The blocks of each table of tokenised examples, in the order of its rows."""
        stage = self.stage
        parts, found = self._parts(tables)
        missing = [part for part in parts if found[part[2].fingerprint] is None]
        if missing:
            rows = sum(map(_rows_of, missing))
            # A block has its own cost: it is not the selection's that happens to ask first.
            with (
                uncounted(),
                stage.adapted() as peft_model,
                stage.progress("hidden states", rows) as progress,
            ):
                for table, first, recipe in missing:
                    made = stage.make(
                        recipe, lambda t=table, f=first: _hidden_states(stage, peft_model, t, f, progress)
                    )
                    found[recipe.fingerprint] = made.artifact
        blocks = {fingerprint: block for fingerprint, block in found.items() if block is not None}
        by_table: dict[str, list[Artifact]] = {}
        for table, _, recipe in parts:
            by_table.setdefault(table.fingerprint, []).append(blocks[recipe.fingerprint])
        self.used += blocks.values()
        return [by_table.get(table.fingerprint, []) for table in tables]

    def missing_rows(self, tables: Sequence[Artifact]) -> int:
        """Rows of these tables whose blocks are not in the lake."""
        parts, found = self._parts(tables)
        return sum(_rows_of(part) for part in parts if found[part[2].fingerprint] is None)

    def _parts(self, tables: Sequence[Artifact]) -> tuple[list[_Part], dict[str, Artifact | None]]:
        """Every block of the tables, and what the lake has of them by the fingerprint of its recipe."""
        identity = hidden_state_identity(self.stage.model_identity, self.stage.dtype)
        parts = [
            (table, first, self._recipe(table, first, identity))
            # Two files of equal content have one table.
            for table in {one.fingerprint: one for one in tables}.values()
            for first in range(0, table.notes["rows"], BLOCK_ROWS)
        ]
        return parts, {recipe.fingerprint: self.stage.lake.find(recipe) for *_, recipe in parts}

    def read(self, block: Artifact) -> "np.ndarray":
        """The unit vectors of a block, float32 [n, H]."""
        import numpy as np

        return vectors_of(self.stage.lake.read_table(block, ["vector"])).astype(np.float32)

    def _recipe(self, table: Artifact, first: int, identity: dict) -> Recipe:
        settings = {**identity, "first_row": first}
        return self.stage.recipe("hidden_states", settings, {"examples": table}, partition=table.partition)


def _rows_of(part: _Part) -> int:
    table, first, _ = part
    return min(BLOCK_ROWS, table.notes["rows"] - first)


def _hidden_states(stage: Stage, peft_model: "PeftModel", table: Artifact, first: int, progress: Progress) -> Rows:
    """The unit vectors of one block of a table."""
    import numpy as np
    import pyarrow as pa

    from prism_assets.corpus.token_tables import from_table
    from prism_assets.gradients.hidden_states import representations

    rows = stage.lake.read_table(table, ["id", "input_ids", "loss_mask"]).slice(first, BLOCK_ROWS)
    start = progress.done
    vectors = representations(
        peft_model,
        from_table(rows),
        token_budget=stage.settings.features.token_budget,
        progress=lambda done, _: progress.update(start + done),
    ).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    return Rows(pa.table({"id": rows["id"], "vector": column}), compression="none")
