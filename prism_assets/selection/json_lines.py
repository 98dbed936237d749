"""The JSON Lines file beside a selection: the selected rows for other programs."""

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from prism_assets.corpus.records import TEXT_ROLE
from prism_assets.resources.lake import Artifact
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import pyarrow as pa

JSON_LINES = ".jsonl"
_OF_A_CONVERSATION = ("prompt", "completion", "messages")


def write_json_lines(path: Path, table: "pa.Table") -> None:
    """A line a row of a selection, in order of rank; `messages` as objects, not as text, with `tools` beside them. Of a
    removal with `reason`. A row that is a text has `text` in the place of prompt, completion and messages."""
    with open(path, "w", encoding="utf-8", newline="") as handle:
        _write(handle, table)


def _write(handle: TextIO, table: "pa.Table") -> None:
    columns = ["rank", "score", "id", "shard", "source", "prompt", "completion", "messages"]
    columns += [name for name in ("reason",) if name in table.column_names]
    for row in table.select(columns).to_pylist():
        turns = json.loads(row["messages"])
        if turns[0]["role"] == "tools":  # beside the turns, where other programs look for them
            row["tools"] = json.loads(turns.pop(0)["content"])
        row["messages"] = turns
        if turns[0]["role"] == TEXT_ROLE:
            row = {name: value for name, value in row.items() if name not in _OF_A_CONVERSATION}
            row["text"] = turns[0]["content"]
        handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def restore_json_lines(stage: Stage, selection: Artifact) -> bool:
    """Write the JSON Lines file beside a selection again where it is lost or altered; whether it was. It is what other
    programs train on, so it has to be what was selected."""
    place = json_lines_of(stage, selection)
    table = stage.lake.read_table(selection)
    whole = io.StringIO()
    _write(whole, table)
    expected = whole.getvalue().encode()
    if place.is_file() and place.stat().st_size == len(expected) and place.read_bytes() == expected:
        return False
    stage.lake.attach(selection, JSON_LINES, lambda path: path.write_bytes(expected))
    stage.log.warning(f"{place} was lost or altered, and was written again from the selection")
    return True


def json_lines_of(stage: Stage, selection: Artifact) -> Path:
    """The JSON Lines file beside a selection's Parquet file."""
    return stage.lake.local(selection, suffix=JSON_LINES)
