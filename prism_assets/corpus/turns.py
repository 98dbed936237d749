"""The turns of a conversation, as the tools that people use write them, as messages.

A turn has ``role`` and ``content``, or ``from`` and ``value``. Content is text, or an array of parts of type text. What
else a turn says is used, refused by name, or counted as not used; `TURN_FIELDS` says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prism_assets.corpus.json_text import json_value
from prism_assets.corpus.records import (
    BadRecord,
    Message,
    canonical_json,
    excerpt_of,
    not_empty,
    similar_name,
    text_of,
    type_name,
)

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "developer": "system", "tool": "tool"}
ROLES |= {"function": "tool"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "function_call": "call"}
SHAREGPT_ROLES |= {"observation": "tool", "chatgpt": "assistant", **ROLES}

# Fields by which tools say whether a turn is learned: true or 1 is yes, false or 0 is no; `masked` says the opposite.
LEARNED = ("weight", "train", "training", "trainable", "learn", "loss")
NOT_LEARNED = ("masked",)
REASONING = ("reasoning_content", "reasoning", "thinking")
TURN_FIELDS: dict[str, str] = {
    "role, content": "who speaks (system or developer, user, assistant, tool or function) and what",
    "from, value": "the same in ShareGPT's words (system, human, gpt, function_call, observation)",
    ", ".join(LEARNED): "0 or false: the assistant's turn gets no loss; 1 or true: it does. Other values are refused",
    ", ".join(NOT_LEARNED): "true: the assistant's turn gets no loss",
    "mask, train_detail, train_on_input": "refused: say it with `weight`, turn by turn",
    ", ".join(REASONING): "the assistant's thinking: handed to the chat template",
    "tool_calls, function_call": "the assistant's calls of tools: handed to the chat template",
    "tool_call_id, name": "of a tool's turn: handed to the chat template. Elsewhere not used",
    "images, image, audio, video": "refused: text alone is supported",
}
_REFUSED = {
    "mask": "what it means differs from tool to tool; write weight: 0 for a turn without loss",
    "train_detail": "loss on parts of a turn is not supported; split the turn, or write weight: 0",
    "train_on_input": "loss on a user's turn is not supported",
    **dict.fromkeys(("images", "image", "audio", "video"), "not supported: text alone is; leave the record out"),
}
_USED = frozenset(name for names in TURN_FIELDS for name in names.split(", "))


def conversation(turns: Any, field: str, unused: set[str]) -> list[Message]:
    """The messages of an array of turns; names of fields that are not used are added to ``unused``.

    Raises `BadRecord`.
    """
    if isinstance(turns, str) or not isinstance(turns, (list, tuple)):
        raise BadRecord(field, f"{type_name(turns)}, not an array of turns")
    if not turns:
        raise BadRecord(field, "an empty conversation")
    return [_turn(turn, f"{field}[{index}]", unused) for index, turn in enumerate(turns)]


def usable(messages: Sequence[Message], field: str) -> tuple[Message, ...]:
    """The turns up to the last assistant's that is learned: what comes after it is in no loss.

    Assistant turns before the first user turn (a greeting) are kept and not learned. Raises `BadRecord` where nothing
    is learned, or no user speaks before.
    """
    if len(messages) == 2 and messages[0].role == "user" and messages[1].role == "assistant" and messages[1].learn:
        return tuple(messages)
    messages = list(messages)
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise BadRecord(field, f"ends in a {roles[-1]} turn; it must end in an assistant's, the completion")
    first_user = roles.index("user") if "user" in roles else len(messages)
    for index in range(first_user):
        if roles[index] == "assistant":
            messages[index] = messages[index]._replace(learn=False)
    learned = [index for index in range(len(messages)) if roles[index] == "assistant" and messages[index].learn]
    if learned:
        return tuple(messages[: learned[-1] + 1])
    if first_user > len(roles) - 1 - roles[::-1].index("assistant"):
        raise BadRecord(field, "has no user turn before the first assistant turn, so there is no prompt")
    raise BadRecord(field, "says of every assistant turn that it is not learned, so nothing of it is")


def given(value: Any) -> bool:
    """Whether a value says anything: null, empty texts and arrays do not, nor structs whose fields are all so."""
    if isinstance(value, Mapping):
        return any(given(one) for one in value.values())
    if isinstance(value, float) and value != value:
        return False
    return value is not None and (not isinstance(value, (str, list, tuple)) or len(value) > 0)


def said(value: Any, where: str) -> bool:
    """A yes or no, as booleans, 0 and 1 and their texts. Raises `BadRecord`."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "1", "0"):
        return value.strip().lower() in ("true", "1")
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise BadRecord(where, f"{excerpt_of(str(value))!r} is neither 0 nor 1: loss is not weighted by turn")


