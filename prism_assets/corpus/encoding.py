"""How files of records become tables of tokens and rejects: for candidates, targets and held-out files."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prism_assets.corpus.limits import Limits
from prism_assets.errors import ModelError, StageError
from prism_assets.resources.lake import Artifact, Recipe, Rows
from prism_assets.resources.regular_files import open_regular

if TYPE_CHECKING:
    import pyarrow as pa

    from prism_assets.corpus.encoder import Encoder
    from prism_assets.corpus.records import Example, Reject
    from prism_assets.stage import Stage


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


class RecordFile(NamedTuple):
    """A file to be read into two tables."""

    path: Path
    sha256: str
    table: str  # of the accepted rows
    rejects: str  # table of the records that were not accepted
    partition: str
    schema: "pa.Schema"
    read: "Callable[[Path], tuple[list[Example], list[Reject]]]"
    inside: Path | None = None  # the folder that it must lie in


class Encoded(NamedTuple):
    """The two tables of a file, and how many artefacts were made for it."""

    rows: Artifact
    rejects: Artifact
    computed: int


def encode_file(stage: "Stage", source: RecordFile) -> Encoded:
    """Read a file into accepted rows and rejects; both are found where they exist already.

    Raises StageError where the file changes while it is read.
    """
    recipe, rejects_recipe = encoded_recipes(stage, source)
    read = cache(lambda: _read(stage, source))
    # The rejects first: where the rows are published, their rejects are too.
    rejects, rejects_made = stage.make(rejects_recipe, lambda: read()[1])
    rows, rows_made = stage.make(recipe, lambda: read()[0])
    stage.show(rows, source.partition)
    stage.show(rejects, source.partition)
    return Encoded(rows, rejects, max(rejects_made, rows_made))


def encoded_recipes(stage: "Stage", source: RecordFile) -> tuple[Recipe, Recipe]:
    """What the rows and the rejects of a file are made from."""
    settings = stage.settings.tokenization.model_dump() | limits_of_recipe(stage)
    inputs = {"file": source.sha256, "tokenizer": stage.model_identity.tokenizer}
    return (
        stage.recipe(source.table, settings, inputs, partition=source.partition),
        stage.recipe(source.rejects, settings, {**inputs, "of": source.table}, partition=source.partition),
    )


def _hash(source: RecordFile) -> str:
    """SHA-256 of the file as it is now; empty where it cannot be read any more."""
    try:
        with open_regular(source.path, source.inside) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _read(stage: "Stage", source: RecordFile) -> tuple[Rows, Rows]:
    import pyarrow as pa

    from prism_assets.corpus.token_tables import REJECTS_SCHEMA, column_sum, encode_all, to_table

    examples, unreadable = source.read(source.path)
    if _hash(source) != source.sha256:
        # Rows of one content must never be published under the fingerprint of another.
        raise StageError(f"{source.path} was changed while it was read. The next run takes it as it is then.")
    with stage.progress(f"tokenising {source.path.name}", len(examples)) as progress:
        tokenized, untokenizable = encode_all(examples, encoder_of(stage), lambda done, _: progress.update(done))
    table = to_table(examples, tokenized, source.schema)
    rejects = sorted([*unreadable, *untokenizable], key=lambda reject: reject.line)
    notes = {
        "completion_tokens": column_sum(table, "completion_tokens"),
        "tokens": column_sum(table, "tokens"),
        "duplicates": sum("duplicate" in one.reason for one in rejects),
    }
    return Rows(table, notes), Rows(pa.Table.from_pylist([one._asdict() for one in rejects], REJECTS_SCHEMA))
