"""What a record becomes: a conversation that ends in a completion, with its identity; and what a reject says."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from json.encoder import encode_basestring as _quoted
from typing import Any, Literal, NamedTuple

Kind = Literal["candidate", "target", "eval"]  # what the records of a file are for

TEXT_ROLE = "text"
EXCERPT_CHARACTERS = 160
# Of a record without a layout the names are compared with ours: so many of them, and so much of each.
NAMES, _NAME_CHARACTERS = 200, 100
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
    """One turn of a conversation.

    role: system, user, assistant or tool; "tools" for the definitions of tools, as JSON text, before all turns;
    `TEXT_ROLE` for the only turn of a record that is a text without a prompt, and stands in no template. learn:
    whether an assistant's turn has loss. extra: JSON text of what a chat template is handed beside role and content
    (`reasoning_content`, `tool_calls`, `tool_call_id`, `name`), empty for nothing.
    """

    role: str
    content: str
    learn: bool = True
    extra: str = ""

    def as_turn(self) -> dict[str, Any]:
        """The turn as people and chat templates write it; ``weight`` 0 where it is not learned."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.extra:
            turn |= json.loads(self.extra)
        return turn if self.learn else turn | {"weight": 0}


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
    # Names of fields that are known to no format, and so are not used.
    unused: tuple[str, ...] = dataclass_field(default=(), compare=False)
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
    if rejected is None and not any(message.extra or not message.learn for message in messages):
        # The same text as below, without an encoder: this is done for every record.
        turns = ",".join(f"[{_quoted(message.role)},{_quoted(message.content)}]" for message in messages)
        serialised = f'{{"messages":[{turns}]}}'
    else:
        content: dict[str, Any] = {"messages": [_identity(message) for message in messages]}
        if rejected is not None:
            content["rejected"] = rejected
        serialised = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(serialised.encode("utf-8")).hexdigest()[:32]


def _identity(message: Message) -> list[Any]:
    """What of a turn is content: a plain turn's role and text, and beside it what else is learned from."""
    if message.learn and not message.extra:
        return [message.role, message.content]
    return [message.role, message.content, message.learn, message.extra]


def messages_to_json(messages: Sequence[Message]) -> str:
    """The turns as a JSON array of objects with role and content, and what else they say."""
    if all(message.learn and not message.extra for message in messages):
        # The same text as below, without an encoder, as in `content_id`.
        turns = [f'{{"role": {_quoted(one.role)}, "content": {_quoted(one.content)}}}' for one in messages]
        return f"[{', '.join(turns)}]"
    return json.dumps([message.as_turn() for message in messages], ensure_ascii=False)


def messages_from_json(text: str) -> tuple[Message, ...]:
    """The inverse of `messages_to_json`."""
    return tuple(map(_from_turn, json.loads(text)))


def _from_turn(turn: dict[str, Any]) -> Message:
    extra = {name: value for name, value in turn.items() if name not in ("role", "content", "weight")}
    return Message(turn["role"], turn["content"], turn.get("weight") != 0, canonical_json(extra) if extra else "")


def canonical_json(value: Any) -> str:
    """A JSON value as compact text, names in their order. Raises `BadRecord`."""
    try:
        text = _COMPACT.encode(value)
    except (TypeError, ValueError) as error:
        raise BadRecord("", f"holds a value that JSON cannot: {error}") from None
    return text_of(text, "")


_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)  # made once: it is asked often


def excerpt_of(text: str) -> str:
    """The first `EXCERPT_CHARACTERS` of a text, safe to store as UTF-8."""
    text = storable(text)
    return text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 1] + "…"


def storable(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, as their escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def type_name(value: Any) -> str:
    """What a value read from JSON or Parquet is, in the words of a reject."""
    return JSON_TYPE_NAMES.get(type(value), f"a {type(value).__name__} value")


# --- Values of a record -----------------------------------------------------------------------------------


class BadRecord(Exception):
    """A record that is no example: ``field`` (a path in the record, or empty) and ``reason`` become a `Reject`.

    Both may quote the record: they are made fit to be stored.
    """

    def __init__(self, field: str, reason: str):
        field, reason = excerpt_of(field), storable(reason)
        super().__init__(field, reason)
        self.field, self.reason = field, reason


def similar_name(field: str, record: Mapping[str, Any], known: Collection[str] = ()) -> str | None:
    """The name in a record that was probably written for ``field``; names that are ``known`` mean themselves."""
    others = [name for name in record if name not in known and name != field]
    names = {name[:_NAME_CHARACTERS].lower(): name for name in others[:NAMES]}
    close = difflib.get_close_matches(field, names, n=1, cutoff=0.75)
    return names[close[0]] if close else None


def text_or_number(value: Any, field: str) -> str:
    """A text, or a number as text. Raises `BadRecord`."""
    if isinstance(value, float) and value.is_integer():  # 18.0, which a table makes of a column of numbers
        return str(int(value))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return text_of(value, field)


def text_of(value: Any, field: str) -> str:
    """A text that UTF-8 can hold. Raises `BadRecord`."""
    if not isinstance(value, str):
        raise BadRecord(field, f"{type_name(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"a lone surrogate at character {error.start + 1}; write UTF-8, or a whole surrogate pair"
        raise BadRecord(field, reason) from None
    return value


def not_empty(text: str, field: str) -> str:
    """A text with a character that is no white space. Raises `BadRecord`."""
    if not text.strip():
        raise BadRecord(field, "empty" if not text else "nothing but white space")
    return text
