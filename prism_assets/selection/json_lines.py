"""The JSON Lines file beside a selection: the selected rows for other programs."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

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
    columns = ["rank", "score", "id", "shard", "source", "prompt", "completion", "messages"]
    columns += [name for name in ("reason",) if name in table.column_names]
    with open(path, "w", encoding="utf-8") as handle:
        for row in table.select(columns).to_pylist():
            turns = json.loads(row["messages"])
            if turns[0]["role"] == "tools":  # beside the turns, where other programs look for them
                row["tools"] = json.loads(turns.pop(0)["content"])
            row["messages"] = turns
            if turns[0]["role"] == TEXT_ROLE:
                row = {name: value for name, value in row.items() if name not in _OF_A_CONVERSATION}
                row["text"] = turns[0]["content"]
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def json_lines_of(stage: Stage, selection: Artifact) -> Path:
    """The JSON Lines file beside a selection's Parquet file."""
    return stage.lake.local(selection, suffix=JSON_LINES)
