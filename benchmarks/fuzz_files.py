"""Files for `fuzz`: records of the grammar in every format, good files that are damaged, and what must become of them.

What must follow is worked out without the reader: from how the file was made; for damaged text from the standard
library's own reading of the damaged bytes; a file whose checksum, footer or end is gone must be refused.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from benchmarks.fuzz_records import Given, Grammar, Raw, Verdict, is_unicode, to_json

BOM = b"\xef\xbb\xbf"
FORMATS = (".jsonl", ".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SPELLINGS = {".jsonl": (".jsonl", ".JSONL"), ".parquet": (".parquet", ".Parquet")}
COLUMNS = {"prompt": "question", "completion": "réponse"}
# Fields that hold arrays of turns or objects, of which the JSON text is read as well.
JSON_TEXTS = ("messages", "conversations", "history", "tools", "functions")
SIGNALS = ("label", "kto_tag", "train", "trainable", "weight")
LINE_END = re.compile("\r\n|\r|\n")
WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le")

Refusal = Literal["must", "may", "never"]


@dataclass(frozen=True)
class Case:
    """One file: how it is read, and what must follow.

    by_line: its records by the line or number that the reader gives them; counted: whether these are all that there
    are. refusal: whether the file as a whole must or may be refused. no_examples: whether nothing of it is an example.
    """

    seed: int
    kind: str
    name: str
    content: bytes
    what: str
    by_line: dict[int, Given] = field(default_factory=dict)
    counted: bool = True
    refusal: Refusal = "never"
    no_examples: bool = False
    mixed: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)


class Written(NamedTuple):
    """The bytes of a file, and the line or number of each of its records."""

    content: bytes
    lines: Sequence[int]


def case_of(seed: int) -> Case:
    """The case of a seed, the same on every machine."""
    rng = random.Random(f"case {seed}")
    kind = rng.choice(("candidate", "candidate", "candidate", "target", "eval"))
    number = rng.random()
    if number < 0.02:
        return _nothing(seed, rng, kind)
    if number < 0.04:
        return _beyond_limits(seed, rng, kind)
    return _damaged(seed, rng, kind) if number < 0.4 else _of_grammar(seed, rng, kind)


# -- records in files ---------------------------------------------------------------------------------------------


def _of_grammar(seed: int, rng: random.Random, kind: str) -> Case:
    """Records of the grammar, most of them wrong in one place."""
    extension = rng.choice(FORMATS)
    named = rng.random() < 0.1
    pairs = rng.random() < (0.1 if kind == "candidate" else 0.4)
    grammars = [Grammar(rng, kind, pairs, exchanges=named)]
    mixed = rng.random() < 0.5
    if kind != "candidate" and not named and rng.random() < 0.1:
        grammars.append(Grammar(rng, kind, not pairs, first=10_000))
    share_good = rng.choice((0.1, 0.4, 0.9))
    records = [rng.choice(grammars).record(share_good) for _ in range(rng.choice((1, 1, 2, 3, 4, 5, 6, 7, 8, 12)))]
    if named:
        records = [_under_other_names(one) for one in records]
    records = [one for one in map(_VIEWS.get(extension, lambda one: one), records) if one is not None]
    if not records:
        records = [Given({"prompt": "a", "completion": "b"}, "as it should be", "either")]
    for one in rng.sample(records, rng.choice((0, 0, 0, 0, 1))):
        again = replace(one, verdict="bad" if one.verdict == "good" else one.verdict, what="repeated")
        records.append(again)
    content, lines = _WRITERS[extension](records, rng)
    case = Case(
        seed,
        kind,
        "records" + rng.choice(SPELLINGS.get(extension, (extension,))),
        content,
        "records of the grammar",
        dict(zip(lines, records, strict=True)),
        mixed=mixed,
        columns=dict(COLUMNS) if named else {},
    )
    case = replace(case, refusal=_refusal(case, extension))
    return _with_limits(case, rng) if rng.random() < 0.1 else case


def _under_other_names(given: Given) -> Given:
    if isinstance(given.value, Raw):
        return given
    return replace(given, value={COLUMNS.get(name, name): value for name, value in given.value.items()})


def _refusal(case: Case, extension: str) -> Refusal:
    """Whether a file of the grammar is refused as a whole."""
    records = list(case.by_line.values())
    found: Refusal = "never"
    if extension == ".json":
        found = _refusal_of_array(case.content)
    elif extension in (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst") and isinstance(records[0].value, Raw):
        found = "may"  # the first line may look like that of another kind of file
    if case.kind != "candidate" and not case.mixed and found != "must":
        kinds = {one.rejected is not None for one in records if one.verdict == "good"}
        if len(kinds) == 2:
            return "must"
        if any(one.verdict == "either" for one in records):
            return "may"
    return found


def _refusal_of_array(content: bytes) -> Refusal:
    try:
        json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError:
        return "must"
    except (ValueError, RecursionError):  # sound, but beyond what Python reads
        return "may"
    return "never"


def _with_limits(case: Case, rng: random.Random) -> Case:
    """The same file under limits that some of its records exceed."""
    limits = {"record": 20_000} if rng.random() < 0.7 else {"rejects": 1}
    if not case.name.lower().startswith("records.jsonl") and not case.name.startswith("records.ndjson"):
        records: dict[int, Given] = {line: replace(one, verdict="either") for line, one in case.by_line.items()}
        return replace(case, by_line=records, limits=limits, refusal="may" if case.refusal == "never" else case.refusal)
    if "record" in limits:
        long = {line: one for line, one in case.by_line.items() if len(_json_bytes(one)) > 25_000}
        unsure = {line for line, one in case.by_line.items() if 10_000 < len(_json_bytes(one)) <= 25_000}
        records = {
            line: replace(one, verdict="bad" if line in long else one.verdict) for line, one in case.by_line.items()
        }
        records = {line: replace(one, verdict="either") if line in unsure else one for line, one in records.items()}
        return replace(case, by_line=records, limits=limits, refusal="may" if long or unsure else case.refusal)
    bad = sum(one.verdict == "bad" for one in case.by_line.values())
    unsure = {line for line, one in case.by_line.items() if one.verdict == "either"}
    refusal: Refusal = "must" if bad > 1 else "may" if bad + len(unsure) > 1 else case.refusal
    return replace(case, limits=limits, refusal="must" if case.refusal == "must" else refusal)


def _json_bytes(given: Given) -> bytes:
    return to_json(given.value).encode("utf-8", "surrogatepass")


# -- formats ------------------------------------------------------------------------------------------------------


def _in_typed_table(given: Given) -> Given | None:
    """A record as Parquet and Arrow hold it; None where they cannot."""
    if isinstance(given.value, Raw) or not given.value or not all(map(is_unicode, given.value)):
        return None
    return replace(given, verdict=given.in_table or given.verdict)


def _in_table_of_texts(given: Given) -> Given | None:
    """A record as CSV and TSV hold it: all values as texts. Of one that means something else then nothing is asked."""
    if isinstance(given.value, Raw) or not given.value or any(name.strip("\ufeff") == "" for name in given.value):
        return None
    if not all(is_unicode(one) for pair in given.value.items() for one in pair if isinstance(one, str)):
        return None
    verdict: Verdict = given.verdict if given.in_table is None else given.in_table
    texts: dict[str, str | None] = {}
    for name, value in given.value.items():
        if value is None or isinstance(value, str):
            texts[name] = value
            continue
        texts[name] = to_json(value)
        free = name in ("id", "source", "score", "extra") or name.startswith("x ")
        as_json = name in JSON_TEXTS and (isinstance(value, list) or (isinstance(value, Raw) and value.text[:1] == "["))
        signal = name in SIGNALS and isinstance(value, (bool, int, float)) and given.what == "record_not_wanted"
        if not (free or as_json or signal):
            verdict = "either"
    if "" in (given.value.get("answer"), given.value.get("answers")):
        verdict = "either"  # an empty cell is none
    if given.what == "tool_definitions" and "text" in given.value:
        verdict = "either"  # "[]" is one that says something
    return replace(given, value=texts, verdict=verdict)


_VIEWS: dict[str, Callable[[Given], Given | None]] = {
    ".csv": _in_table_of_texts,
    ".tsv": _in_table_of_texts,
    ".parquet": _in_typed_table,
    ".arrow": _in_typed_table,
}


def _json_lines(records: Sequence[Given], rng: random.Random) -> Written:
    end = rng.choice(("\n", "\n", "\r\n", " \t\n"))
    parts: list[str] = [rng.choice(("", "", "", "\ufeff"))]
    lines, line = [], 0
    for one in records:
        while rng.random() < 0.1:
            parts.append(rng.choice(("", " ", "\t")) + "\n")
            line += 1
        line += 1
        lines.append(line)
        parts.append(to_json(one.value, rng.random() < 0.5, rng.random() < 0.5) + end)
    if len(lines) and lines[0] > 1:
        parts[0] = ""  # a byte order mark and then a blank line is another matter
    if rng.random() < 0.3:
        parts[-1] = parts[-1].rstrip("\r\n")
    return Written("".join(parts).encode(), lines)


def _gzip(records: Sequence[Given], rng: random.Random) -> Written:
    content, lines = _json_lines(records, rng)
    if rng.random() < 0.2:  # members may follow each other
        half = len(content) // 2
        return Written(
            gzip.compress(content[:half], mtime=0)
            + gzip.compress(content[half:], mtime=0)
            + bytes(rng.choice((0, 512))),
            lines,
        )
    return Written(gzip.compress(content, rng.choice((0, 1, 9)), mtime=0), lines)


def _zstd(records: Sequence[Given], rng: random.Random) -> Written:
    content, lines = _json_lines(records, rng)
    parts = [content] if rng.random() < 0.8 else [content[: len(content) // 2], content[len(content) // 2 :]]
    return Written(b"".join(map(_zstd_frame, parts)), lines)


def _zstd_frame(content: bytes) -> bytes:
    import pyarrow as pa

    frame = pa.BufferOutputStream()
    with pa.CompressedOutputStream(frame, "zstd") as out:
        out.write(content)
    return frame.getvalue().to_pybytes()


def _json_array(records: Sequence[Given], rng: random.Random) -> Written:
    separator = rng.choice((",", ", ", ",\n", "\n,\n  "))
    texts = [to_json(one.value, rng.random() < 0.5, rng.random() < 0.5) for one in records]
    opening, closing = rng.choice((("[", "]"), ("[\n", "\n]\n"), ("\ufeff [ ", " ]  ")))
    return Written(f"{opening}{separator.join(texts)}{closing}".encode(), range(1, len(records) + 1))


def _table_of_texts(delimiter: str) -> Callable[[Sequence[Given], random.Random], Written]:
    def write(records: Sequence[Given], rng: random.Random) -> Written:
        names = list(dict.fromkeys(name for one in records for name in one.value))
        rng.shuffle(names)
        names.sort(key=lambda name: name.startswith("\ufeff"))  # in front it would be a byte order mark
        out = io.StringIO(newline="")
        if rng.random() < 0.2:
            out.write("\ufeff")
        quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
        writer = csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=rng.choice(("\r\n", "\n")))
        writer.writerow(names)
        lines = []
        for one in records:
            lines.append(1 + len(LINE_END.findall(out.getvalue())))
            writer.writerow([one.value.get(name) or "" for name in names])
        return Written(out.getvalue().encode(), lines)

    return write


def _table(records: Sequence[Given], rng: random.Random, as_json: bool = False) -> Any:
    """The records as an Arrow table: columns of the types that their values have, or of the type JSON."""
    import pyarrow as pa

    names = list(dict.fromkeys(name for one in records for name in one.value))
    columns = {}
    for name in names:
        values = [one.value.get(name) for one in records]
        texts = all(value is None or isinstance(value, str) for value in values)
        try:
            if as_json and not texts:
                raise TypeError
            column = pa.array(values)
            if texts and any(value is not None for value in values):
                column = column.cast(rng.choice((pa.string(), pa.string(), pa.large_string())))
        except (TypeError, ValueError, OverflowError, pa.ArrowException):
            written = pa.array([None if value is None else to_json(value) for value in values], pa.string())
            column = pa.ExtensionArray.from_storage(pa.json_(pa.string()), written)
        columns[name] = column
    return pa.table({**columns, **_columns_of_any_type(len(records), rng)})


def _columns_of_any_type(rows: int, rng: random.Random) -> dict[str, Any]:
    """Columns that are not used, of types that records in JSON have not."""
    import pyarrow as pa

    kinds = {
        "x date": (0, pa.date32()),
        "x time": (10**18 + 1, pa.timestamp("ns")),
        "x zone": (0, pa.timestamp("ms", "Europe/Berlin")),
        "x duration": (5, pa.duration("ns")),
        "x decimal": (12, pa.decimal128(20, 3)),
        "x bytes": (b"\xff\x00", pa.binary()),
        "x vector": ([0.5, 1.5], pa.list_(pa.float32(), 2)),
        "x pairs": ([("a", 1)], pa.map_(pa.string(), pa.int64())),
        "x half": (None, pa.float16()),
        "x null": (None, pa.null()),
        "x struct": ({"at": 5, "b": [b"\xff"]}, pa.struct([("at", pa.time64("ns")), ("b", pa.list_(pa.binary()))])),
    }
    chosen = rng.sample(sorted(kinds), rng.choice((0, 0, 1, 2, 3)))
    return {name: pa.array([kinds[name][0], *[None] * rows][:rows], kinds[name][1]) for name in chosen}


def _parquet(records: Sequence[Given], rng: random.Random) -> Written:
    import pyarrow as pa
    import pyarrow.parquet as pq

    options = {
        "row_group_size": rng.choice((1, 2, 100)),
        "compression": rng.choice(("none", "snappy", "gzip", "zstd", "lz4")),
        "use_dictionary": rng.random() < 0.5,
        "data_page_version": rng.choice(("1.0", "2.0")),
        "write_page_checksum": rng.random() < 0.3,
    }
    state = rng.getstate()
    for as_json in (False, True):
        rng.setstate(state)
        out = pa.BufferOutputStream()
        try:
            pq.write_table(_table(records, rng, as_json), out, **options)
        except pa.ArrowException:  # a struct without fields
            if as_json:
                raise
            continue
        return Written(out.getvalue().to_pybytes(), range(1, len(records) + 1))
    raise AssertionError("unreachable")


def _arrow(records: Sequence[Given], rng: random.Random) -> Written:
    import pyarrow as pa

    table = _table(records, rng)
    new = rng.choice((pa.ipc.new_stream, pa.ipc.new_file))
    options = pa.ipc.IpcWriteOptions(compression=rng.choice((None, "lz4", "zstd")))
    out = pa.BufferOutputStream()
    with new(out, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rng.choice((1, 2, 100)))
    return Written(out.getvalue().to_pybytes(), range(1, len(records) + 1))


_WRITERS: dict[str, Callable[[Sequence[Given], random.Random], Written]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".jsonl.gz": _gzip,
    ".jsonl.zst": _zstd,
    ".json": _json_array,
    ".csv": _table_of_texts(","),
    ".tsv": _table_of_texts("\t"),
    ".parquet": _parquet,
    ".arrow": _arrow,
}


# -- damage -------------------------------------------------------------------------------------------------------


def _damaged(seed: int, rng: random.Random, kind: str) -> Case:
    """Good records in a file that something has happened to."""
    extension = rng.choice(FORMATS)
    grammar = Grammar(rng, kind)
    records = [grammar.draft().good() for _ in range(rng.choice((1, 2, 3, 5, 8)))]
    records = [one for one in map(_VIEWS.get(extension, lambda one: one), records) if one is not None]
    written = _WRITERS[extension](records, rng)
    damage = rng.choice(_DAMAGES)
    if damage in (_in_wide_characters, _in_one_byte_characters) and extension not in (
        ".jsonl",
        ".ndjson",
        ".json",
        ".csv",
    ):
        damage = _flipped
    case = Case(seed, kind, f"damaged{extension}", written.content, damage.__name__.strip("_"))
    if damage is _under_another_name:
        return _under_another_name(case, extension, records, written, rng)
    content = damage(written.content, rng)
    case = replace(case, content=content)
    if content == written.content:
        return replace(case, by_line=dict(zip(written.lines, records, strict=True)))
    if damage is _in_wide_characters:
        return replace(case, counted=False, refusal="may", no_examples=True)
    originals = {}
    if extension in (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst"):
        plain = (
            written.content if extension in (".jsonl", ".ndjson") else _decompressed(written.content, extension) or b""
        )
        originals = dict(zip((one for one in _plain_lines(plain) if one), records, strict=True))
        damaged = content if extension in (".jsonl", ".ndjson") else _decompressed(content, extension)
        return _after_damage_of_lines(case, damaged, originals)
    if extension == ".json":
        return _after_damage_of_array(case)
    if extension in (".csv", ".tsv"):
        return replace(case, counted=False, refusal="may" if _decodes(content) else "must")
    if damage is _truncated and not (extension == ".arrow" and written.content[:6] != b"ARROW1"):
        return replace(case, refusal="must")
    by_line = dict(zip(written.lines, records, strict=True)) if damage is _truncated else {}
    return replace(case, by_line=by_line, counted=False, refusal="may")


def _after_damage_of_lines(case: Case, damaged: bytes | None, originals: dict[bytes, Given]) -> Case:
    """What is left of JSON Lines: lines that are as they were, others."""
    if damaged is None:
        return replace(case, refusal="must")
    by_line: dict[int, Given] = {}
    seen: set[bytes] = set()
    for number, line in enumerate(_plain_lines(damaged), start=1):
        if not line:
            continue
        if line in originals:
            verdict: Verdict = "bad" if line in seen else "good"
            by_line[number] = replace(originals[line], verdict=verdict)
            seen.add(line)
        else:
            by_line[number] = Given(Raw(""), "damaged", "either" if _is_json_object(line) else "bad")
    if not by_line:
        return replace(case, refusal="must")
    first = _plain_lines(damaged)[0]
    return replace(case, by_line=by_line, refusal="never" if first in originals else "may")


def _after_damage_of_array(case: Case) -> Case:
    if _decodes(case.content) and case.content.removeprefix(BOM).lstrip()[:1] == b"{":
        return replace(case, counted=False, refusal="may")  # read as lines
    refusal = _refusal_of_array(case.content) if _decodes(case.content) else "must"
    return replace(case, counted=False, refusal="must" if refusal == "must" else "may")


def _plain_lines(content: bytes) -> list[bytes]:
    """The lines of a file without white space around their end and without a byte order mark."""
    lines = [line.rstrip(b" \t\r\n") for line in content.split(b"\n")]
    return [lines[0].removeprefix(BOM), *lines[1:]]


def _is_json_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _decodes(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def _decompressed(content: bytes, extension: str) -> bytes | None:
    """The bytes of a compressed file; None where it is none any more."""
    import pyarrow as pa

    try:
        if extension.endswith(".gz"):
            return gzip.decompress(content)
        with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as stream:
            return stream.read()
    except Exception:
        return None


def _under_another_name(
    case: Case, extension: str, records: Sequence[Given], written: Written, rng: random.Random
) -> Case:
    """A file of one kind with the extension of another."""
    other = rng.choice([one for one in FORMATS if one != extension])
    case = replace(case, name=f"damaged{other}", counted=False, refusal="may")
    lines = (".jsonl", ".ndjson")
    if extension in lines and other in (*lines, ".json"):
        if other in lines:
            return replace(case, by_line=dict(zip(written.lines, records, strict=True)), counted=True, refusal="never")
        return case
    if {extension, other} <= {".csv", ".tsv"}:
        return case
    return replace(case, no_examples=True)


Damage = Callable[[bytes, random.Random], bytes]


def _truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(1, max(2, len(content)))]


def _flipped(content: bytes, rng: random.Random) -> bytes:
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _with_bytes_inserted(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    added = rng.choice((rng.randbytes(rng.choice((1, 4, 100))), b"\n", b"\x00" * 8, b'"', b"[", b"{", b"\r", BOM))
    return content[:at] + added + content[at:]


def _with_bytes_missing(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + content[at + rng.choice((1, 2, 16, 200)) :]


def _with_a_hole_of_zeros(content: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(content)), rng.choice((1, 8, 64, 512))
    return content[:at] + bytes(min(size, len(content) - at)) + content[at + size :]


def _padded(content: bytes, rng: random.Random) -> bytes:
    return content + bytes(rng.choice((1, 7, 512, 4096)))


def _twice(content: bytes, rng: random.Random) -> bytes:
    return content + rng.choice((b"", b"\n")) + content


def _behind_zeros(content: bytes, rng: random.Random) -> bytes:
    return bytes(rng.choice((1, 2, 4, 16))) + content


def _in_wide_characters(content: bytes, rng: random.Random) -> bytes:
    return content.decode().encode(rng.choice(WIDE))


def _in_one_byte_characters(content: bytes, rng: random.Random) -> bytes:
    return content.decode().encode(rng.choice(("latin-1", "cp1251", "shift_jis")), "replace")


_DAMAGES: tuple[Any, ...] = (
    *(_truncated, _truncated, _flipped, _flipped, _flipped, _with_bytes_inserted, _with_bytes_missing),
    *(_with_a_hole_of_zeros, _padded, _twice, _behind_zeros, _in_wide_characters, _in_one_byte_characters),
    _under_another_name,
)


# -- nothing, and too much ----------------------------------------------------------------------------------------


def _nothing(seed: int, rng: random.Random, kind: str) -> Case:
    """A file without a record."""
    extension = rng.choice(FORMATS)
    empty = {
        ".jsonl": (b"", b"\n\n", b" \t\r\n", BOM, BOM + b"\n"),
        ".json": (b"", b"[]", b" [ ] ", BOM, b"\n", b"[", b"{"),
        ".csv": (b"", b"prompt,completion\n", BOM, b"\n", b"\n\n\n"),
    }
    if extension in (".parquet", ".arrow"):
        record = [Given({"prompt": "a", "completion": "b"}, "", "good")]
        import pyarrow as pa
        import pyarrow.parquet as pq

        table, out = _table(record, rng).slice(0, 0), pa.BufferOutputStream()
        if extension == ".parquet":
            pq.write_table(table, out)
        else:
            with pa.ipc.new_stream(out, table.schema) as writer:
                writer.write_table(table)
        content = rng.choice((b"", out.getvalue().to_pybytes()))
    else:
        of = {".ndjson": ".jsonl", ".tsv": ".csv"}.get(extension, extension.removesuffix(".gz").removesuffix(".zst"))
        content = rng.choice(empty[of])
        if extension.endswith(".gz"):
            content = gzip.compress(content, mtime=0)
        elif extension.endswith(".zst"):
            content = _zstd_frame(content)
    return Case(seed, kind, f"nothing{extension}", content, "a file without a record", refusal="must")


def _beyond_limits(seed: int, rng: random.Random, kind: str) -> Case:
    """A file that expands, or goes on, beyond what is allowed."""
    good = b'{"prompt": "a", "completion": "b"}\n'
    number = rng.randrange(5)
    if number == 0:
        content = good + b"\n" * 3_000
        return Case(seed, kind, "blank.jsonl", content, "blank lines", refusal="must", limits={"blank_lines": 2_000})
    if number == 1:
        content = gzip.compress(good + b" " * 200_000, mtime=0)
        return Case(seed, kind, "a.jsonl.gz", content, "expands", refusal="must", limits={"expanded": 100_000})
    if number == 2:
        content = _zstd_frame(good * 10_000)
        return Case(seed, kind, "a.jsonl.zst", content, "expands", refusal="must", limits={"expanded": 100_000})
    if number == 3:
        content = b"[" + b",".join([good] * 3) + b',{"prompt": "' + b"a" * 200_000 + b'", "completion": "c"}]'
        return Case(seed, kind, "a.json", content, "a long element", refusal="must", limits={"record": 50_000})
    content = b'prompt,completion\na,"' + b"b" * 200_000 + b'"\n'
    return Case(seed, kind, "a.csv", content, "a long cell", refusal="must", limits={"record": 50_000})
