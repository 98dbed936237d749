"""Files of records: JSON Lines (plain or compressed) and Parquet become examples and rejects."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prism_assets.corpus.arrow_values import json_decoders, readable
from prism_assets.corpus.formats import KNOWN_FIELDS, TEXT_FIELDS, example_of
from prism_assets.corpus.json_text import json_value
from prism_assets.corpus.limits import (
    Limits,
    TooLong,
    bounded_lines,
    bounded_slices,
    decompressed,
    require_bounded_parquet,
    text_leaves,
    too_long,
)
from prism_assets.corpus.other_files import (
    DELIMITERS,
    arrow_records,
    json_array_records,
    table_of_text_records,
)
from prism_assets.corpus.records import (
    EXCERPT_CHARACTERS,
    BadRecord,
    Example,
    Kind,
    Reject,
    excerpt_of,
    type_name,
)
from prism_assets.errors import MixedTargets, UnreadableFile
from prism_assets.resources.regular_files import LeadsOutside, open_regular

JSON_LINES_EXTENSIONS = (".jsonl", ".ndjson")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PARQUET_EXTENSIONS = (".parquet",)
OTHER_EXTENSIONS = (".json", *DELIMITERS, ".arrow")
DATA_EXTENSIONS = (
    *JSON_LINES_EXTENSIONS,
    *(extension + suffix for extension in JSON_LINES_EXTENSIONS for suffix in COMPRESSIONS),
    *PARQUET_EXTENSIONS,
    *OTHER_EXTENSIONS,
)
READABLE = "JSON Lines, JSON arrays, Parquet, CSV, TSV or Arrow"  # what these extensions stand for
# What other kinds of files begin with.
_OTHER_KINDS = {
    b"\x1f\x8b": "compressed by gzip (.jsonl.gz)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd (.jsonl.zst)",
    b"PAR1": "Parquet (.parquet)",
    b"ARROW1": "Arrow (.arrow)",
}
PARQUET_BATCH_ROWS = 1024
HINTS = 200  # names of other columns that are looked through for one that was meant
LINK_ADVICE = (
    "a symbolic link that leads out of the inbox: put the file itself there, or set candidates.follow_links to true"
)
DUPLICATE_OF = "duplicate of line "  # what the reason of a record begins with that is there already


def data_extension(name: str) -> str | None:
    """The accepted extension at the end of a file name (".jsonl.gz", ".parquet", …), or None."""
    lowered = name.lower()
    return next((extension for extension in DATA_EXTENSIONS if lowered.endswith(extension)), None)


def iter_examples(
    path: Path | str,
    kind: Kind,
    *,
    mixed: bool = False,
    limits: Limits = Limits(),
    columns: Mapping[str, str] | None = None,
) -> Iterator[Example | Reject]:
    """Reads one file: in its order an example for each record, or a reject for one that is none.

    Of records with equal content the first is kept; all that is remembered of a record is its id. Raises
    `UnreadableFile` where the file as a whole exceeds a limit or cannot be read, and `MixedTargets` where a target or
    eval file holds plain records and pairs, unless it may be `mixed`: whatever came before is void then, so a damaged
    file never yields half of its records. `columns` are those of the settings: by our name the file's own.
    """
    path = Path(path)
    lines: dict[bytes, int] = {}  # of the examples, by id
    first_reject: Reject | None = None
    records = rejects = 0
    kinds: dict[bool, int] = {}  # of targets: whether it is a pair, and the first line of such
    for line, record, excerpt in _records(path, limits, wanted_columns(kind, columns)):
        records += 1
        found = _example_or_reject(line, record, excerpt, kind, columns)
        if isinstance(found, Example):
            before = lines.setdefault(bytes.fromhex(found.id), line)
            if before == line:
                kinds.setdefault(found.rejected is not None, line)
                yield found
                continue
            found = Reject(line, "", f"{DUPLICATE_OF}{before}", excerpt_of(found.prompt_text))
        first_reject, rejects = first_reject or found, rejects + 1
        if rejects > limits.rejects:
            raise UnreadableFile(
                path,
                f"has more than {limits.rejects:,} rejected or repeated records, all that limits.rejects allows; the "
                f"first is line {first_reject.line}: {first_reject.reason}",
            )
        yield found
    if not records:
        raise UnreadableFile(path, "holds no records; write one record a line, or remove the file")
    if kind != "candidate" and not mixed:
        require_one_kind(path, [(line, pair) for pair, line in kinds.items()])


def _example_or_reject(
    line: int, record: dict | BadRecord, excerpt: Callable[[], str], kind: Kind, columns: Mapping[str, str] | None
) -> Example | Reject:
    try:
        if isinstance(record, BadRecord):
            raise record
        return example_of(record, line, kind, columns)
    except BadRecord as bad:
        return Reject(line, bad.field, bad.reason, excerpt())


def read_examples(path: Path | str, kind: Kind, **options: Any) -> tuple[list[Example], list[Reject]]:
    """All that `iter_examples` gives with these options: the examples, and the rejects, both in file order."""
    found = list(iter_examples(path, kind, **options))
    return [one for one in found if isinstance(one, Example)], [one for one in found if isinstance(one, Reject)]


def wanted_columns(kind: Kind, columns: Mapping[str, str] | None = None) -> Collection[str] | None:
    """The columns of a table that are read; None for all, as of candidates every field is kept."""
    return None if kind == "candidate" else KNOWN_FIELDS | set((columns or {}).values())


# Line number, the record or why there is none, and a function that gives the excerpt (only rejects need one).
_Record = tuple[int, "dict | BadRecord", Any]


def _records(path: Path, limits: Limits, wanted: Collection[str] | None) -> Iterator[_Record]:
    """The records of a file, of Parquet with the `wanted` columns' values alone (None: all)."""
    extension = checked_extension(path)
    if extension in PARQUET_EXTENSIONS:
        return _parquet_records(path, limits, wanted)
    if extension in OTHER_EXTENSIONS:
        return _other_records(path, limits)
    return _json_records(path, COMPRESSIONS.get(Path(extension).suffix), limits)


