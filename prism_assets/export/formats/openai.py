"""For OpenAI's fine-tuning, and whatever reads its form: chat messages, `weight` 0 where a turn has no loss."""

import json
from pathlib import Path
from typing import Any

from prism_assets.export.formats.format import JSON_LINES, Format, fenced, write_json_lines
from prism_assets.export.formats.handover import Handover, Row
from prism_assets.export.formats.refusal import HAS_REASONING, IS_TEXT, refuse, refuse_rows

_INSTEAD = {IS_TEXT: "parquet", HAS_REASONING: "parquet"}


class _Unanswered(ValueError):
    """An answer of a tool that no call belongs to."""


def _write(folder: Path, handover: Handover) -> None:
    refuse(handover, "openai", _INSTEAD)
    rows, unanswered = [], []
    for row in handover.rows:
        try:
            rows.append(_record(row))
        except _Unanswered:
            unanswered.append(row.name)
    if unanswered:
        refuse_rows(handover, "openai", unanswered, "answers of tools that no call belongs to", "parquet")
    write_json_lines(folder / JSON_LINES, rows)


def _record(row: Row) -> dict[str, Any]:
    """One line; calls of tools have ids, which the form requires: the row's own, else call_1, call_2, …"""
    messages: list[dict[str, Any]] = []
    waiting: list[str] = []  # ids of calls that have no answer yet
    made = 0
    for turn in row.turns:
        message = turn.as_turn()
        for call in message.get("tool_calls", ()):
            made += 1
            call.setdefault("id", f"call_{made}")
            waiting.append(call["id"])
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        if turn.role == "tool":
            own = message.get("tool_call_id")
            if not waiting or (own and own not in waiting):
                raise _Unanswered
            message["tool_call_id"] = own or waiting[0]
            waiting.remove(message["tool_call_id"])
        if turn.role != "assistant":
            message.pop("weight", None)
        messages.append(message)
    tools = [
        one if "function" in one else {"type": "function", "function": one} for one in json.loads(row.tools or "[]")
    ]
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _use(handover: Handover) -> list[str]:
    return [
        f"`{JSON_LINES}` holds one conversation a line, as OpenAI's fine-tuning of chat models reads it: `messages`, "
        "and `tools` where there are any. Every assistant turn has loss but those with `weight` 0, which had none when "
        "the rows were scored. The API applies a template and a tokenizer of its own: figures of this "
        "project are not about its models. It wants 10 rows at least.",
        "",
        *fenced(
            "python",
            "from openai import OpenAI",
            "",
            "client = OpenAI()",
            f'file = client.files.create(file=open("{JSON_LINES}", "rb"), purpose="fine-tune")',
            'client.fine_tuning.jobs.create(training_file=file.id, model="…")',
        ),
    ]


OPENAI = Format((JSON_LINES,), _write, _use, trains=False)
