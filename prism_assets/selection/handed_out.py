"""What was selected, as files under names that stay: `out/<target>/<strategy>.jsonl` and `.parquet`.

Copies of what the lake shows, for people and for programs that train: one conversation a row and one layout a file,
with the record's own id and all that it held beside its conversation.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.corpus.records import TEXT_ROLE
from prism_assets.errors import CannotExport
from prism_assets.identity import join_key, shard_name
from prism_assets.resources.private_folders import make_private
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import pyarrow as pa

    from prism_assets.resources.lake import Artifact

_REMOVED = ".removed"
_COLUMNS = ("rank", "score", "reason", "id", "record_id", "source", "shard", "row", "messages")
_BEFORE = ("rank", "score", "reason", "id", "source", "prism_id", "file", "line")
_ROWS_AT_A_TIME = 1024
_OLD_SECONDS = 3600.0


class HandedOut(NamedTuple):
    """The files of one strategy's selection, and what is in them."""

    target: str
    strategy: str
    what: str  # "selected"; of a removal "kept" or "removed"
    rows: int
    completion_tokens: int
    json_lines: Path
    parquet: Path


def hand_out(stage: Stage, targets: Sequence[str] | None = None) -> list[HandedOut]:
    """Write the files of every selection that the lake shows, of these targets or of all, below `storage.out`."""
    written = []
    for target in targets or stage.settings.targets:
        for strategy in stage.settings.strategies:
            key = join_key(target, strategy)
            removed = stage.shown_or_none("removed", key)
            for table, what in (("selection", "kept" if removed else "selected"), ("removed", "removed")):
                artifact = stage.shown_or_none(table, key)
                if artifact is not None:
                    written.append(_write(stage, artifact, target, strategy, what))
    return written


def _write(stage: Stage, artifact: Artifact, target: str, strategy: str, what: str) -> HandedOut:
    folder = stage.settings.storage.out / target
    make_private(stage.settings.storage.out)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{strategy}{_REMOVED if what == 'removed' else ''}"
    json_lines, parquet = folder / f"{name}.jsonl", folder / f"{name}.parquet"
    if what == "selected":  # of a removal there is another file beside: not of this one, which it may have been
        for old in folder.glob(f"{strategy}{_REMOVED}.*"):
            old.unlink()
    rows = _Rows(stage, artifact, target, strategy)
    with _replacing(json_lines) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        for batch in rows.batches():
            file.writelines(f"{_as_json(row)}\n" for row in batch)
    with _replacing(parquet) as draft:
        _write_parquet(draft, rows)
    notes = artifact.notes
    return HandedOut(target, strategy, what, notes["rows"], notes["completion_tokens"], json_lines, parquet)


def _write_parquet(path: Path, rows: _Rows) -> None:
    """The rows as columns; turns, tools and fields, whose keys differ from row to row, as JSON text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"rank": pa.int64(), "score": pa.float64(), "line": pa.int64()}
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in rows.names])

    def cell(value: Any) -> Any:
        return _as_json(value) if isinstance(value, dict | list) else value

    with pq.ParquetWriter(path, schema) as writer:
        for batch in rows.batches():
            columns = [pa.array([cell(row.get(name)) for row in batch], schema.field(name).type) for name in rows.names]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _as_json(value: Any) -> str:
    """JSON that UTF-8 can hold: half a surrogate pair, which a record may have beside its conversation, stays an
    escape."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


