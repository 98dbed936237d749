"""Records of JSON Lines and Parquet files as validated examples.

A record has one of these layouts (a null field counts as absent; other fields are ignored):

- ``prompt`` and ``completion``;
- ``messages``: objects with ``role`` (system, user, assistant) and ``content``; the assistant has the last;
- ``conversations``: the ShareGPT form of the same, ``from`` (system, human, gpt) and ``value``;
- ``instruction``, ``output``, optionally ``input`` (Alpaca; a blank line joins instruction and input);
- ``prompt``, ``safe``, ``unsafe`` (targets and held-out records only): the wanted and the unwanted completion;
- ``chosen``, ``rejected`` (targets and held-out records only), as TRL has them: strings beside a ``prompt``, or arrays
  of turns, with the prompt's turns in ``prompt`` or at the start of both.

Optional: ``id`` and ``source``; for targets and held-out records also ``rejected`` (the unwanted completion,
which makes the record a pair), ``group`` (a subtask), ``answer`` or ``answers`` (accepted answers), ``choices`` (an
array of the completions to choose from, the record's own among them).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, Literal, NamedTuple

from prism_assets.corpus.record_fields import other_fields

Kind = Literal["candidate", "target", "eval"]  # what the records of a file are for

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}

# What a turn says outside its content. Dropping it would train on something else than the file holds.
UNSUPPORTED_TURN_FIELDS = ("tool_calls", "function_call", "reasoning_content", "thinking")
ALPACA_LAYOUT = ("instruction", "output")
LAYOUTS = (("prompt", "completion"), ("messages",), ("conversations",), ALPACA_LAYOUT)
PAIR_LAYOUT = ("prompt", "safe", "unsafe")
PREFERENCE_LAYOUT = ("chosen", "rejected")
PAIR_LAYOUTS = (PAIR_LAYOUT, PREFERENCE_LAYOUT)
OPTIONAL_FIELDS = ("input", "id", "source", "rejected", "group", "answer", "answers", "choices")
KNOWN_FIELDS = frozenset(field for layout in (*LAYOUTS, *PAIR_LAYOUTS, OPTIONAL_FIELDS) for field in layout)
TEXT_FIELDS = KNOWN_FIELDS - {"id", "source", "group"}  # no date is text of a conversation, but it may be a name
EXCERPT_CHARACTERS = 160
# Of a record without a layout the names are compared with ours: so many of them, and so much of each.
_NAMES, _NAME_CHARACTERS = 200, 100
JSON_TYPE_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}


class Message(NamedTuple):
    """One turn of a conversation; ``role`` is system, user or assistant."""

    role: str
    content: str


class Reject(NamedTuple):
    """A record that was not accepted: 1-based line (row number in Parquet), field, reason, start of the record."""

    line: int
    field: str
    reason: str
    excerpt: str


@dataclass(frozen=True)
class Example:
    """A conversation that ends in a completion, with what its record says about it.

    ``id`` is a hash of the content alone (see `content_id`), so equal examples have equal ids whatever their
    file, record id or source. ``line`` is the 1-based line, or the row number in Parquet.
    """

    id: str
    messages: tuple[Message, ...]
    record_id: str | None = None
    source: str | None = None
    line: int = 0
    rejected: str | None = None
    group: str | None = None
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    # The fields of the record that are no part of the conversation, as JSON text; no part of the content either.
    fields: str = dataclass_field(default="{}", compare=False)

    @classmethod
    def create(cls, messages: Sequence[Message], rejected: str | None = None, **fields: Any) -> Example:
        """An example with the id that belongs to its content."""
        messages = tuple(Message(*message) for message in messages)
        return cls(content_id(messages, rejected), messages, rejected=rejected, **fields)

    @property
    def conversation_id(self) -> str:
        """The id without ``rejected``: what a candidate of equal content has as its id."""
        return self.id if self.rejected is None else content_id(self.messages)

    @property
    def prompt_text(self) -> str:
        """All before the completion, for people to read: the prompt, or the turns, each led by its role."""
        context = self.messages[:-1]
        if len(context) == 1:
            return context[0].content
        return "\n\n".join(f"{message.role}: {message.content}" for message in context)

    @property
    def completion_text(self) -> str:
        """The last assistant turn."""
        return self.messages[-1].content


def content_id(messages: Sequence[Message], rejected: str | None = None) -> str:
    """32 hexadecimal digits of SHA-256 over the JSON form of the turns, and of ``rejected`` where given."""
    content: dict[str, Any] = {"messages": [[message.role, message.content] for message in messages]}
    if rejected is not None:
        content["rejected"] = rejected
    serialised = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(serialised.encode("utf-8")).hexdigest()[:32]


def messages_to_json(messages: Sequence[Message]) -> str:
    """The turns as a JSON array of objects with role and content."""
    return json.dumps([message._asdict() for message in messages], ensure_ascii=False)


def messages_from_json(text: str) -> tuple[Message, ...]:
    """The inverse of `messages_to_json`."""
    return tuple(Message(turn["role"], turn["content"]) for turn in json.loads(text))


def excerpt_of(text: str) -> str:
    """The first `EXCERPT_CHARACTERS` of a text, safe to store as UTF-8."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 1] + "…"