def tool_definitions(value: Any, field: str) -> Message | None:
    """The tools that a conversation may call, as the turn that holds them; None where there are none."""
    value = _decoded(value)
    if not given(value):
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, Mapping) or callable(one) for one in value):
        raise BadRecord(field, f"{type_name(value)}, not an array of tool definitions (objects)")
    tools = [pruned(one) for one in value]
    if field == "functions":
        tools = [{"type": "function", "function": one} for one in tools]
    return Message("tools", canonical_json(tools))


def pruned(value: Any) -> Any:
    """A value without the nulls that a table writes into structs whose keys differ from row to row."""
    if isinstance(value, Mapping):
        return {str(name): pruned(one) for name, one in value.items() if one is not None}
    if isinstance(value, (list, tuple)):
        return [pruned(one) for one in value]
    return value


# -- one turn -----------------------------------------------------------------------------------------------------


def _turn(turn: Any, where: str, unused: set[str]) -> Message:
    if not isinstance(turn, Mapping):
        raise BadRecord(where, f"{type_name(turn)}, not an object")
    names = turn.keys()
    # A null counts as absent: in a table each turn has the fields of all.
    sharegpt = _has_neither(turn, "role", "content") and not _has_neither(turn, "from", "value")
    role_field, content_field = ("from", "value") if sharegpt else ("role", "content")
    role = _role(turn, role_field, where, SHAREGPT_ROLES if sharegpt or turn.get("from") is not None else ROLES)
    extra: dict[str, Any] = {}
    if len(names) > 2:
        _refuse_or_count(turn, role, where, unused)
        extra = _extra(turn, role, where)
    value = turn.get(content_field)
    if role == "call":
        extra["tool_calls"] = _calls(_decoded(value), f"{where}.{content_field}")
        return Message("assistant", "", _learned(turn, "assistant", where), canonical_json(extra))
    if value is None and "tool_calls" in extra:
        value = ""
    if value is None:
        _raise_missing(turn, content_field, where)
    content = _content(value, f"{where}.{content_field}", extra)
    # An empty system turn has a meaning: it silences a template's default one. A call needs no words.
    if role not in ("system", "tool") and "tool_calls" not in extra:
        not_empty(content, f"{where}.{content_field}")
    learn = len(names) <= 2 or _learned(turn, role, where)
    return Message(role, content, learn, canonical_json(extra) if extra else "")


def _has_neither(turn: Mapping, one: str, other: str) -> bool:
    return turn.get(one) is None and turn.get(other) is None


def _role(turn: Mapping, field: str, where: str, known: Mapping[str, str]) -> str:
    if turn.get(field) is None:
        _raise_missing(turn, field, where)
    role = text_of(turn[field], f"{where}.{field}")
    if role not in known:
        raise BadRecord(f"{where}.{field}", f"unknown role {excerpt_of(role)!r}; known are {', '.join(known)}")
    return known[role]


def _raise_missing(turn: Mapping, name: str, where: str) -> None:
    similar = similar_name(name, turn)
    hint = f"; the turn has {similar!r}: rename it to {name!r}" if similar and turn.get(similar) is not None else ""
    raise BadRecord(f"{where}.{name}", f"missing{hint}")


