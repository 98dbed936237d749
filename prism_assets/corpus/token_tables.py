"""Tokenised examples as tables, and back: the one layout of tokens in the lake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from prism_assets.corpus.encoder import Encoder, TokenizedExample, TokenizedPair, last_run
from prism_assets.corpus.records import Example, Reject, excerpt_of, messages_to_json
from prism_assets.corpus.template import Untokenizable
from prism_assets.tables import schema_of

CANDIDATE_SCHEMA = schema_of("candidates")
# conversation_id is the id that a candidate of equal content has: the id of a pair covers ``rejected`` too.
TARGET_SCHEMA = pa.schema(
    [
        *CANDIDATE_SCHEMA,
        ("conversation_id", pa.string()),
        *[(f"rejected_{name}", CANDIDATE_SCHEMA.field(name).type) for name in ("input_ids", "loss_mask")],
    ]
)
CHOICES = pa.field("choices", pa.list_(pa.string()))
REJECTS_SCHEMA = schema_of("rejects")
FIELDS_SCHEMA = schema_of("candidate_fields")


def completion_tokens(example: TokenizedExample | TokenizedPair) -> int:
    """Number of supervised tokens, EOS included."""
    return int(np.count_nonzero(example.loss_mask))


def prompt_tokens(example: TokenizedExample | TokenizedPair) -> np.ndarray:
    """int32 [T]: the tokens before the last completion, as a prompt for generation."""
    supervised = example.loss_mask.tolist()
    return example.input_ids[: len(supervised) - last_run(supervised)]


def encode_all(
    examples: Sequence[Example], encoder: Encoder, progress: Callable[[int, int], None] | None = None
) -> tuple[list[TokenizedExample | TokenizedPair | None], list[Reject]]:
    """Tokenises each example; one that cannot be tokenised is None in the list and a reject. Pairs become
    `TokenizedPair`.

    progress is called with (done, total) after each example.
    """
    tokenized: list[TokenizedExample | TokenizedPair | None] = []
    rejects: list[Reject] = []
    for done, example in enumerate(examples, start=1):
        found = encode_one(example, encoder)
        if isinstance(found, Reject):
            rejects.append(found)
        tokenized.append(None if isinstance(found, Reject) else found)
        if progress:
            progress(done, len(examples))
    return tokenized, rejects


def encode_one(example: Example, encoder: Encoder) -> TokenizedExample | TokenizedPair | Reject:
    """The tokens of an example, or why it has none."""
    try:
        if example.rejected is None:
            return encoder.encode(example.messages)
        return encoder.encode_pair(example.messages, example.rejected)
    except Untokenizable as error:
        return Reject(example.line, error.field, error.reason, excerpt_of(example.prompt_text))


def to_table(
    examples: Sequence[Example],
    tokenized: Sequence[TokenizedExample | TokenizedPair | None],
    schema: pa.Schema | None = None,
) -> pa.Table:
    """A row for each example that was tokenised (None is left out: it is among the rejects).

    schema: `TARGET_SCHEMA` where there are pairs, else `CANDIDATE_SCHEMA`, unless given. Where an example has choices
    there is a column `choices` too.
    """
    rows = zip(examples, tokenized, strict=True)
    kept = [(example, tokens) for example, tokens in rows if tokens is not None]
    if schema is None:
        has_pairs = any(isinstance(tokens, TokenizedPair) for _, tokens in kept)
        schema = TARGET_SCHEMA if has_pairs else CANDIDATE_SCHEMA
    table = pa.Table.from_pylist([row_of(example, tokens) for example, tokens in kept], schema=schema)
    choices = [example.choices or None for example, _ in kept]
    # Not in the schema: tables of records without them are what they were.
    return table.append_column(CHOICES, pa.array(choices, CHOICES.type)) if any(choices) else table


def choices_of(table: pa.Table) -> list[list[str]]:
    """The options of each row [n]; empty where a record has none."""
    if "choices" not in table.column_names:
        return [[] for _ in range(table.num_rows)]
    return [one or [] for one in table["choices"].to_pylist()]


def row_of(example: Example, tokens: TokenizedExample | TokenizedPair) -> dict[str, Any]:
    """The row of an example by column, choices and those of a pair included."""
    row = {
        "id": example.id,
        "line": example.line,
        "record_id": example.record_id,
        "source": example.source,
        "prompt": example.prompt_text,
        "completion": example.completion_text,
        "messages": messages_to_json(example.messages),
        "rejected": example.rejected,
        "group": example.group,
        "answers": example.answers,
        "input_ids": tokens.input_ids,
        "loss_mask": tokens.loss_mask,
        "tokens": len(tokens.input_ids),
        "completion_tokens": completion_tokens(tokens),
        "conversation_id": example.conversation_id,
        CHOICES.name: example.choices or None,
    }
    if isinstance(tokens, TokenizedPair):
        row["rejected_input_ids"], row["rejected_loss_mask"] = tokens.rejected[:2]
    return row


def from_table(table: pa.Table) -> list[TokenizedExample]:
    """The tokens of each row, from the columns input_ids and loss_mask."""
    return _examples(table, "input_ids", "loss_mask")


def rejected_from_table(table: pa.Table) -> list[TokenizedExample]:
    """The unwanted completion's tokens of each row; ValueError where a row is a plain target example."""
    if "rejected_input_ids" not in table.column_names or table["rejected_input_ids"].null_count:
        raise ValueError("these are plain targets: they have no unwanted completions")
    return _examples(table, "rejected_input_ids", "rejected_loss_mask")


def _examples(table: pa.Table, ids_column: str, mask_column: str) -> list[TokenizedExample]:
    ids, masks = _arrays(table[ids_column], np.int32), _arrays(table[mask_column], bool)
    return [TokenizedExample(*tokens) for tokens in zip(ids, masks, strict=True)]


def _arrays(column: pa.ChunkedArray, dtype: type) -> list[np.ndarray]:
    """A list column as one array a row, without a Python object for each token."""
    arrays: list[np.ndarray] = []
    for chunk in column.chunks:
        values = chunk.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False)
        ends = np.cumsum(chunk.value_lengths().to_numpy(zero_copy_only=False))[:-1]
        arrays += np.split(values, ends) if len(chunk) else []
    return arrays


def column_sum(table: pa.Table, column: str) -> int:
    """The sum of a column, 0 of an empty one."""
    import pyarrow.compute as pc

    total: Any = pc.sum(table[column]).as_py()  # pyright: ignore[reportAttributeAccessIssue]
    return total or 0
