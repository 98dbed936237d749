"""A file of records as tables, written while it is read: a few records are in memory at a time, however many it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from prism_assets.corpus.encoder import Encoder, TokenizedExample, TokenizedPair
from prism_assets.corpus.intake import DUPLICATE, ReasonCounts
from prism_assets.corpus.record_file import WHOLE_FILE, RecordFile
from prism_assets.corpus.records import Example, Reject, excerpt_of
from prism_assets.corpus.token_tables import CHOICES, FIELDS_SCHEMA, REJECTS_SCHEMA, encode_one, row_of
from prism_assets.errors import UnreadableFile
from prism_assets.resources.lake import Lake, Rows

if TYPE_CHECKING:
    from prism_assets.stage import Stage


class Tables(NamedTuple):
    """What a file is read into: the accepted rows, tokenised; the records that were not accepted; and what the rows'
    records hold beside their conversation, row by row."""

    rows: Rows
    rejects: Rows
    fields: Rows


def read_tables(stage: Stage, source: RecordFile, encoder: Encoder) -> Tables:
    """Read a file. Raises UnreadableFile unless it `may_be_unreadable`: then such a file is one reject and no rows."""
    writing = _Writing(stage.lake, source)
    try:
        with stage.progress(f"reading and tokenising {source.path.name}", None) as progress:
            for record in source.read(source.path):
                writing.add(record, encoder)
                progress.advance()
    except UnreadableFile as error:
        if not source.may_be_unreadable:
            raise
        writing = _Writing(stage.lake, source)
        writing.reject(Reject(0, WHOLE_FILE, str(error), ""))
    for name in sorted(writing.unused):
        stage.log.warning(f"{source.path.name}: the field {name!r} is not used")
    return writing.finish()


class _Writing:
    """The tables of one file as they grow."""

    def __init__(self, lake: Lake, source: RecordFile) -> None:
        self._rows = lake.spool(source.schema.append(CHOICES))
        self._rejects, self._fields = lake.spool(REJECTS_SCHEMA), lake.spool(FIELDS_SCHEMA)
        self._has_choices = False
        self._counts = dict.fromkeys(("completion_tokens", "tokens", "truncated"), 0)
        self._reasons = ReasonCounts()
        self.unused: set[str] = set()

    def add(self, record: Example | Reject, encoder: Encoder) -> None:
        """Tokenise an example; what cannot be, and what was rejected before, is a reject."""
        if isinstance(record, Reject):
            return self.reject(record)
        # Half a surrogate pair in a name is no text that notes, logs and tables can hold.
        self.unused.update(excerpt_of(name) for name in record.unused)
        tokens = encode_one(record, encoder)
        if isinstance(tokens, Reject):
            return self.reject(tokens)
        return self._accept(record, tokens)

    def reject(self, reject: Reject) -> None:
        """Add a record that is not accepted."""
        self._reasons.add(reject.field, reject.reason)
        self._rejects.append(reject._asdict(), len(reject.excerpt) + len(reject.reason))

    def _accept(self, example: Example, tokens: TokenizedExample | TokenizedPair) -> None:
        row = row_of(example, tokens)
        for name in ("completion_tokens", "tokens"):
            self._counts[name] += row[name]
        self._counts["truncated"] += tokens.truncated
        self._has_choices |= bool(example.choices)
        texts = 2 * (len(row["prompt"]) + len(row["completion"]))  # each of them is in `messages` too
        beside = [example.record_id, example.source, example.group, example.rejected]
        beside += [*example.answers, *example.choices]
        texts += sum(len(text) for text in beside if text)
        self._rows.append(row, 4 * (texts + row["tokens"]))
        fields = {"id": example.id, "line": example.line, "fields": example.fields}
        self._fields.append(fields, len(example.fields))

    def finish(self) -> Tables:
        """The tables, when the file is at its end."""
        # Tables of records without choices are what they were before there were any.
        rows = self._rows.finish(leave_out=() if self._has_choices else (CHOICES.name,))
        notes = {
            **self._counts,
            "duplicates": self._reasons.counts[DUPLICATE],
            **self._reasons.notes(),
            "unused_fields": sorted(self.unused),
        }
        return Tables(Rows(rows, notes), Rows(self._rejects.finish()), Rows(self._fields.finish()))