@contextmanager
def opened(path: Path, limits: Limits) -> Iterator[BinaryIO]:
    """The file, inside of the folder that it must lie in. Raises UnreadableFile."""
    try:
        file = open_regular(path, limits.inside)
    except LeadsOutside as error:
        raise UnreadableFile(path, LINK_ADVICE) from error
    except OSError as error:
        raise UnreadableFile(path, f"cannot be read ({error}); check its permissions and the disk") from error
    with file:
        yield file


def checked_extension(path: Path) -> str:
    """The accepted extension of a file with something in it. Raises UnreadableFile."""
    if path.is_dir():
        raise UnreadableFile(path, "is a directory; name a file in it")
    if not path.is_file():
        raise UnreadableFile(path, "does not exist; check the path in the settings")
    extension = data_extension(path.name)
    if extension is None:
        raise UnreadableFile(path, f"unknown extension; known are {', '.join(DATA_EXTENSIONS)}")
    if path.stat().st_size == 0:
        raise UnreadableFile(path, "is empty; write one record a line, or remove the file")
    return extension


def _other_records(path: Path, limits: Limits) -> Iterator[_Record]:
    with opened(path, limits) as file:
        yield from file_records(file, path, limits)


def file_records(file: BinaryIO, path: Path, limits: Limits) -> Iterator[_Record]:
    """The records of a JSON array, of CSV, TSV or Arrow. Raises UnreadableFile."""
    extension = data_extension(path.name)
    if extension in DELIMITERS:
        yield from table_of_text_records(file, path, limits, DELIMITERS[extension])
    elif extension == ".arrow":
        yield from arrow_records(file, path, limits, rows_of, _parquet_excerpt)
    elif _first_character(file) == b"{":
        yield from _json_records(path, None, limits)  # one object a line, whatever it is called
    else:
        yield from json_array_records(file, path, limits, lambda raw: json_object(raw, limits))


def _first_character(file: BinaryIO) -> bytes:
    beginning = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    file.seek(0)
    return beginning


def _json_records(path: Path, compression: str | None, limits: Limits) -> Iterator[_Record]:
    for line, raw in _numbered_lines(path, compression, limits):
        if isinstance(raw, TooLong):
            yield line, too_long(raw.size, limits), lambda raw=raw: _json_excerpt(raw.beginning)
            continue
        try:
            record: dict | BadRecord = json_object(raw, limits)
        except BadRecord as bad:
            record = bad
        yield line, record, lambda raw=raw: _json_excerpt(raw)


