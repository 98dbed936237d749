"""What is handed over: the rows of one selection as they were scored, with all that a format may need of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.corpus.records import TEXT_ROLE, Message, excerpt_of, messages_from_json
from prism_assets.corpus.template import TextSegment, Untokenizable
from prism_assets.errors import CannotExport
from prism_assets.export.formats.plan import Plan, plan_of
from prism_assets.export.formats.segments import segment_tokens, written_segments
from prism_assets.export.formats.template_file import template_file
from prism_assets.identity import join_key, seed_partition
from prism_assets.resources.lake import Artifact, hash_table
from prism_assets.text import visible

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.corpus.encoder import Encoder
    from prism_assets.stage import Stage

_ROWS_AT_A_TIME = 1024
_NAMED = 5
_COLUMNS = ("rank", "score", "id", "record_id", "source", "messages", "input_ids", "loss_mask")


class Row(NamedTuple):
    """A selected row: what it says, and the tokens that were scored."""

    rank: int | None
    score: float | None
    id: str
    record_id: str | None
    source: str | None
    messages: tuple[Message, ...]  # the definitions of tools, where there are any, as the first
    segments: list[TextSegment]  # its whole text, in parts with and without loss
    input_ids: "np.ndarray"  # int32 [T]
    loss_mask: "np.ndarray"  # bool [T]
    cut: bool  # whether `max_length` cost it a part of its prompt, or of its text
    length: int  # tokens of the whole text, each part tokenised by itself, as trainers do
    retokenized: bool  # whether those are others than were scored, in a row that was not cut

    @property
    def completion_tokens(self) -> int:
        """Tokens with loss."""
        return int(self.loss_mask.sum())

    @property
    def name(self) -> str:
        """What a person calls it: the record's own id, else the hash of its content."""
        return self.record_id or self.id

    @property
    def is_text(self) -> bool:
        return self.messages[0].role == TEXT_ROLE

    @property
    def tools(self) -> str | None:
        """The definitions of tools as JSON text."""
        return self.messages[0].content if self.messages[0].role == "tools" else None

    @property
    def turns(self) -> tuple[Message, ...]:
        """The turns without the definitions of tools."""
        return self.messages[1:] if self.tools is not None else self.messages


@dataclass(frozen=True)
class Handover:
    """One selection, ready to be written in any format."""

    target: str
    strategy: str
    what: str  # "selected"; of a removal "kept"
    selection: Artifact
    rows: Sequence[Row]
    template: str  # Jinja
    plan: Plan
    model_fingerprint: str
    max_length: int
    pad_token: str | None  # None where the tokenizer has one of its own
    adapter: Artifact | None  # the first seed's, where it is of exactly these rows
    adapter_files: dict[str, str]

    @property
    def completion_tokens(self) -> int:
        return sum(row.completion_tokens for row in self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def cut(self) -> int:
        """Rows of which `max_length` cost a part."""
        return sum(row.cut for row in self.rows)

    @property
    def retokenized(self) -> int:
        """Rows whose text, tokenised part by part, gives other tokens than those that were scored."""
        return sum(row.retokenized for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens under which a trainer cuts nothing of the rows' whole text."""
        return max([self.max_length, *(row.length for row in self.rows)])


def handover_of(stage: "Stage", target: str, strategy: str) -> Handover:
    """The selection that the lake shows, whether or not anything was trained on it.

    All of it is of one artefact, so no newer one that is being made mixes with it. Raises CannotExport where there is
    none, where it has no row, and where its tokens are not those that today's settings give.
    """
    from prism_assets.corpus.encoding import encoder_of

    key = join_key(target, strategy)
    selection = stage.shown_or_none("selection", key)
    if selection is None:
        raise CannotExport(
            f"The lake at {stage.lake.folder} has no selection[{key}] yet, so there is nothing to hand over: "
            f"`prism select --target {target}` makes it."
        )
    table = stage.lake.read_table(selection)
    if not table.num_rows:
        raise CannotExport(f"The selection of {target} by {strategy} has no row: there is nothing to hand over.")
    encoder = encoder_of(stage)
    rows = _rows(table, encoder, target)
    adapter = _adapter_of(stage, key, table)
    names = () if adapter is None else ("adapter_config.json", "adapter_model.safetensors")
    return Handover(
        target=target,
        strategy=strategy,
        what="kept" if stage.shown_or_none("removed", key) else "selected",
        selection=selection,
        rows=rows,
        template=template_file(encoder, stage.settings.tokenization.template),
        plan=plan_of(stage.settings, len(rows)),
        model_fingerprint=stage.model_identity.fingerprint,
        max_length=stage.settings.tokenization.max_length,
        pad_token=None if encoder.tokenizer.pad_token is not None else str(encoder.tokenizer.eos_token),
        adapter=adapter,
        adapter_files={name: str(stage.lake.local(adapter, name)) for name in names} if adapter else {},
    )


def _rows(table: "pa.Table", encoder: "Encoder", target: str) -> list[Row]:
    rows, others = [], []
    for batch in table.select(_COLUMNS).to_batches(max_chunksize=_ROWS_AT_A_TIME):
        for values in batch.to_pylist():
            row = _row(values, encoder)
            if row is None:
                others.append(values["record_id"] or values["id"])
            else:
                rows.append(row)
    if others:
        raise CannotExport(
            f"{len(others):,} of {table.num_rows:,} rows ({named(others)}) have other tokens than today's settings of "
            f"model and tokenization give, so they were scored under others: `prism select --target {target}` makes "
            "the selection again."
        )
    return rows


def _row(values: dict[str, Any], encoder: "Encoder") -> Row | None:
    """A row with its text; None where today's settings give other tokens or another loss than are stored."""
    messages = messages_from_json(values["messages"])
    stored = values["input_ids"], values["loss_mask"]
    try:
        made = encoder.encode(messages)
    except Untokenizable:
        return None
    if (made.input_ids.tolist(), made.loss_mask.tolist()) != stored:
        return None
    segments = written_segments(encoder, messages)
    ids, mask = segment_tokens(encoder, segments)
    # The first token has no loss, whatever a trainer is told of it.
    retokenized = not made.truncated and (ids, mask[1:]) != (stored[0], stored[1][1:])
    return Row(
        **{name: values[name] for name in ("rank", "score", "id", "record_id", "source")},
        messages=messages,
        segments=segments,
        input_ids=made.input_ids,
        loss_mask=made.loss_mask,
        cut=made.truncated,
        length=len(ids),
        retokenized=retokenized,
    )


def named(rows: Sequence[str]) -> str:
    """The first names of rows, as a message may show them."""
    names = [visible(excerpt_of(name)) for name in rows[:_NAMED]]
    return ", ".join(names) + (", …" if len(rows) > _NAMED else "")


def _adapter_of(stage: "Stage", key: str, table: "pa.Table") -> Artifact | None:
    """The adapter that `prism run` trained on exactly these rows, where there is one."""
    from prism_assets.training.adapter import trained_tokens

    shown = stage.shown_or_none("adapters", seed_partition(key, stage.settings.seeds[0]))
    if shown is None or shown.header["inputs"]["rows"]["content_hash"] != hash_table(trained_tokens(table)):
        return None
    return shown
