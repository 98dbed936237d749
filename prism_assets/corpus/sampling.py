"""A few records of a file, spread over it, and what share of the file they are: to know a pool before it is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prism_assets.corpus.files import (
    COMPRESSIONS,
    PARQUET_EXTENSIONS,
    batch_records,
    checked_extension,
    json_object,
    open_bytes,
    read_examples,
)
from prism_assets.corpus.records import KNOWN_FIELDS, BadRecord, Example, example_of
from prism_assets.errors import UnreadableFile

WHOLE_BYTES = 2**20  # a file of at most so many bytes is read whole
SPOTS = 16  # places of a file that records are read at


class FileSample(NamedTuple):
    """Candidates of a file."""

    examples: list[Example]
    rejected: int  # records beside them that are none
    share: float  # of the file that was read: of its bytes, or of its rows for Parquet; 1: all of it


def sample_file(path: Path, records: int) -> FileSample:
    """About so many records of a candidate file, each content once; all of a small one.

    JSON Lines are read at evenly spaced places, compressed ones at their beginning, Parquet at evenly spaced row
    groups. Raises UnreadableFile.
    """
    extension = checked_extension(path)
    size = path.stat().st_size
    if extension in PARQUET_EXTENSIONS:
        return _of_parquet(path, records)
    if size <= WHOLE_BYTES:
        examples, rejects = read_examples(path, "candidate")
        return FileSample(examples, len(rejects), 1.0)
    compression = COMPRESSIONS.get(Path(extension).suffix)
    return _of_compressed(path, compression, records) if compression else _of_lines(path, size, records)


def _of_lines(path: Path, size: int, records: int) -> FileSample:
    places = [(2 * spot + 1) * size // (2 * SPOTS) for spot in range(SPOTS)]  # each in the middle of its part
    try:
        with open(path, "rb") as stream:
            line = sum(len(b"".join(_lines(stream, place, 1))) for place in places) / SPOTS
            # As many bytes at every place: so many records, where lines are long, stand for so many in the file.
            read = [list(_lines(stream, place, line * records / SPOTS)) for place in places]
    except OSError as error:
        raise UnreadableFile(path, f"cannot be read ({error}); check its permissions and the disk") from error
    lines = [line for at_place in read for line in at_place]
    return _sample([one for line in lines for one in _record_of(line)], sum(map(len, lines)) / size)


def _lines(stream: BinaryIO, place: int, wanted: float) -> Iterator[bytes]:
    """Whole lines from the first that begins at a place or after it, until so many bytes are read."""
    stream.seek(max(place - 1, 0))
    if place:
        stream.readline()  # the rest of a line that began before
    while wanted > 0 and (line := stream.readline()):
        wanted -= len(line)
        yield line


def _of_compressed(path: Path, compression: str, records: int) -> FileSample:
    import pyarrow as pa

    found: list[Any] = []
    try:
        with pa.OSFile(str(path)) as file, open_bytes(file, compression) as stream:
            for line in stream:
                found += _record_of(line)
                # Arrow reads 64 KiB ahead of the lines: little of what must have been read.
                if len(found) >= records and file.tell() >= WHOLE_BYTES // 2:
                    break
            share = file.tell() / file.size() if stream.peek(1) else 1.0
    except OSError as error:
        raise UnreadableFile(path, f"is not whole {compression} data ({error})") from error
    return _sample(found, share)


def _of_parquet(path: Path, records: int) -> FileSample:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: list[Any] = []
    try:
        with pq.ParquetFile(path) as file:
            rows, groups = file.metadata.num_rows, file.num_row_groups
            names = file.schema_arrow.names
            chosen = sorted({spot * groups // SPOTS for spot in range(SPOTS)}) if groups else []
            each = -(-records // max(len(chosen), 1))
            for group in chosen:
                columns = [name for name in names if name in KNOWN_FIELDS]
                batches: Iterator[Any] = file.iter_batches(each, row_groups=[group], columns=columns)
                for record in batch_records(next(batches)):
                    found.append({**dict.fromkeys(names), **record} if isinstance(record, dict) else record)
    except (pa.ArrowException, OSError, StopIteration) as error:
        raise UnreadableFile(path, f"is not a whole Parquet file ({error})") from error
    return _sample(found, len(found) / rows if rows else 1.0)


def _record_of(line: bytes) -> list[Any]:
    """The record of a line, or why it is none; nothing for a blank line."""
    line = line.strip(b" \t\r\n")
    if not line:
        return []
    try:
        return [json_object(line.removeprefix(b"\xef\xbb\xbf"))]
    except BadRecord as bad:
        return [bad]


def _sample(found: list[Any], share: float) -> FileSample:
    examples: dict[str, Example] = {}  # by id: records of equal content are one
    for position, record in enumerate(found):
        try:
            if isinstance(record, BadRecord):
                raise record
            example = example_of(record, position + 1, "candidate")
            examples.setdefault(example.id, example)
        except BadRecord:
            continue
    return FileSample(list(examples.values()), len(found) - len(examples), share)
