"""Records of files as validated examples: which layouts are known, and what each of their fields does.

A record has one of `LAYOUTS` (a null field counts as absent), or its columns are named in the settings. `RECORD_FIELDS`
and `turns.TURN_FIELDS` say what every known field does; docs/formats.md is made from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from prism_assets.corpus.json_text import json_value
from prism_assets.corpus.record_fields import other_fields
from prism_assets.corpus.records import (
    NAMES,
    TEXT_ROLE,
    BadRecord,
    Example,
    Kind,
    Message,
    excerpt_of,
    not_empty,
    similar_name,
    text_of,
    text_or_number,
    type_name,
)
from prism_assets.corpus.turns import conversation, given, tool_definitions, usable

ALPACA_LAYOUT = ("instruction", "output")
CONVERSATION_LAYOUTS = (("messages",), ("conversations",))
TEXT_LAYOUT = ("text",)
LAYOUTS = (("prompt", "completion"), *CONVERSATION_LAYOUTS, ALPACA_LAYOUT, TEXT_LAYOUT)
PAIR_LAYOUT = ("prompt", "safe", "unsafe")
PREFERENCE_LAYOUT = ("chosen", "rejected")
PAIR_LAYOUTS = (PAIR_LAYOUT, PREFERENCE_LAYOUT)
LAYOUT_WORDS: dict[tuple[str, ...], str] = {
    ("prompt", "completion"): "one exchange as two texts, or as two arrays of turns (TRL)",
    ("messages",): "an array of turns (OpenAI, TRL, Together, Mistral)",
    ("conversations",): "an array of turns (ShareGPT)",
    ALPACA_LAYOUT: "one exchange (Alpaca)",
    TEXT_LAYOUT: "a text without a prompt, in no template: all but its first token is learned (TRL). Refused beside a "
    "field of another layout",
    PAIR_LAYOUT: "for targets: a prompt, the wanted and the unwanted completion",
    PREFERENCE_LAYOUT: "for targets: the wanted and the unwanted side as texts beside `prompt`, or as arrays of turns, "
    "with the prompt's turns in `prompt` or at the start of both (TRL). Refused for candidates, with advice",
}

SYSTEM_FIELDS = ("system", "system_prompt", "system_message")
TOOL_FIELDS = ("tools", "functions")
_CONTEXT_FIELDS = frozenset((*SYSTEM_FIELDS, *TOOL_FIELDS))
# Fields by which tools say that a completion is not wanted; `label` and the like count as booleans only.
UNWANTED_FIELDS = ("label", "kto_tag", "train", "trainable", "weight")
_SIGNALS = frozenset((*UNWANTED_FIELDS, "mask"))
_NUMBERS_COUNT = ("kto_tag", "weight")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_NOT_SUPPORTED = {
    **dict.fromkeys(_MEDIA, "not supported: text alone is; leave the record out"),
    "documents": "not supported; write the documents into the prompt",
    "chat_template_kwargs": "not supported; tokenization.template holds for all records",
    "context": "changes what is asked and is not used here; write it into the prompt, or beside 'instruction'",
}
RECORD_FIELDS: dict[str, str] = {
    "input": "beside `instruction`: joined to it by a blank line",
    "context": "beside `instruction`: as `input` (Dolly). Elsewhere a record with it is refused",
    "history": "pairs of a question and its answer: earlier turns, learned like the last (LLaMA-Factory)",
    ", ".join(SYSTEM_FIELDS): "the system turn; refused where the conversation has another one",
    ", ".join(TOOL_FIELDS): "definitions of tools, an array or its JSON text: handed to the chat template",
    "label, kto_tag, train, trainable": "false: the record is refused, its completion is unwanted (KTO)",
    "weight": "0: the record is refused. Other weights are not used",
    "mask": "of NeMo: `User` says what is done anyway; anything else is refused",
    ", ".join((*_MEDIA, "documents", "chat_template_kwargs")): "refused: not supported",
    "id, source": "kept, to find a row again and to count by source",
    "rejected": "of targets: the unwanted completion, which makes the record a pair. Of candidates not used",
    "group": "of targets: a subtask",
    "answer, answers": "of targets: accepted answers",
    "choices": "of targets: the completions to choose from, the record's own among them",
}
_OPTIONAL = frozenset(name for names in RECORD_FIELDS for name in names.split(", "))
KNOWN_FIELDS = frozenset(field for layout in (*LAYOUTS, *PAIR_LAYOUTS) for field in layout) | _OPTIONAL
TEXT_FIELDS = KNOWN_FIELDS - {"id", "source", "group"}  # no date is text of a conversation, but it may be a name
# Of candidates these are known and do nothing: they are no reason for a note.
_QUIET = frozenset(("id", "source", "rejected", "group", "answer", "answers", "choices", "prompt", *_SIGNALS))


def example_of(record: dict, line: int, kind: Kind, columns: Mapping[str, str] | None = None) -> Example:
    """The record as an example of its line, with the optional fields that count for this kind.

    columns: by our name the record's own, of the settings. Raises `BadRecord`, naming the field, for one that has none
    of the layouts or a value that is not allowed.
    """
    whole, record = record, _present_fields(record, columns)
    layout = _layout(record, kind)
    _require_wanted(record)
    unused: set[str] = set()
    used = {*layout}
    unwanted = None
    if layout == PREFERENCE_LAYOUT:
        messages, unwanted = _preference(record, unused)
        used.add("prompt")
    elif layout == TEXT_LAYOUT:
        messages = [_text(record, line)]
    elif layout in CONVERSATION_LAYOUTS:
        messages = _decoded_conversation(record[layout[0]], layout[0], unused)
    else:
        messages = _exchange(record, layout, used, unused)
    messages = _with_context(record, list(messages), used)
    _refuse_unsupported(record, used)
    field = layout[-1] if layout not in CONVERSATION_LAYOUTS else layout[0]
    turns = usable(messages, field) if layout != TEXT_LAYOUT else tuple(messages)
    fields = {"record_id": _label(record, "id"), "source": _label(record, "source"), "line": line}
    if kind == "candidate":
        unused |= {name for name in record if name not in used and name not in _QUIET and record[name] is not None}
        theirs = {columns.get(name, name) for name in used} if columns else used
        return Example.create(turns, fields=other_fields(whole, theirs), unused=tuple(sorted(unused)), **fields)
    if turns[-1].content != messages[-1].content and (unwanted is not None or "rejected" in record):
        raise BadRecord(field, "ends in a turn that is not learned; a pair needs its last turn")
    return Example.create(
        turns,
        _rejected(record, layout, turns[-1].content) if unwanted is None else unwanted,
        group=text_or_number(record["group"], "group") if "group" in record else None,
        answers=_answers(record),
        choices=_choices(record, turns[-1].content),
        **fields,
    )


def _present_fields(record: dict, columns: Mapping[str, str] | None) -> dict:
    """The record under our names, without the known fields that are null; unknown nulls serve as hints."""
    if columns:
        needed = {name for layout in (*LAYOUTS, *PAIR_LAYOUTS) for name in layout}
        for ours, theirs in columns.items():
            if ours in needed and record.get(theirs) is None:
                raise BadRecord(theirs, f"missing; `columns` in the settings names it as {ours!r}")
        taken = set(columns.values())
        mapped = {ours: record.get(theirs) for ours, theirs in columns.items()}
        record = mapped | {name: one for name, one in record.items() if name not in taken and name not in mapped}
    return {name: one for name, one in record.items() if one is not None or name not in KNOWN_FIELDS}


def _require_wanted(record: dict) -> None:
    """Raise BadRecord where the record says that its completion is not to be learned."""
    if record.keys().isdisjoint(_SIGNALS):
        return
    for name in UNWANTED_FIELDS:
        value = record.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if isinstance(value, str):
            text = value.strip().lower()  # of a table of texts a number is one too
            is_false = text == "false" or (name in _NUMBERS_COUNT and text in ("0", "0.0"))
        else:
            is_false = value is False or (is_number and name in _NUMBERS_COUNT and value == 0)
        if is_false:
            raise BadRecord(
                name,
                f"{str(value).lower()}: it says that this completion is unwanted, so nothing of it is learned; in a "
                "target it can be the 'rejected' of a record with the wanted completion",
            )
    if given(record.get("mask")) and record["mask"] != "User":
        raise BadRecord("mask", f"{excerpt_of(str(record['mask']))!r} is not supported; write weight: 0 into the turns")


def _refuse_unsupported(record: dict, used: set[str]) -> None:
    for name in record.keys() & _NOT_SUPPORTED.keys():
        if name not in used:
            why = _NOT_SUPPORTED[name]
            if given(record[name]):
                raise BadRecord(name, why)
            used.add(name)


def _with_context(record: dict, messages: list[Message], used: set[str]) -> list[Message]:
    """The turns with those that other fields give: tools, the system turn."""
    if record.keys().isdisjoint(_CONTEXT_FIELDS):
        return messages
    has_system = any(message.role == "system" for message in messages)
    for name in SYSTEM_FIELDS:
        if name not in record:
            continue
        used.add(name)
        if not given(record[name]):
            continue
        text = text_of(record[name], name)
        if has_system and not any(message.role == "system" and message.content == text for message in messages):
            raise BadRecord(name, "the conversation has another system turn; keep one of them")
        if not has_system:
            messages.insert(0, Message("system", text))
            has_system = True
    for name in TOOL_FIELDS:
        if name in record:
            used.add(name)
            tools = tool_definitions(record[name], name)
            if tools is not None:
                messages.insert(0, tools)
    return messages


# -- layouts ------------------------------------------------------------------------------------------------------


def _layout(record: dict, kind: Kind) -> tuple[str, ...]:
    layouts = LAYOUTS if kind == "candidate" else (*LAYOUTS, *PAIR_LAYOUTS)
    complete = next((layout for layout in layouts if all(field in record for field in layout)), None)
    if complete:
        return complete
    if kind == "candidate" and all(field in record for field in PREFERENCE_LAYOUT):
        raise BadRecord(
            "chosen",
            "a pair of a wanted and an unwanted completion is for targets; of candidates one completion is learned: "
            "name it in candidates.columns (completion: chosen, or messages: chosen for an array of turns)",
        )
    # The layout that was probably meant: most fields there, or there under a similar name.
    similar = {field: similar_name(field, record, KNOWN_FIELDS) for layout in layouts for field in layout}
    meant = max(layouts, key=lambda layout: _share_present(layout, record, similar))
    missing = next(field for field in meant if field not in record)
    if similar[missing]:
        raise BadRecord(missing, f"missing; the record has {similar[missing]!r}: rename it to {missing!r}")
    if any(field in record for field in meant):
        raise BadRecord(missing, f"missing; a record with {_present(meant, record)} needs it")
    forms = ", ".join(" + ".join(layout) for layout in layouts)
    found = ", ".join(repr(excerpt_of(name)) for name in list(record)[:NAMES]) or "nothing"
    raise BadRecord(
        missing,
        f"missing; a record has one of {forms}, or its columns are named in the settings (columns); this one has "
        f"{excerpt_of(found)}",
    )


def _share_present(layout: tuple[str, ...], record: dict, similar: dict[str, str | None]) -> float:
    presence = [1.0 if field in record else 0.9 if similar[field] else 0.0 for field in layout]
    return sum(presence) / len(presence)


def _present(layout: tuple[str, ...], record: dict) -> str:
    return " and ".join(repr(field) for field in layout if field in record)


def _decoded_conversation(value: Any, field: str, unused: set[str]) -> list[Message]:
    """The turns of an array, or of its JSON text, which is how a table of texts holds it."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json_value(value)
        except ValueError:
            raise BadRecord(field, "a string that is no JSON array of turns") from None
    return conversation(value, field, unused)


