"""What was selected, as files under names that stay: `out/<target>/<strategy>.jsonl` and `.parquet`.

Copies of what the lake shows, for people and for programs that train: one conversation a row and one layout a file,
with the record's own id and all that it held beside its conversation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.corpus.records import TEXT_ROLE
from prism_assets.identity import join_key, shard_name
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import pyarrow as pa

    from prism_assets.resources.lake import Artifact

_REMOVED = ".removed"


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
    import pyarrow.parquet as pq

    folder = stage.settings.storage.out / target
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{strategy}{_REMOVED if what == 'removed' else ''}"
    json_lines, parquet = folder / f"{name}.jsonl", folder / f"{name}.parquet"
    rows = list(out_rows(stage, artifact, strategy))
    with _replacing(json_lines) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with _replacing(parquet) as draft:
        pq.write_table(_as_table(rows), draft)
    notes = artifact.notes
    return HandedOut(target, strategy, what, notes["rows"], notes["completion_tokens"], json_lines, parquet)


class _replacing:
    """A draft beside a file, renamed into its place where nothing fails."""

    def __init__(self, place: Path) -> None:
        self._place, self._draft = place, place.with_name(f".{place.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        return self._draft

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            os.replace(self._draft, self._place)
        else:
            self._draft.unlink(missing_ok=True)


def out_rows(stage: Stage, artifact: Artifact, strategy: str) -> Iterator[dict[str, Any]]:
    """The rows of a selection in their order.

    rank, score, reason; id (the record's own, null where it has none), source and fields as the record gave them;
    prism_id (the hash of the content), file and line; and the conversation: `text` where every row is a text, `prompt`
    and `completion` where every row is one exchange without more, else `messages` (and `tools`), in which a text is a
    turn of the role `text`.
    """
    table = stage.lake.read_table(artifact)
    rows = table.to_pylist()
    conversations = [json.loads(row["messages"]) for row in rows]
    layout = _layout(conversations)
    given = _given(stage, rows)
    pool = artifact.notes["pool_rows"]
    for row, turns in zip(rows, conversations, strict=True):
        record = given[row["shard"], row["row"]]
        rank = f"rank {row['rank']:,} of {pool:,} by {strategy}" if row["rank"] is not None else f"taken by {strategy}"
        yield {
            "rank": row["rank"],
            "score": row["score"],
            "reason": row.get("reason") or rank,
            "id": row["record_id"],
            "source": row["source"],
            "prism_id": row["id"],
            "file": shard_name(row["shard"]),
            "line": record["line"],
            **_conversation(turns, layout),
            "fields": json.loads(record["fields"]),
        }


def _layout(conversations: Sequence[list[dict[str, Any]]]) -> str:
    kinds = {_kind(turns) for turns in conversations}
    return kinds.pop() if len(kinds) == 1 else "messages"


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


def _given(stage: Stage, rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """What the records of the rows held beside their conversations, by shard and row."""
    import numpy as np

    wanted: dict[str, list[int]] = {}
    for row in rows:
        wanted.setdefault(row["shard"], []).append(row["row"])
    found = {}
    for shard, positions in wanted.items():
        records = stage.lake.read_table(stage.shown("candidate_fields", shard), ["line", "fields"])
        for position, record in zip(positions, records.take(np.array(positions)).to_pylist(), strict=True):
            found[shard, position] = record
    return found


def _as_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """The rows as columns; turns, tools and fields, whose keys differ from row to row, as JSON text."""
    import pyarrow as pa

    kinds = {"rank": pa.int64(), "score": pa.float64(), "line": pa.int64()}
    names = dict.fromkeys(name for row in rows for name in row)

    def cell(value: Any) -> Any:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value

    return pa.table(
        {name: pa.array([cell(row.get(name)) for row in rows], kinds.get(name, pa.string())) for name in names}
    )
