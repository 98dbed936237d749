"""As Parquet: everything that a row holds, turns as a list of structs, whatever reads it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_assets.export.formats.format import PARQUET, Format, fenced
from prism_assets.export.formats.handover import Handover, Row

if TYPE_CHECKING:
    import pyarrow as pa

_TEXTS = ("reasoning_content", "tool_calls", "tool_call_id", "name")  # of a turn, where any turn has one


def _write(folder: Path, handover: Handover) -> None:
    import pyarrow.parquet as pq

    pq.write_table(_table(handover), folder / PARQUET)


def _table(handover: Handover) -> "pa.Table":
    import pyarrow as pa

    rows = handover.rows
    columns: dict[str, Any] = {
        "rank": pa.array([row.rank for row in rows], pa.int64()),
        "score": pa.array([row.score for row in rows], pa.float64()),
        "id": pa.array([row.id for row in rows], pa.string()),
        "record_id": pa.array([row.record_id for row in rows], pa.string()),
        "source": pa.array([row.source for row in rows], pa.string()),
        "completion_tokens": pa.array([row.completion_tokens for row in rows], pa.int64()),
    }
    if all(row.is_text for row in rows):
        columns["text"] = pa.array([row.messages[0].content for row in rows], pa.string())
        return pa.table(columns)
    made = [_turns(row) for row in rows]
    used = [name for name in _TEXTS if any(name in turn for turns in made for turn in turns)]
    turn = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("weight", pa.int8()), *((one, pa.string()) for one in used)]
    )
    columns["messages"] = pa.array(made, pa.list_(turn))
    if any(row.tools is not None for row in rows):
        columns["tools"] = pa.array([row.tools for row in rows], pa.string())
    return pa.table(columns)


def _turns(row: Row) -> list[dict[str, Any]]:
    import json

    turns = []
    for message in row.turns:
        turn = message.as_turn()
        if "tool_calls" in turn:
            turn["tool_calls"] = json.dumps(turn["tool_calls"], ensure_ascii=False)
        turns.append({**turn, "weight": int(message.learn and message.role in ("assistant", "text"))})
    return turns


def _use(handover: Handover) -> list[str]:
    return [
        f"`{PARQUET}` holds a row for each selected row, best first: `rank` and `score`, `id` (the hash of its "
        "content) and `record_id` (the record's own), `source`, `completion_tokens`, and `messages`, a list of structs "
        "of `role`, `content` and `weight`: 1 where a turn had loss when the rows were scored, else 0. What else a "
        "turn has is in `reasoning_content`, `tool_calls` (JSON text), `tool_call_id` and `name`; definitions of tools "
        "are in `tools` (JSON text). A text without a conversation is a turn of the role `text`; where all rows are "
        "such, the column `text` is in the place of `messages`.",
        "",
        *fenced(
            "python",
            "from datasets import load_dataset",
            "",
            f'rows = load_dataset("parquet", data_files="{PARQUET}", split="train")',
        ),
    ]


PARQUET_FORMAT = Format((PARQUET,), _write, _use, trains=False)