def _exchange(record: dict, layout: tuple[str, ...], used: set[str], unused: set[str]) -> list[Message]:
    """The turns of a record with a prompt and a completion, either as text or as turns."""
    prompt_field, completion_field = layout[:2]
    messages = [] if "history" not in record else _history(record["history"], used)
    prompt = record[prompt_field]
    if _is_turns(prompt):
        messages += conversation(prompt, prompt_field, unused)
    else:
        _refuse_array(prompt, prompt_field)
        prompt = text_of(prompt, prompt_field)
        for name in ("input", "context") if layout == ALPACA_LAYOUT else ():
            added = record.get(name)
            if name in record and (name == "input" or "input" not in used or not given(record.get("input"))):
                used.add(name)
                if given(added) and text_of(added, name).strip():
                    prompt = f"{prompt}\n\n{added}"
        messages.append(Message("user", not_empty(prompt, prompt_field)))
    completion = record[completion_field]
    if _is_turns(completion):
        return messages + conversation(completion, completion_field, unused)
    _refuse_array(completion, completion_field)
    return [*messages, Message("assistant", not_empty(text_of(completion, completion_field), completion_field))]


def _is_turns(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(one, Mapping) for one in value)


def _refuse_array(value: Any, field: str) -> None:
    if isinstance(value, list):
        raise BadRecord(field, "an array, not a string; a conversation goes into 'messages'")