def _json_excerpt(raw: bytes) -> str:
    return excerpt_of(raw[: 4 * EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace"))


def _numbered_lines(path: Path, compression: str | None, limits: Limits) -> Iterator[tuple[int, bytes | TooLong]]:
    """The lines that are not blank, without line end and byte order mark, numbered from 1.

    Split at line feeds alone: JSON strings may hold other line separators, such as U+2028.
    """
    try:
        with opened(path, limits) as file:
            stream = file if compression is None else decompressed(file, compression, path, limits)
            for line, raw in bounded_lines(stream, path, limits):
                if line == 1 and isinstance(raw, bytes):
                    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise UnreadableFile(path, "is UTF-16; save it as UTF-8")
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                    _require_lines(raw, path)
                if raw:
                    yield line, raw
    except OSError as error:
        if compression:
            advice = f"is not whole {compression} data ({error}); compress it again, or copy it again"
        else:
            advice = f"cannot be read ({error}); check its permissions and the disk"
        raise UnreadableFile(path, advice) from error


def _require_lines(first: bytes, path: Path) -> None:
    """Raise UnreadableFile for a file whose first line shows that it is no JSON Lines."""
    found = next((name for beginning, name in _OTHER_KINDS.items() if first.startswith(beginning)), None)
    if found is not None:  # what is not compressed in it would be read
        raise UnreadableFile(path, f"is {found}; give it the extension of what it is")
    if b"\x00" in first[:4]:
        raise UnreadableFile(path, "is UTF-16 or UTF-32; save it as UTF-8")
    if first.lstrip()[:1] == b"[" and first.rstrip(b", \t")[-1:] != b"]":
        raise UnreadableFile(path, "is a JSON array over several lines; name it .json")
    if first == b"{":
        raise UnreadableFile(path, "has an object over several lines; write one a line: jq -c .")


def json_object(raw: bytes, limits: Limits = Limits()) -> dict:
    """The record of a line. Raises BadRecord."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("", f"invalid UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    try:
        record = json_value(text, raw, limits)
    except json.JSONDecodeError as error:
        raise BadRecord("", f"invalid JSON at column {error.pos + 1}: {error.msg}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise BadRecord("", f"invalid JSON: {error}") from None
    if not isinstance(record, dict):
        advice = "; jq -c '.[]' turns an array into lines" if isinstance(record, list) else ""
        raise BadRecord("", f"{type_name(record)}, not an object{advice}")
    return record


def _parquet_records(path: Path, limits: Limits, wanted: Collection[str] | None) -> Iterator[_Record]:
    import pyarrow as pa

    try:
        with opened(path, limits) as raw, parquet_file(raw, path, limits, wanted) as file:
            row = 0
            for batch in _batches(file):
                for record in batch_records(batch, file, limits):
                    row += 1
                    yield row, record, lambda record=record: _parquet_excerpt(record)
    except pa.ArrowMemoryError:
        raise  # says nothing of the file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of the name of a column
        advice = f"is not a whole Parquet file ({error}); write it again, or copy it again"
        raise UnreadableFile(path, advice) from error


def _batches(file: Columns) -> Iterator[Any]:
    """The rows in batches, none of them of two row groups: each group has dictionaries of its own, and of texts inside
    of lists Arrow joins no two."""
    for group in range(file.parquet.num_row_groups):
        yield from file.parquet.iter_batches(PARQUET_BATCH_ROWS, row_groups=[group], columns=file.columns)


class Columns(NamedTuple):
    """A Parquet file and what is read of it."""

    parquet: Any
    columns: list[str]
    schema: Any  # of these columns, with texts as texts
    hints: list[str]  # names of other columns


@contextmanager
def parquet_file(
    raw: BinaryIO, path: Path, limits: Limits, wanted: Collection[str] | None = KNOWN_FIELDS
) -> Iterator[Columns]:
    """The `wanted` columns of a Parquet file (None: all). Raises UnreadableFile."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(raw, arrow_extensions_enabled=True) as file:
        # Where other columns (embeddings) are not kept, their names alone serve as hints.
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise UnreadableFile(path, "has two columns of one name; rename one")
        columns = [name for name in names if wanted is None or name in wanted] or names[:1]  # without one: no rows
        require_bounded_parquet(raw, file, columns, path, limits)
        schema = pa.schema([file.schema_arrow.field(name) for name in columns])
        leaves, metadata = text_leaves(file, columns), file.metadata
    with pq.ParquetFile(raw, metadata=metadata, read_dictionary=leaves, arrow_extensions_enabled=True) as file:
        yield Columns(file, columns, schema, names[:HINTS])


def batch_records(batch: Any, file: Columns, limits: Limits) -> Iterator[dict | BadRecord]:
    """The rows of an Arrow batch as records."""
    for part in bounded_slices(batch, limits):
        if isinstance(part, int):
            yield too_long(part, limits)
            continue
        for record in rows_of(part.cast(file.schema) if file.columns else part):
            yield {**dict.fromkeys(file.hints), **record} if isinstance(record, dict) else record


def rows_of(batch: Any) -> Iterator[dict | BadRecord]:
    """The rows of an Arrow batch, with values of the type JSON decoded."""
    decoders = json_decoders(batch.schema)
    batch = readable(batch, as_they_are=TEXT_FIELDS)
    if not decoders:
        yield from _values_of(batch)
        return
    for record in _values_of(batch):
        if isinstance(record, BadRecord):
            yield record
            continue
        try:
            yield record | {name: decode(record[name]) for name, decode in decoders.items()}
        except BadRecord as bad:
            yield bad
        except ValueError as error:
            yield BadRecord("", f"a value of the type JSON that is none: {error}")


def _values_of(batch: Any) -> Iterator[dict | BadRecord]:
    try:
        yield from batch.to_pylist()
    except ValueError:  # Arrow does not validate strings: find the rows that are not UTF-8
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield BadRecord("", f"invalid UTF-8 at byte {error.start + 1} of a value; write UTF-8")
            except ValueError as error:  # a time in nanoseconds
                yield BadRecord("", f"a value that cannot be read: {error}")


def _parquet_excerpt(record: dict | BadRecord) -> str:
    if isinstance(record, BadRecord):
        return ""
    given = {name: value for name, value in record.items() if value is not None and name in KNOWN_FIELDS}
    return excerpt_of(json.dumps(given, ensure_ascii=False, default=str))


# --- Whole files -----------------------------------------------------------------------------------------


def require_one_kind(path: Path, records: Iterable[tuple[int, bool]]) -> None:
    """Raise MixedTargets where some of the records, each its line and whether it is a pair, are pairs and some not."""
    first: dict[bool, int] = {}
    for line, pair in records:
        first.setdefault(pair, line)
    if len(first) == 2:
        raise MixedTargets(path, first[False], first[True])
