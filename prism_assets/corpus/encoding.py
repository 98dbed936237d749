"""How files of records become tables of tokens and rejects: for candidates, targets and held-out files."""

import hashlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prism_assets.corpus.limits import Limits
from prism_assets.corpus.record_file import RecordFile
from prism_assets.errors import ModelError, ShardGone
from prism_assets.resources.lake import Artifact, Recipe, hash_rows, hash_table
from prism_assets.resources.regular_files import open_regular

if TYPE_CHECKING:
    from prism_assets.corpus.encoder import Encoder
    from prism_assets.corpus.reading import Tables
    from prism_assets.stage import Stage

# How files are read, raised where the same file gives other rows. Those that an earlier reading gave are compared.
READING = 3


def require_context(stage: "Stage") -> None:
    """Raise ModelError where examples may be longer than the model's context."""
    longest, context = stage.settings.tokenization.max_length, stage.model_identity.context_length
    if context is not None and longest > context:
        raise ModelError(
            f"tokenization.max_length is {longest}, but the model's context has {context} tokens: "
            f"set it to {context} or less."
        )


def encoder_of(stage: "Stage") -> "Encoder":
    """The one way records become tokens. Raises ModelError as `require_context`."""
    from prism_assets.corpus.encoder import Encoder

    require_context(stage)
    options = stage.settings.tokenization
    return Encoder(
        stage.model.tokenizer(), max_length=options.max_length, template=options.template, separator=options.separator
    )


def limits_of(stage: "Stage", inside: Path | None = None) -> Limits:
    """What may be read of a file, which must lie in the folder `inside` where one is given."""
    return Limits(inside, **stage.settings.limits.model_dump())


def limits_of_recipe(stage: "Stage") -> dict[str, dict[str, int]]:
    """The limits as a setting of what is made of a file: none while all are the default, so that what was read before
    there were limits is found."""
    limits = limits_of(stage)
    return {} if limits == Limits() else {"limits": stage.settings.limits.model_dump()}


class Encoded(NamedTuple):
    """The tables of a file, and whether any of them was made for it now (1) or all were found (0)."""

    rows: Artifact
    rejects: Artifact
    computed: int


def encode_file(stage: "Stage", source: RecordFile) -> Encoded:
    """Read a file into accepted rows, rejects and, where they are kept, the rows' other fields; what exists is found.

    Raises ShardGone where the file changes while it is read.
    """
    reading = _Reading(stage, source)
    recipe, rejects_recipe = _recipes_of_today(stage, source, reading)
    # The rejects first: where the rows are published, their rejects are too.
    rejects, rejects_made = stage.make(rejects_recipe, lambda: reading.tables.rejects)
    rows, rows_made = stage.make(recipe, lambda: reading.tables.rows)
    stage.show(rows, source.partition)
    stage.show(rejects, source.partition)
    computed = max(rejects_made, rows_made)
    if source.fields is not None:
        fields, fields_made = stage.make(_fields_recipe(stage, source, rows), lambda: reading.tables.fields)
        stage.show(fields, source.partition)
        computed = max(computed, fields_made)
    return Encoded(rows, rejects, computed)


def encoded_recipes(stage: "Stage", source: RecordFile) -> tuple[Recipe, Recipe]:
    """What the rows and the rejects of a file are made from."""
    settings = stage.settings.tokenization.model_dump() | limits_of_recipe(stage)
    settings |= {"columns": dict(source.columns)} if source.columns else {}
    inputs = {"file": source.sha256, "tokenizer": stage.model_identity.tokenizer}
    return (
        stage.recipe(source.table, settings, inputs, partition=source.partition),
        stage.recipe(source.rejects, settings, {**inputs, "of": source.table}, partition=source.partition),
    )


def _recipes_of_today(stage: "Stage", source: RecordFile, reading: "_Reading") -> tuple[Recipe, Recipe]:
    """The recipes of the rows and the rejects, as today's reading of files gives them.

    Rows that an earlier reading gave (it ignored `weight`, say) stay where today's gives the same: nothing that is made
    from them is made again. Where it gives others, it has recipes of its own. That the fields are there says that the
    comparison has been made.
    """
    recipes = encoded_recipes(stage, source)
    again = tuple(replace(one, settings={**one.settings, "reading": READING}) for one in recipes)
    if source.fields is None:
        return recipes
    if stage.lake.find(again[0]) is not None:
        return again[0], again[1]
    old = stage.lake.find(recipes[0])
    if old is None or stage.lake.find(_fields_recipe(stage, source, old)) is not None:
        return recipes
    # Tables were hashed whole before they were hashed in blocks.
    hashed = hash_rows if old.header.get("hashed_in_blocks") else hash_table
    same = hashed(reading.tables.rows.table) == old.content_hash
    return recipes if same else (again[0], again[1])


def _fields_recipe(stage: "Stage", source: RecordFile, rows: Artifact) -> Recipe:
    inputs = {"file": source.sha256, "rows": rows}
    settings = {"reading": READING}
    return stage.recipe(str(source.fields), settings, inputs, partition=source.partition)


def _hash(source: RecordFile) -> str:
    """SHA-256 of the file as it is now; empty where it cannot be read any more."""
    try:
        with open_regular(source.path, source.inside) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


class _Reading:
    """A file as it is read once, when the first of its tables is asked for."""

    def __init__(self, stage: "Stage", source: RecordFile):
        self.stage, self.source = stage, source

    @cached_property
    def tables(self) -> "Tables":
        """What the file is read into. Raises ShardGone where it changed meanwhile."""
        from prism_assets.corpus.reading import read_tables

        tables = read_tables(self.stage, self.source, encoder_of(self.stage))
        if _hash(self.source) != self.source.sha256:
            # Rows of one content must never be published under the fingerprint of another.
            raise ShardGone(f"{self.source.path} was changed while it was read. The next run takes it as it is then.")
        return tables
