"""Records of JSON Lines and Parquet files as validated examples.

A record has one of these layouts (a null field counts as absent; other fields are ignored):

- ``prompt`` and ``completion``;
- ``messages``: objects with ``role`` (system, user, assistant) and ``content``; the assistant has the last;
- ``conversations``: the ShareGPT form of the same, ``from`` (system, human, gpt) and ``value``;
- ``instruction``, ``output``, optionally ``input`` (Alpaca; a blank line joins instruction and input);
- ``prompt``, ``safe``, ``unsafe`` (targets and eval records only): completion and rejected completion.

Optional: ``id`` and ``source``; for targets and eval records also ``rejected`` (a completion to stay away
from, which makes the record a pair), ``group`` (a subtask), ``answer`` or ``answers`` (accepted answers).
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Kind = Literal["candidate", "target", "eval"]

JSON_LINES_EXTENSIONS = (".jsonl", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PARQUET_EXTENSIONS = (".parquet",)
DATA_EXTENSIONS = (
    *JSON_LINES_EXTENSIONS,
    *(extension + suffix for extension in JSON_LINES_EXTENSIONS for suffix in COMPRESSIONS),
    *PARQUET_EXTENSIONS,
)

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}
# What a turn says outside its content. Dropping it would train on something else than the file holds.
UNSUPPORTED_TURN_FIELDS = ("tool_calls", "function_call", "reasoning_content", "thinking")

LAYOUTS = (("prompt", "completion"), ("messages",), ("conversations",), ("instruction", "output"))
PAIR_LAYOUT = ("prompt", "safe", "unsafe")
OPTIONAL_FIELDS = ("input", "id", "source", "rejected", "group", "answer", "answers")
KNOWN_FIELDS = frozenset(field for layout in (*LAYOUTS, PAIR_LAYOUT, OPTIONAL_FIELDS) for field in layout)

JSON_TYPE_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}
EXCERPT_CHARACTERS = 160
PARQUET_BATCH_ROWS = 1024


class UnreadableFile(ValueError):
    """A file that cannot be read at all; the message names it, says why, and what to do."""

    def __init__(self, path: Path | str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason


class MixedTargets(ValueError):
    """A target or eval file of plain records and pairs; ``plain_line`` and ``pair_line`` are the first."""

    def __init__(self, path: Path | str, plain_line: int, pair_line: int):
        super().__init__(
            f"{path}: line {plain_line} is a plain record and line {pair_line} a pair (it has a rejected "
            "completion); a file holds plain records or pairs, not both: split it into two targets"
        )
        self.path, self.plain_line, self.pair_line = Path(path), plain_line, pair_line


class Message(NamedTuple):
    """One turn of a conversation; ``role`` is system, user or assistant."""

    role: str
    content: str


class Reject(NamedTuple):
    """A record that was refused: 1-based line (row number in Parquet), field, reason, start of the record."""

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


def data_extension(name: str) -> str | None:
    """The accepted extension at the end of a file name (".jsonl.gz", ".parquet", …), or None."""
    lowered = name.lower()
    return next((extension for extension in DATA_EXTENSIONS if lowered.endswith(extension)), None)


def read_examples(path: Path | str, kind: Kind) -> tuple[list[Example], list[Reject]]:
    """Reads one file; returns its examples in file order and a reject for each record that is none.

    Of records with equal content the first is kept. Raises `UnreadableFile` where the file as a whole cannot
    be read (so a damaged file never yields half of its records), and `MixedTargets` where a target or eval
    file holds plain records and pairs.
    """
    path = Path(path)
    examples: list[Example] = []
    rejects: list[Reject] = []
    records = 0
    for line, record, excerpt in _records(path):
        records += 1
        try:
            if isinstance(record, _BadRecord):
                raise record
            examples.append(_example(record, line, kind))
        except _BadRecord as bad:
            rejects.append(Reject(line, bad.field, bad.reason, excerpt()))
    if not records:
        raise UnreadableFile(path, "holds no records; write one record a line, or remove the file")
    if kind != "candidate":
        _check_one_kind(path, examples)
    examples, duplicates = _drop_duplicates(examples)
    return examples, sorted(rejects + duplicates)


def shorten(text: str) -> str:
    """The start of a text, safe to store as UTF-8."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= EXCERPT_CHARACTERS else text[: EXCERPT_CHARACTERS - 1] + "…"


# --- Files to records ------------------------------------------------------------------------------------


class _BadRecord(Exception):
    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


# Line number, the record or why there is none, and a function that gives the excerpt (only rejects need one).
_Record = tuple[int, "dict | _BadRecord", Any]


def _records(path: Path) -> Iterator[_Record]:
    extension = _checked_extension(path)
    if extension in PARQUET_EXTENSIONS:
        return _parquet_records(path)
    return _json_records(path, COMPRESSIONS.get(Path(extension).suffix))