class _replacing:
    """A draft beside a file, renamed into its place where nothing fails."""

    def __init__(self, place: Path) -> None:
        self._place, self._draft = place, place.with_name(f".{place.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self._draft

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self._draft.unlink(missing_ok=True)
            return
        with self._draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(self._draft, self._place)
        for left in self._place.parent.glob(f".{self._place.name}.*"):  # of processes that were killed
            if time.time() - left.stat().st_mtime > _OLD_SECONDS:
                left.unlink(missing_ok=True)


class _Rows:
    """The rows of a selection in their order, some at a time.

    rank, score, reason; id (the record's own, null where it has none) and fields as the record gave them; source (its
    file's name where it names none); prism_id (the hash of the content), file and line; and the conversation: `text`
    where every row is a text, `prompt` and `completion` where every row is one exchange without more, else `messages`
    (and `tools`), in which a text is a turn of the role `text`.
    """

    def __init__(self, stage: Stage, artifact: Artifact, target: str, strategy: str) -> None:
        import pyarrow as pa

        schema = stage.lake.schema(artifact)
        assert schema is not None, artifact.table
        columns = [name for name in _COLUMNS if name in schema.names]
        self._table = stage.lake.read_table(artifact, columns)
        self._strategy, self._pool = strategy, artifact.notes["pool_rows"]
        given = _given(stage, self._table, target, strategy)
        self._table = self._table.append_column("line", pa.array([line for line, _ in given], pa.int64()))
        self._table = self._table.append_column("fields", pa.array([fields for _, fields in given], pa.string()))
        kinds, tools = set(), False
        for batch in self._table.select(["messages"]).to_batches(max_chunksize=_ROWS_AT_A_TIME):
            for text in batch.column(0).to_pylist():
                turns = json.loads(text)
                kinds.add(_kind(turns))
                tools |= turns[0]["role"] == "tools"
        self._layout = kinds.pop() if len(kinds) == 1 else "messages"
        conversation = {"text": ["text"], "exchange": ["prompt", "completion"]}.get(
            self._layout, ["messages", *(["tools"] if tools else [])]
        )
        self.names = [*_BEFORE, *conversation, "fields"]

    def batches(self) -> Iterator[list[dict[str, Any]]]:
        """The rows, so many at a time."""
        for batch in self._table.to_batches(max_chunksize=_ROWS_AT_A_TIME):
            yield [self._row(row) for row in batch.to_pylist()]

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        ranked = f"rank {row['rank']:,} of {self._pool:,} by" if row["rank"] is not None else "taken by"
        return {
            "rank": row["rank"],
            "score": row["score"],
            "reason": row.get("reason") or f"{ranked} {self._strategy}",
            "id": row["record_id"],
            "source": row["source"],
            "prism_id": row["id"],
            "file": shard_name(row["shard"]),
            "line": row["line"],
            **_conversation(json.loads(row["messages"]), self._layout),
            "fields": json.loads(row["fields"]),
        }


def _kind(turns: list[dict[str, Any]]) -> str:
    if turns[0]["role"] == TEXT_ROLE:
        return "text"
    plain = all(turn.keys() == {"role", "content"} for turn in turns)
    return "exchange" if plain and [turn["role"] for turn in turns] == ["user", "assistant"] else "messages"


def _conversation(turns: list[dict[str, Any]], layout: str) -> dict[str, Any]:
    if layout == "text":
        return {"text": turns[0]["content"]}
    if layout == "exchange":
        return {"prompt": turns[0]["content"], "completion": turns[1]["content"]}
    tools = json.loads(turns[0]["content"]) if turns[0]["role"] == "tools" else None
    return {"messages": turns[1:] if tools else turns, **({"tools": tools} if tools else {})}


def _given(stage: Stage, rows: pa.Table, target: str, strategy: str) -> list[tuple[int, str]]:
    """The line of each row's record, and as JSON text what it held beside its conversation.

    Raises CannotExport where the lake shows other rows of a shard now than the selection was made from.
    """
    import numpy as np

    wanted: dict[str, list[int]] = {}
    for place, shard in enumerate(rows["shard"].to_pylist()):
        wanted.setdefault(shard, []).append(place)
    positions, ids = np.array(rows["row"].to_pylist(), dtype=np.int64), rows["id"].to_pylist()
    found: list[tuple[int, str]] = [(0, "{}")] * rows.num_rows
    for shard, places in wanted.items():
        shown = stage.shown_or_none("candidate_fields", shard)
        records = None if shown is None else stage.lake.read_table(shown)
        taken = positions[places]
        if records is not None and int(taken.max()) < records.num_rows:
            records = records.take(taken)
        if records is None or records["id"].to_pylist() != [ids[place] for place in places]:
            raise CannotExport(
                f"The selection of {target} by {strategy} was made from other rows of the shard {shard} than the lake "
                f"shows now: `prism select --target {target}` makes it again."
            )
        pairs = zip(records["line"].to_pylist(), records["fields"].to_pylist(), strict=True)
        for place, pair in zip(places, pairs, strict=True):
            found[place] = pair
    return found