def _history(value: Any, used: set[str]) -> list[Message]:
    used.add("history")
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json_value(value)
        except ValueError:
            raise BadRecord("history", "a string that is no JSON array of pairs") from None
    if not given(value):
        return []
    if not isinstance(value, (list, tuple)):
        raise BadRecord("history", f"{type_name(value)}, not an array of pairs")
    turns = []
    for index, pair in enumerate(value):
        where = f"history[{index}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise BadRecord(where, "not a pair of a question and its answer")
        turns += [Message("user", not_empty(text_of(pair[0], where), where))]
        turns += [Message("assistant", not_empty(text_of(pair[1], where), where))]
    return turns


# -- pairs --------------------------------------------------------------------------------------------------------


def _preference(record: dict, unused: set[str]) -> tuple[tuple[Message, ...], str]:
    """The conversation that ends in what was chosen, and the completion that was rejected, as TRL writes both."""
    sides = {field: record[field] for field in PREFERENCE_LAYOUT}
    for field, value in sides.items():
        if isinstance(value, list) != isinstance(sides["chosen"], list):
            raise BadRecord(
                field, f"{type_name(value)}, and 'chosen' is {type_name(sides['chosen'])}: write both alike"
            )
    given_prompt = record.get("prompt")
    if isinstance(given_prompt, list):
        prompt = conversation(given_prompt, "prompt", unused) if given_prompt else []
    elif given_prompt is not None and not _begins_with(sides["chosen"], given_prompt):
        prompt = [Message("user", not_empty(text_of(given_prompt, "prompt"), "prompt"))]
    elif isinstance(sides["chosen"], list):
        prompt = []
    else:
        raise BadRecord("prompt", "missing; a record with 'chosen' and 'rejected' as strings needs it")
    chosen, rejected = (
        _ending(usable([*prompt, *_completion_turns(value, field, unused)], field), value, field)
        for field, value in sides.items()
    )
    if chosen[:-1] != rejected[:-1]:
        raise BadRecord("rejected", "differs from 'chosen' before its last turn; both must answer the same prompt")
    if chosen[-1] == rejected[-1]:
        raise BadRecord("rejected", "equals the completion, so the pair prefers nothing")
    if chosen[-1].extra or rejected[-1].extra:
        raise BadRecord("chosen", "calls tools or thinks apart from its content; a pair compares texts")
    return chosen, rejected[-1].content


