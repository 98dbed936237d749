"""Anchors: the unwanted answer that a target example's wanted one is compared with.

PRISM describes a behaviour by pairs under one prompt (arXiv 2605.21422, "paired anchors"): the difference of the two
gradients cancels what both answers share, such as format, language and length. Where the unwanted answers of plain
targets come from is not published; the kinds here are ours.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prism_assets.corpus.records import Message, content_id, messages_from_json, messages_to_json
from prism_assets.corpus.template import Untokenizable

if TYPE_CHECKING:
    import pyarrow as pa

    from prism_assets.corpus.encoder import Encoder

EQUAL = "the anchor equals the wanted answer"
EMPTY = "the anchor is empty"
ALONE = "no other example of the file has another answer"
NO_CHOICES = "the record has no choices"


class Anchor(NamedTuple):
    """An unwanted answer for the example at a position, or why it has none."""

    position: int
    text: str = ""
    why_not: str = ""


class Anchored(NamedTuple):
    """Target examples as pairs, and what became of those that could not be made one."""

    table: "pa.Table"  # as `TARGET_SCHEMA`, with a column `anchor`: where the unwanted answer is from
    kinds: dict[str, int]  # rows by that
    left_out: dict[str, int]  # examples by reason


def shuffled(completions: Sequence[str], ids: Sequence[str]) -> list[Anchor]:
    """For each example the answer of another one: the next with another answer, in an order by a hash of the ids.

    The same examples get the same anchors in whatever order the file has them.
    """
    order = sorted(range(len(ids)), key=lambda position: hashlib.sha256(ids[position].encode()).digest())
    found = []
    for place, position in enumerate(order):
        others = (completions[other] for other in (*order[place + 1 :], *order[:place]))
        text = next((one for one in others if one != completions[position]), None)
        found.append(Anchor(position, why_not=ALONE) if text is None else Anchor(position, text))
    return sorted(found)


def other_choices(completions: Sequence[str], choices: Sequence[Sequence[str]]) -> list[Anchor]:
    """Each other option of each example, in the record's order."""
    found = []
    for position, (completion, options) in enumerate(zip(completions, choices, strict=True)):
        others = [one for one in options if one != completion]
        found += [Anchor(position, one) for one in others] or [Anchor(position, why_not=NO_CHOICES)]
    return found


def checked(completions: Sequence[str], texts: Sequence[str]) -> list[Anchor]:
    """The texts as anchors [n], but for those that are empty or say what the wanted answer says, white space aside."""
    found = []
    for position, (completion, text) in enumerate(zip(completions, texts, strict=True)):
        if not text.strip():
            found.append(Anchor(position, why_not=EMPTY))
        elif text.split() == completion.split():
            found.append(Anchor(position, why_not=EQUAL))
        else:
            found.append(Anchor(position, text))
    return found


def anchored(
    targets: "pa.Table",
    kind: str,
    anchors: Callable[["pa.Table"], list[Anchor]],
    encoder: "Encoder",
) -> Anchored:
    """The target examples as pairs: those that have an unwanted answer keep it, the others get `anchors(rows)` of
    them, which may be several each.

    A row that was made has an id of its own, of both answers. Rows stay in the file's order.
    """
    import pyarrow as pa

    given = np.array([one is not None for one in targets["rejected"].to_pylist()], dtype=bool)
    plain = np.flatnonzero(~given)
    left_out: Counter[str] = Counter()
    rows = [(int(position), 0, targets.slice(position, 1), "given") for position in np.flatnonzero(given)]
    for turn, anchor in enumerate(anchors(targets.take(plain))):
        row = targets.slice(plain[anchor.position], 1)
        if anchor.why_not:
            left_out[anchor.why_not] += 1
            continue
        try:
            rows.append((int(plain[anchor.position]), turn, _with(row, anchor.text, encoder), kind))
        except Untokenizable as error:
            left_out[f"the anchor cannot be used: {error.reason}"] += 1
    rows.sort(key=lambda row: row[:2])
    kinds = [kind for *_, kind in rows]
    table = pa.concat_tables([row for _, _, row, _ in rows]) if rows else targets.slice(0, 0)
    return Anchored(table.append_column("anchor", pa.array(kinds, pa.string())), dict(Counter(kinds)), dict(left_out))


def without_anchors(targets: "pa.Table") -> "pa.Table":
    """The wanted answers alone, as plain target examples; their ids are those of the conversations."""
    import pyarrow as pa

    table = targets
    for name in ("rejected", "rejected_input_ids", "rejected_loss_mask"):
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(name), pa.nulls(len(table), table.schema.field(name).type))
    return table.set_column(table.column_names.index("id"), "id", table["conversation_id"])


def swapped(pairs: "pa.Table") -> "pa.Table":
    """The pairs with the unwanted answer in the place of the wanted one and the other way round."""
    import pyarrow as pa

    turns = [messages_from_json(one) for one in pairs["messages"].to_pylist()]
    unwanted = pairs["rejected"].to_pylist()
    other = [(*its[:-1], Message("assistant", text)) for its, text in zip(turns, unwanted, strict=True)]
    masks = pairs["rejected_loss_mask"].to_pylist()
    values = {
        "id": [content_id(its, text) for its, text in zip(other, pairs["completion"].to_pylist(), strict=True)],
        "conversation_id": [content_id(its) for its in other],
        "messages": [messages_to_json(its) for its in other],
        "completion": unwanted,
        "rejected": pairs["completion"],
        "input_ids": pairs["rejected_input_ids"],
        "loss_mask": pairs["rejected_loss_mask"],
        "rejected_input_ids": pairs["input_ids"],
        "rejected_loss_mask": pairs["loss_mask"],
        "tokens": [len(mask) for mask in masks],
        "completion_tokens": [sum(mask) for mask in masks],
    }
    table = pairs
    for name, value in values.items():
        field = table.schema.field(name)
        column = value if isinstance(value, pa.ChunkedArray) else pa.array(value, field.type)
        table = table.set_column(table.column_names.index(name), field, column)
    return table


def _with(row: "pa.Table", text: str, encoder: "Encoder") -> "pa.Table":
    """A plain row as a pair. Raises Untokenizable."""
    import pyarrow as pa

    messages = messages_from_json(row["messages"][0].as_py())
    chosen, other = encoder.encode_options(messages, [text], "rejected")
    values = {
        "id": content_id(messages, text),
        "rejected": text,
        "input_ids": chosen.input_ids,
        "loss_mask": chosen.loss_mask,
        "tokens": len(chosen.input_ids),
        "rejected_input_ids": other.input_ids,
        "rejected_loss_mask": other.loss_mask,
    }
    for name, value in values.items():
        at, field = row.column_names.index(name), row.schema.field(name)
        row = row.set_column(at, field, pa.array([value], field.type))
    return row