def type_name(value: Any) -> str:
    """What a value read from JSON or Parquet is, in the words of a reject."""
    return JSON_TYPE_NAMES.get(type(value), f"a {type(value).__name__} value")


# --- Records to examples ---------------------------------------------------------------------------------


class BadRecord(Exception):
    """A record that is no example: ``field`` (a path in the record, or empty) and ``reason`` become a `Reject`."""

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


def example_of(record: dict, line: int, kind: Kind) -> Example:
    """The record as an example of its line, with the optional fields that count for this kind.

    Raises `BadRecord`, naming the field, for one that has none of the layouts or a value that is not allowed.
    """
    record = {name: value for name, value in record.items() if value is not None} | {
        name: None for name, value in record.items() if value is None and name not in KNOWN_FIELDS
    }
    layout = _layout(record, kind)
    unwanted = None
    if layout == PREFERENCE_LAYOUT:
        messages, unwanted = _preference(record)
    elif layout in (("messages",), ("conversations",)):
        messages = _conversation(record[layout[0]], layout[0])
    else:
        messages = _single_turn(record, layout)
    fields = {"record_id": _label(record, "id"), "source": _label(record, "source"), "line": line}
    if kind == "candidate":
        used = (*layout, "input") if layout == ALPACA_LAYOUT else layout
        return Example.create(messages, fields=other_fields(record, used), **fields)
    return Example.create(
        messages,
        _rejected(record, layout, messages[-1].content) if unwanted is None else unwanted,
        group=_label(record, "group"),
        answers=_answers(record),
        choices=_choices(record, messages[-1].content),
        **fields,
    )


def _layout(record: dict, kind: Kind) -> tuple[str, ...]:
    layouts = LAYOUTS if kind == "candidate" else (*LAYOUTS, *PAIR_LAYOUTS)
    complete = next((layout for layout in layouts if all(field in record for field in layout)), None)
    if complete:
        return complete
    # The layout that was probably meant: most fields there, or there under a similar name.
    similar = {field: _similar(field, record) for layout in layouts for field in layout}
    meant = max(layouts, key=lambda layout: _share_present(layout, record, similar))
    missing = next(field for field in meant if field not in record)
    if similar[missing]:
        raise BadRecord(missing, f"missing; the record has {similar[missing]!r}: rename it to {missing!r}")
    if any(field in record for field in meant):
        raise BadRecord(missing, f"missing; a record with {_present(meant, record)} needs it")
    forms = ", ".join(" + ".join(layout) for layout in layouts)
    found = ", ".join(repr(excerpt_of(name)) for name in list(record)[:_NAMES]) or "nothing"
    raise BadRecord(missing, f"missing; a record has one of {forms}; this one has {excerpt_of(found)}")


def _share_present(layout: tuple[str, ...], record: dict, similar: dict[str, str | None]) -> float:
    presence = [1.0 if field in record else 0.9 if similar[field] else 0.0 for field in layout]
    return sum(presence) / len(presence)


def _present(layout: tuple[str, ...], record: dict) -> str:
    return " and ".join(repr(field) for field in layout if field in record)


def _similar(field: str, record: dict) -> str | None:
    others = [name for name in record if name not in KNOWN_FIELDS]
    names = {name[:_NAME_CHARACTERS].lower(): name for name in others[:_NAMES]}
    close = difflib.get_close_matches(field, names, n=1, cutoff=0.75)
    return names[close[0]] if close else None


def _single_turn(record: dict, layout: tuple[str, ...]) -> tuple[Message, ...]:
    prompt_field, completion_field = layout[:2]
    for field in layout[:2]:
        if isinstance(record[field], list):
            raise BadRecord(field, "an array, not a string; a conversation goes into 'messages'")
    prompt = _text(record[prompt_field], prompt_field)
    if prompt_field == "instruction" and "input" in record:
        added = _text(record["input"], "input")
        prompt = f"{prompt}\n\n{added}" if added.strip() else prompt
    completion = _text(record[completion_field], completion_field)
    return (
        Message("user", _not_empty(prompt, prompt_field)),
        Message("assistant", _not_empty(completion, completion_field)),
    )


def _conversation(turns: Any, field: str) -> tuple[Message, ...]:
    if isinstance(turns, str) or not isinstance(turns, (list, tuple)):
        raise BadRecord(field, f"{type_name(turns)}, not an array of turns")
    if not turns:
        raise BadRecord(field, "an empty conversation")
    return _checked([_turn(turn, f"{field}[{index}]", field) for index, turn in enumerate(turns)], field)


