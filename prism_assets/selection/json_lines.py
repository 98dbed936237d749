"""The JSON Lines file beside a selection: the selected rows for other programs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from prism_assets.corpus.records import TEXT_ROLE
from prism_assets.resources.lake import Artifact
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import pyarrow as pa

JSON_LINES = ".jsonl"
_COLUMNS = ("rank", "score", "id", "shard", "source", "prompt", "completion", "messages", "reason")
_ROWS_AT_A_TIME = 1024
_OF_A_CONVERSATION = ("prompt", "completion", "messages")


def write_json_lines(path: Path, table: "pa.Table") -> None:
    """A line a row of a selection, in order of rank; `messages` as objects, not as text, with `tools` beside them. Of a
    removal with `reason`. A row that is a text has `text` in the place of prompt, completion and messages."""
    with open(path, "wb") as handle:
        handle.writelines(_lines(table))


def _lines(table: "pa.Table") -> Iterator[bytes]:
    """The lines of the file, a few rows as Python values at a time."""
    rows = table.select([name for name in _COLUMNS if name in table.column_names])
    for batch in rows.to_batches(max_chunksize=_ROWS_AT_A_TIME):
        for row in batch.to_pylist():
            turns = json.loads(row["messages"])
            if turns[0]["role"] == "tools":  # beside the turns, where other programs look for them
                row["tools"] = json.loads(turns.pop(0)["content"])
            row["messages"] = turns
            if turns[0]["role"] == TEXT_ROLE:
                row = {name: value for name, value in row.items() if name not in _OF_A_CONVERSATION}
                row["text"] = turns[0]["content"]
            yield f"{json.dumps(row, ensure_ascii=False)}\n".encode()


def _has(path: Path, lines: Iterator[bytes]) -> bool:
    """Whether a file is these lines and nothing else."""
    with open(path, "rb") as file:
        return all(file.read(len(line)) == line for line in lines) and not file.read(1)


def restore_json_lines(stage: Stage, selection: Artifact) -> bool:
    """Write the JSON Lines file beside a selection again where it is lost or altered; whether it was. It is what other
    programs train on, so it has to be what was selected."""
    place = json_lines_of(stage, selection)
    schema = stage.lake.schema(selection)
    names = [] if schema is None else [name for name in _COLUMNS if name in schema.names]
    table = stage.lake.read_table(selection, names)
    if place.is_file() and _has(place, _lines(table)):
        return False
    stage.lake.attach(selection, JSON_LINES, lambda path: write_json_lines(path, table))
    stage.log.warning(f"{place} was lost or altered, and was written again from the selection")
    return True


def json_lines_of(stage: Stage, selection: Artifact) -> Path:
    """The JSON Lines file beside a selection's Parquet file."""
    return stage.lake.local(selection, suffix=JSON_LINES)
