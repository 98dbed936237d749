"""Files of records: JSON Lines (plain or compressed) and Parquet become examples and rejects."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prism_assets.corpus.records import (
    EXCERPT_CHARACTERS,
    KNOWN_FIELDS,
    BadRecord,
    Example,
    Kind,
    Reject,
    example_of,
    excerpt_of,
    type_name,
)
from prism_assets.errors import MixedTargets, UnreadableFile

JSON_LINES_EXTENSIONS = (".jsonl", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PARQUET_EXTENSIONS = (".parquet",)
DATA_EXTENSIONS = (
    *JSON_LINES_EXTENSIONS,
    *(extension + suffix for extension in JSON_LINES_EXTENSIONS for suffix in COMPRESSIONS),
    *PARQUET_EXTENSIONS,
)
PARQUET_BATCH_ROWS = 1024
DUPLICATE_OF = "duplicate of line "  # what the reason of a record begins with that is there already


def data_extension(name: str) -> str | None:
    """The accepted extension at the end of a file name (".jsonl.gz", ".parquet", …), or None."""
    lowered = name.lower()
    return next((extension for extension in DATA_EXTENSIONS if lowered.endswith(extension)), None)


def read_examples(path: Path | str, kind: Kind, *, mixed: bool = False) -> tuple[list[Example], list[Reject]]:
    """Reads one file; returns its examples in file order and a reject for each record that is none.

    Of records with equal content the first is kept. Raises `UnreadableFile` where the file as a whole cannot
    be read (so a damaged file never yields half of its records), and `MixedTargets` where a target or eval
    file holds plain records and pairs, unless it may be `mixed`.
    """
    path = Path(path)
    examples: list[Example] = []
    rejects: list[Reject] = []
    records = 0
    for line, record, excerpt in _records(path):
        records += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            examples.append(example_of(record, line, kind))
        except BadRecord as bad:
            rejects.append(Reject(line, bad.field, bad.reason, excerpt()))
    if not records:
        raise UnreadableFile(path, "holds no records; write one record a line, or remove the file")
    if kind != "candidate" and not mixed:
        require_one_kind(path, [(example.line, example.rejected is not None) for example in examples])
    examples, duplicates = _drop_duplicates(examples)
    return examples, sorted(rejects + duplicates)


# Line number, the record or why there is none, and a function that gives the excerpt (only rejects need one).
_Record = tuple[int, "dict | BadRecord", Any]


def _records(path: Path) -> Iterator[_Record]:
    extension = checked_extension(path)
    if extension in PARQUET_EXTENSIONS:
        return _parquet_records(path)
    return _json_records(path, COMPRESSIONS.get(Path(extension).suffix))


def checked_extension(path: Path) -> str:
    """The accepted extension of a file with something in it. Raises UnreadableFile."""
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
            record: dict | BadRecord = json_object(raw)
        except BadRecord as bad:
            record = bad
        yield line, record, lambda raw=raw: _json_excerpt(raw)


def _json_excerpt(raw: bytes) -> str:
    return excerpt_of(raw[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace"))


def _numbered_lines(path: Path, compression: str | None) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, without line end and byte order mark, numbered from 1.

    Split at line feeds alone: JSON strings may hold other line separators, such as U+2028.
    """
    try:
        with _open(path, compression) as stream:
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


def open_bytes(file: Any, compression: str) -> io.BufferedReader:
    """What an Arrow file holds, decompressed."""
    import pyarrow as pa  # here, so that listing an inbox needs no pyarrow

    return io.BufferedReader(pa.CompressedInputStream(file, compression), 1 << 16)


def _open(path: Path, compression: str | None) -> io.BufferedIOBase:
    if compression is None:
        return path.open("rb")
    import pyarrow as pa

    return open_bytes(pa.OSFile(str(path)), compression)


def json_object(raw: bytes) -> dict:
    """The record of a line. Raises BadRecord."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("", f"invalid UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    try:
        record = json.loads(text, object_pairs_hook=_object_without_repeats)
    except json.JSONDecodeError as error:
        raise BadRecord("", f"invalid JSON at column {error.pos + 1}: {error.msg}") from None
    except RecursionError:
        raise BadRecord("", "invalid JSON: nested too deeply") from None
    except ValueError as error:  # an integer of thousands of digits
        raise BadRecord("", f"invalid JSON: {error}") from None
    if not isinstance(record, dict):
        advice = "; jq -c '.[]' turns an array into lines" if isinstance(record, list) else ""
        raise BadRecord("", f"{type_name(record)}, not an object{advice}")
    return record


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise BadRecord(repeated, "given twice in one object; keep one")
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
                for record in batch_records(batch):
                    row += 1
                    if isinstance(record, dict):
                        record = {**dict.fromkeys(names), **record}
                    yield row, record, lambda record=record: _parquet_excerpt(record)
    except (pa.ArrowException, OSError) as error:
        advice = f"is not a whole Parquet file ({error}); write it again, or copy it again"
        raise UnreadableFile(path, advice) from error


def batch_records(batch: Any) -> Iterator[dict | BadRecord]:
    """The rows of an Arrow batch as records."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not validate strings: find the rows that are not UTF-8
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BadRecord("", f"invalid UTF-8 at byte {error.start + 1} of a value; write UTF-8")


def _parquet_excerpt(record: dict | BadRecord) -> str:
    if isinstance(record, BadRecord):
        return ""
    given = {name: value for name, value in record.items() if value is not None}
    return excerpt_of(json.dumps(given, ensure_ascii=False, default=str))


# --- Whole files -----------------------------------------------------------------------------------------


def require_one_kind(path: Path, records: Sequence[tuple[int, bool]]) -> None:
    """Raise MixedTargets where some of the records, each its line and whether it is a pair, are pairs and some not."""
    plain = next((line for line, pair in records if not pair), None)
    pair = next((line for line, pair in records if pair), None)
    if plain is not None and pair is not None:
        raise MixedTargets(path, plain, pair)


def _drop_duplicates(examples: list[Example]) -> tuple[list[Example], list[Reject]]:
    first: dict[str, Example] = {}
    duplicates: list[Reject] = []
    for example in examples:
        kept = first.setdefault(example.id, example)
        if kept is not example:
            reason = f"{DUPLICATE_OF}{kept.line}"
            duplicates.append(Reject(example.line, "", reason, excerpt_of(example.prompt_text)))
    return list(first.values()), duplicates
