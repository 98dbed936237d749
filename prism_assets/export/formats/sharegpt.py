"""For what reads ShareGPT's form: `conversations` of `from` and `value`, every answer with loss."""

import json
from pathlib import Path
from typing import Any

from prism_assets.corpus.records import Message
from prism_assets.export.formats.format import JSON_LINES, Format, fenced, write_json_lines
from prism_assets.export.formats.handover import Handover, Row
from prism_assets.export.formats.refusal import (
    HAS_IDS,
    HAS_MASK,
    HAS_REASONING,
    IS_TEXT,
    refuse,
    refuse_rows,
)

_INSTEAD = {IS_TEXT: "parquet", HAS_REASONING: "parquet", HAS_MASK: "openai", HAS_IDS: "openai"}
_NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def _write(folder: Path, handover: Handover) -> None:
    refuse(handover, "sharegpt", _INSTEAD)
    beside = [row.name for row in handover.rows if any(_says_and_calls(turn) for turn in row.turns)]
    if beside:
        refuse_rows(handover, "sharegpt", beside, "calls of tools with ids, or with words beside them", "openai")
    write_json_lines(folder / JSON_LINES, map(_record, handover.rows))


def _says_and_calls(turn: Message) -> bool:
    calls = turn.as_turn().get("tool_calls", ())
    return bool(calls) and (bool(turn.content.strip()) or any("id" in call for call in calls))


def _record(row: Row) -> dict[str, Any]:
    tools = {} if row.tools is None else {"tools": row.tools}
    return {"id": row.name, "conversations": [_turn(turn) for turn in row.turns], **tools}


def _turn(turn: Message) -> dict[str, str]:
    calls = [call["function"] for call in turn.as_turn().get("tool_calls", ())]
    if calls:
        value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
        return {"from": "function_call", "value": value}
    return {"from": _NAMES[turn.role], "value": turn.content}


def _use(handover: Handover) -> list[str]:
    return [
        f"`{JSON_LINES}` holds one conversation a line: `id`, `conversations` of `from` (system, human, gpt, "
        "function_call, observation) and `value`, and `tools` as JSON text where there are any. The form has no mask: "
        "all turns from gpt and function_call have loss, as they had when the rows were scored; rows of which that is "
        "not true are refused. Which template is applied is up to the tool that reads it.",
        "",
        *fenced(
            "python",
            "from datasets import load_dataset",
            "",
            f'rows = load_dataset("json", data_files="{JSON_LINES}", split="train")',
        ),
    ]


SHAREGPT = Format((JSON_LINES,), _write, _use, trains=False)