def _checked(turns: Sequence[Message], field: str) -> tuple[Message, ...]:
    """The turns, as far as they are a prompt and a completion."""
    messages = tuple(turns)
    roles = [message.role for message in messages]
    if roles[-1] != "assistant":
        raise BadRecord(field, f"ends in a {roles[-1]} turn; it must end in an assistant's, the completion")
    if "user" not in roles[: roles.index("assistant")]:
        raise BadRecord(field, "has no user turn before the first assistant turn, so there is no prompt")
    return messages


def _preference(record: dict) -> tuple[tuple[Message, ...], str]:
    """The conversation that ends in what was chosen, and the completion that was rejected, as TRL writes both."""
    sides = {field: record[field] for field in PREFERENCE_LAYOUT}
    for field, value in sides.items():
        if isinstance(value, list) != isinstance(sides["chosen"], list):
            raise BadRecord(
                field, f"{type_name(value)}, and 'chosen' is {type_name(sides['chosen'])}: write both alike"
            )
    given = record.get("prompt")
    if isinstance(given, list):
        prompt = [_turn(turn, f"prompt[{index}]", "messages") for index, turn in enumerate(given)]
    elif given is not None:
        prompt = [Message("user", _not_empty(_text(given, "prompt"), "prompt"))]
    elif isinstance(sides["chosen"], list):
        prompt = []
    else:
        raise BadRecord("prompt", "missing; a record with 'chosen' and 'rejected' as strings needs it")
    chosen, rejected = (_checked([*prompt, *_completion_turns(value, field)], field) for field, value in sides.items())
    if chosen[:-1] != rejected[:-1]:
        raise BadRecord("rejected", "differs from 'chosen' before its last turn; both must answer the same prompt")
    if chosen[-1] == rejected[-1]:
        raise BadRecord("rejected", "equals the completion, so the pair prefers nothing")
    return chosen, rejected[-1].content


def _completion_turns(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list):
        return [Message("assistant", _not_empty(_text(value, field), field))]
    if not value:
        raise BadRecord(field, "an empty conversation")
    return [_turn(turn, f"{field}[{index}]", "messages") for index, turn in enumerate(value)]


def _turn(turn: Any, where: str, field: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRecord(where, f"{type_name(turn)}, not an object")
    role_field, content_field = ("role", "content") if field == "messages" else ("from", "value")
    for name in UNSUPPORTED_TURN_FIELDS:
        if turn.get(name):
            raise BadRecord(f"{where}.{name}", "not supported; write it into the content")
    for name in (role_field, content_field):
        if turn.get(name) is None:
            similar = _similar(name, turn)
            hint = f"; the turn has {similar!r}: rename it to {name!r}" if similar else ""
            raise BadRecord(f"{where}.{name}", f"missing{hint}")
    role = _text(turn[role_field], f"{where}.{role_field}")
    known = {name: name for name in ROLES} if field == "messages" else SHAREGPT_ROLES
    if role not in known:
        reason = f"unknown role {excerpt_of(role)!r}; known are {', '.join(known)}"
        raise BadRecord(f"{where}.{role_field}", reason)
    content = _text(turn[content_field], f"{where}.{content_field}")
    if known[role] != "system":  # an empty system turn has a meaning: it silences a template's default one
        _not_empty(content, f"{where}.{content_field}")
    return Message(known[role], content)


def _rejected(record: dict, layout: tuple[str, ...], completion: str) -> str | None:
    field = "unsafe" if layout == PAIR_LAYOUT else "rejected"
    if field not in record:
        return None
    rejected = _not_empty(_text(record[field], field), field)
    if rejected == completion:
        raise BadRecord(field, "equals the completion, so the pair prefers nothing")
    return rejected


def _answers(record: dict) -> tuple[str, ...]:
    answers: list[str] = []
    for field in ("answer", "answers"):
        value = record.get(field)
        if value is None:
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        answers += [_not_empty(_text_or_number(item, field), field) for item in values]
    return tuple(dict.fromkeys(answers))


def _choices(record: dict, completion: str) -> tuple[str, ...]:
    if "choices" not in record:
        return ()
    value = record["choices"]
    if not isinstance(value, (list, tuple)):
        raise BadRecord("choices", f"{type_name(value)}, not an array of strings")
    choices = tuple(_not_empty(_text_or_number(item, "choices"), "choices") for item in value)
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
    return _text_or_number(record[field], field) if field in record else None


def _text_or_number(value: Any, field: str) -> str:
    if isinstance(value, float) and value.is_integer():  # 18.0, which a table makes of a column of numbers
        return str(int(value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return _text(value, field)


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(field, f"{type_name(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"a lone surrogate at character {error.start + 1}; write UTF-8, or a whole surrogate pair"
        raise BadRecord(field, reason) from None
    return value


def _not_empty(text: str, field: str) -> str:
    if not text.strip():
        raise BadRecord(field, "empty" if not text else "nothing but white space")
    return text