def _refuse_or_count(turn: Mapping, role: str, where: str, unused: set[str]) -> None:
    for name, value in turn.items():
        if name in _REFUSED and given(value):
            raise BadRecord(f"{where}.{name}", _REFUSED[name])
        if (name not in _USED or (name in ("name", "tool_call_id") and role != "tool")) and given(value):
            unused.add(f"{where.partition('[')[0]}[].{name}")


def _learned(turn: Mapping, role: str, where: str) -> bool:
    """Whether an assistant's turn is learned. Raises `BadRecord` for a turn of somebody else that is to be learned."""
    answers = {name: said(turn[name], f"{where}.{name}") for name in LEARNED if given(turn.get(name))}
    answers |= {name: not said(turn[name], f"{where}.{name}") for name in NOT_LEARNED if given(turn.get(name))}
    if not answers:
        return True
    if len(set(answers.values())) > 1:
        raise BadRecord(where, f"{' and '.join(answers)} contradict each other")
    learn = next(iter(answers.values()))
    if learn and role != "assistant":
        raise BadRecord(f"{where}.{next(iter(answers))}", f"loss on a {role} turn is not supported")
    return learn


def _content(value: Any, where: str, extra: dict[str, Any]) -> str:
    """The text of a turn; parts of type text follow each other as templates write them."""
    if not isinstance(value, (list, tuple)):
        return text_of(value, where)
    texts = []
    for index, part in enumerate(value):
        here = f"{where}[{index}]"
        if isinstance(part, str):
            texts.append(text_of(part, here))
            continue
        if not isinstance(part, Mapping):
            raise BadRecord(here, f"{type_name(part)}, not a part of a content")
        kind = part.get("type")
        if kind is None and part.get("text") is not None:
            kind = "text"
        if kind not in ("text", "input_text", "output_text"):
            raise BadRecord(f"{here}.type", f"{kind!r}: parts of type text alone are supported")
        texts.append(text_of(part.get("text"), f"{here}.text"))
    return "".join(texts)


def _extra(turn: Mapping, role: str, where: str) -> dict[str, Any]:
    """What the chat template is handed of a turn beside role and content."""
    extra: dict[str, Any] = {}
    thoughts = {name: turn[name] for name in REASONING if given(turn.get(name))}
    calls = {name: turn[name] for name in ("tool_calls", "function_call") if given(turn.get(name))}
    if role != "assistant" and (thoughts or calls):
        name = next(iter(thoughts or calls))
        raise BadRecord(f"{where}.{name}", f"an assistant's turn alone has it, not a {role}'s")
    if thoughts:
        texts = {text_of(value, f"{where}.{name}") for name, value in thoughts.items()}
        if len(texts) > 1:
            raise BadRecord(where, f"{' and '.join(thoughts)} differ; keep one")
        extra["reasoning_content"] = texts.pop()
    if calls:
        name, value = next(iter(calls.items()))
        extra["tool_calls"] = _calls(_decoded(value), f"{where}.{name}")
    if role == "tool":
        for name in ("name", "tool_call_id"):
            if given(turn.get(name)):
                extra[name] = text_of(turn[name], f"{where}.{name}")
    return extra


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools in the form that chat templates read: objects with `function`, whose arguments are an object."""
    calls = []
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(one, Mapping):
            raise BadRecord(where, f"{type_name(one)}, not a call of a tool (an object)")
        call = one["function"] if isinstance(one.get("function"), Mapping) else one
        name, arguments = call.get("name"), _decoded(call.get("arguments", call.get("parameters")))
        if not isinstance(name, str) or not name:
            raise BadRecord(where, "a call of a tool without its name")
        if arguments is not None and not isinstance(arguments, Mapping):
            raise BadRecord(where, f"the arguments of {name} are {type_name(arguments)}, not an object")
        made = {"type": "function", "function": {"name": name, "arguments": pruned(arguments or {})}}
        calls.append({"id": str(one["id"]), **made} if given(one.get("id")) else made)
    return calls


def _decoded(value: Any) -> Any:
    """The value that a JSON text holds; anything else as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json_value(value)
        except ValueError:
            return value
    return value