def _checked_extension(path: Path) -> str:
    if path.is_dir():
        raise UnreadableFile(path, "is a directory; name a file in it")
    if not path.is_file():
        raise UnreadableFile(path, "does not exist; check the path in the settings")
    extension = data_extension(path.name)
    if extension is None:
        advice = f"unknown extension; known are {', '.join(DATA_EXTENSIONS)}"
        if path.suffix.lower() == ".json":
            advice += "; name it .jsonl if it has one object a line, else convert it: jq -c '.[]'"
        raise UnreadableFile(path, advice)
    if path.stat().st_size == 0:
        raise UnreadableFile(path, "is empty; write one record a line, or remove the file")
    return extension


def _json_records(path: Path, compression: str | None) -> Iterator[_Record]:
    for line, raw in _numbered_lines(path, compression):
        try:
            record: dict | _BadRecord = _json_object(raw)
        except _BadRecord as bad:
            record = bad
        yield line, record, lambda raw=raw: _json_excerpt(raw)


def _json_excerpt(raw: bytes) -> str:
    return shorten(raw[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace"))


def _numbered_lines(path: Path, compression: str | None) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, without line end and byte order mark, numbered from 1.

    Split at line feeds alone: JSON strings may hold other line separators, such as U+2028.
    """
    try:
        with _open_bytes(path, compression) as stream:
            for line, raw in enumerate(stream, start=1):
                if line == 1:
                    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise UnreadableFile(path, "is UTF-16; save it as UTF-8")
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                raw = raw.rstrip(b" \t\r\n")
                if raw:
                    yield line, raw
    except OSError as error:
        if compression:
            advice = f"is not whole {compression} data ({error}); compress it again, or copy it again"
        else:
            advice = f"cannot be read ({error}); check its permissions and the disk"
        raise UnreadableFile(path, advice) from error


def _open_bytes(path: Path, compression: str | None) -> io.BufferedIOBase:
    if compression is None:
        return path.open("rb")
    import pyarrow as pa  # here, so that listing an inbox needs no pyarrow

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), compression), 1 << 16)


def _json_object(raw: bytes) -> dict:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadRecord("", f"invalid UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    try:
        record = json.loads(text, object_pairs_hook=_object_without_repeats)
    except json.JSONDecodeError as error:
        raise _BadRecord("", f"invalid JSON at column {error.pos + 1}: {error.msg}") from None
    except RecursionError:
        raise _BadRecord("", "invalid JSON: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise _BadRecord("", f"invalid JSON: {error}") from None
    if not isinstance(record, dict):
        advice = "; jq -c '.[]' turns an array into lines" if isinstance(record, list) else ""
        raise _BadRecord("", f"{_type_name(record)}, not an object{advice}")
    return record


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _BadRecord(repeated, "given twice in one object; keep one")
    return record


def _parquet_records(path: Path) -> Iterator[_Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            # Other columns may be wide (embeddings) or have no Python value; their names serve as hints.
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise UnreadableFile(path, "has two columns of one name; rename one")
            columns = [name for name in names if name in KNOWN_FIELDS]
            row = 0
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=columns):
                for record in _batch_records(batch):
                    row += 1
                    if isinstance(record, dict):
                        record = {**dict.fromkeys(names), **record}
                    yield row, record, lambda record=record: _parquet_excerpt(record)
    except (pa.ArrowException, OSError) as error:
        advice = f"is not a whole Parquet file ({error}); write it again, or copy it again"
        raise UnreadableFile(path, advice) from error


def _batch_records(batch: Any) -> Iterator[dict | _BadRecord]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not validate strings: find the rows that are not UTF-8
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield _BadRecord("", f"invalid UTF-8 at byte {error.start + 1} of a value; write UTF-8")


def _parquet_excerpt(record: dict | _BadRecord) -> str:
    if isinstance(record, _BadRecord):
        return ""
    given = {name: value for name, value in record.items() if value is not None}
    return shorten(json.dumps(given, ensure_ascii=False, default=str))


# --- Records to examples ---------------------------------------------------------------------------------


def _example(record: dict, line: int, kind: Kind) -> Example:
    record = {name: value for name, value in record.items() if value is not None} | {
        name: None for name, value in record.items() if value is None and name not in KNOWN_FIELDS
    }
    layout = _layout(record, kind)
    if layout in (("messages",), ("conversations",)):
        messages = _conversation(record[layout[0]], layout[0])
    else:
        messages = _single_turn(record, layout)
    fields = {"record_id": _label(record, "id"), "source": _label(record, "source"), "line": line}
    if kind == "candidate":
        return Example.create(messages, **fields)
    return Example.create(
        messages,
        _rejected(record, layout, messages[-1].content),
        group=_label(record, "group"),
        answers=_answers(record),
        **fields,
    )


def _layout(record: dict, kind: Kind) -> tuple[str, ...]:
    layouts = LAYOUTS if kind == "candidate" else (*LAYOUTS, PAIR_LAYOUT)
    complete = next((layout for layout in layouts if all(field in record for field in layout)), None)
    if complete:
        return complete
    # The layout that was probably meant: most fields there, or there under a similar name.
    similar = {field: _similar(field, record) for layout in layouts for field in layout}
    meant = max(layouts, key=lambda layout: _share_present(layout, record, similar))
    missing = next(field for field in meant if field not in record)
    if similar[missing]:
        raise _BadRecord(missing, f"missing; the record has {similar[missing]!r}: rename it to {missing!r}")
    if any(field in record for field in meant):
        raise _BadRecord(missing, f"missing; a record with {_present(meant, record)} needs it")
    forms = ", ".join(" + ".join(layout) for layout in layouts)
    found = ", ".join(map(repr, record)) or "nothing"
    raise _BadRecord(missing, f"missing; a record has one of {forms}; this one has {shorten(found)}")


def _share_present(layout: tuple[str, ...], record: dict, similar: dict[str, str | None]) -> float:
    presence = [1.0 if field in record else 0.9 if similar[field] else 0.0 for field in layout]
    return sum(presence) / len(presence)


def _present(layout: tuple[str, ...], record: dict) -> str:
    return " and ".join(repr(field) for field in layout if field in record)


def _similar(field: str, record: dict) -> str | None:
    names = {name.lower(): name for name in record if name not in KNOWN_FIELDS}
    close = difflib.get_close_matches(field, names, n=1, cutoff=0.75)
    return names[close[0]] if close else None


def _single_turn(record: dict, layout: tuple[str, ...]) -> tuple[Message, ...]:
    prompt_field, completion_field = layout[:2]
    for field in layout[:2]:
        if isinstance(record[field], list):
            raise _BadRecord(field, "an array, not a string; a conversation goes into 'messages'")
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
        raise _BadRecord(field, f"{_type_name(turns)}, not an array of turns")
    if not turns:
        raise _BadRecord(field, "an empty conversation")
    messages = tuple(_turn(turn, f"{field}[{index}]", field) for index, turn in enumerate(turns))
    roles = [message.role for message in messages]
    if roles[-1] != "assistant":
        raise _BadRecord(field, f"ends in a {roles[-1]} turn; it must end in an assistant's, the completion")
    if "user" not in roles[: roles.index("assistant")]:
        raise _BadRecord(field, "has no user turn before the first assistant turn, so there is no prompt")
    return messages


def _turn(turn: Any, where: str, field: str) -> Message:
    if not isinstance(turn, dict):
        raise _BadRecord(where, f"{_type_name(turn)}, not an object")
    role_field, content_field = ("role", "content") if field == "messages" else ("from", "value")
    for name in UNSUPPORTED_TURN_FIELDS:
        if turn.get(name):
            raise _BadRecord(f"{where}.{name}", "not supported; write it into the content")
    for name in (role_field, content_field):
        if turn.get(name) is None:
            similar = _similar(name, turn)
            hint = f"; the turn has {similar!r}: rename it to {name!r}" if similar else ""
            raise _BadRecord(f"{where}.{name}", f"missing{hint}")
    role = _text(turn[role_field], f"{where}.{role_field}")
    known = {name: name for name in ROLES} if field == "messages" else SHAREGPT_ROLES
    if role not in known:
        reason = f"unknown role {shorten(role)!r}; known are {', '.join(known)}"
        raise _BadRecord(f"{where}.{role_field}", reason)
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
        raise _BadRecord(field, "equals the completion, so the pair prefers nothing")
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
        raise _BadRecord(field, f"{_type_name(value)}, not a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"a lone surrogate at character {error.start + 1}; write UTF-8, or a whole surrogate pair"
        raise _BadRecord(field, reason) from None
    return value


def _not_empty(text: str, field: str) -> str:
    if not text.strip():
        raise _BadRecord(field, "empty" if not text else "nothing but white space")
    return text


def _type_name(value: Any) -> str:
    return JSON_TYPE_NAMES.get(type(value), f"a {type(value).__name__} value")


# --- Whole files -----------------------------------------------------------------------------------------


def _check_one_kind(path: Path, examples: list[Example]) -> None:
    plain = next((example.line for example in examples if example.rejected is None), None)
    pair = next((example.line for example in examples if example.rejected is not None), None)
    if plain is not None and pair is not None:
        raise MixedTargets(path, plain, pair)


def _drop_duplicates(examples: list[Example]) -> tuple[list[Example], list[Reject]]:
    first: dict[str, Example] = {}
    duplicates: list[Reject] = []
    for example in examples:
        kept = first.setdefault(example.id, example)
        if kept is not example:
            reason = f"duplicate of line {kept.line}"
            duplicates.append(Reject(example.line, "", reason, shorten(example.prompt_text)))
    return list(first.values()), duplicates