def _begins_with(value: Any, prompt: Any) -> bool:
    """Whether an array of turns begins with the prompt, which is given once more as a text (UltraFeedback)."""
    first = value[0] if isinstance(value, list) and len(value) > 1 else None
    return isinstance(first, Mapping) and first.get("role") == "user" and first.get("content") == prompt


def _ending(turns: tuple[Message, ...], value: Any, field: str) -> tuple[Message, ...]:
    last = value[-1] if isinstance(value, list) else None
    if isinstance(last, Mapping) and last.get("role", last.get("from")) not in ("assistant", "gpt", "chatgpt"):
        name = last.get("role", last.get("from"))
        raise BadRecord(field, f"ends in a {name} turn; it must end in an assistant's, the completion")
    return turns


def _completion_turns(value: Any, field: str, unused: set[str]) -> list[Message]:
    if not isinstance(value, list):
        return [Message("assistant", not_empty(text_of(value, field), field))]
    return conversation(value, field, unused)


def _text(record: dict, line: int) -> Message:
    """The one turn of a record that is a text. Raises `BadRecord` where something else in it would be lost."""
    others = {name for layout in (*LAYOUTS, *PAIR_LAYOUTS) for name in layout} - {"text"}
    for name in record:
        if name in others | _CONTEXT_FIELDS | {"history", "input", "choices"} and given(record[name]):
            raise BadRecord(name, "stands beside 'text', which has no place for it; leave one of them out")
    return Message(TEXT_ROLE, not_empty(text_of(record["text"], "text"), "text"))


def _rejected(record: dict, layout: tuple[str, ...], completion: str) -> str | None:
    field = "unsafe" if layout == PAIR_LAYOUT else "rejected"
    if field not in record:
        return None
    rejected = not_empty(text_of(record[field], field), field)
    if rejected == completion:
        raise BadRecord(field, "equals the completion, so the pair prefers nothing")
    return rejected


# -- optional fields ----------------------------------------------------------------------------------------------


def _answers(record: dict) -> tuple[str, ...]:
    answers: list[str] = []
    for field in ("answer", "answers"):
        value = record.get(field)
        if value is None:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        answers += [not_empty(text_or_number(item, field), field) for item in values]
    return tuple(dict.fromkeys(answers))


def _choices(record: dict, completion: str) -> tuple[str, ...]:
    if "choices" not in record:
        return ()
    value = record["choices"]
    if not isinstance(value, (list, tuple)):
        raise BadRecord("choices", f"{type_name(value)}, not an array of strings")
    choices = tuple(not_empty(text_or_number(item, "choices"), "choices") for item in value)
    repeated, times = Counter(choices).most_common(1)[0] if choices else ("", 0)
    if times > 1:
        raise BadRecord("choices", f"holds {excerpt_of(repeated)!r} twice")
    if completion not in choices:
        raise BadRecord(
            "choices", f"lacks the completion {excerpt_of(completion)!r}; write the options as it is written"
        )
    if len(choices) < 2:
        raise BadRecord("choices", "holds the completion alone; without another option leave it out")
    return choices


def _label(record: dict, field: str) -> str | None:
    """A name, which costs no record: a value that is neither text nor number counts as its JSON text."""
    value: Any = record.get(field)
    if value is None or not given(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return text_or_number(value, field)
    return other_fields({field: value}, ())
