"""A few records of a file, spread over it, and what share of the file they are: to know a pool before it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prism_assets.corpus.files import (
    COMPRESSIONS,
    JSON_LINES_EXTENSIONS,
    PARQUET_EXTENSIONS,
    batch_records,
    checked_extension,
    file_records,
    json_object,
    opened,
    parquet_file,
    read_examples,
)
from prism_assets.corpus.formats import example_of
from prism_assets.corpus.limits import Limits, TooLong, bounded_lines, decompressed, too_long
from prism_assets.corpus.records import BadRecord, Example
from prism_assets.errors import UnreadableFile

WHOLE_BYTES = 2**20  # a file of at most so many bytes is read whole
SPOTS = 16  # places of a file that records are read at


class FileSample(NamedTuple):
    """Candidates of a file."""

    examples: list[Example]
    rejected: int  # records beside them that are none
    share: float  # of the file that was read: of its bytes, or of its rows for Parquet; 1: all of it


_Found = tuple[list[Any], float]  # records, or why they are none, and what share of the file was read


def sample_file(
    path: Path, records: int, limits: Limits = Limits(), columns: Mapping[str, str] | None = None
) -> FileSample:
    """About so many records of a candidate file, each content once; all of a small one.

    JSON Lines are read at evenly spaced places, Parquet at evenly spaced row groups, all else at the beginning. Raises
    UnreadableFile.
    """
    extension = checked_extension(path)
    size = path.stat().st_size
    if size <= WHOLE_BYTES and extension not in PARQUET_EXTENSIONS:
        examples, rejects = read_examples(path, "candidate", limits=limits, columns=columns)
        return FileSample(examples, len(rejects), 1.0)
    compression = COMPRESSIONS.get(Path(extension).suffix)
    if extension in PARQUET_EXTENSIONS:
        found = _of_parquet(path, records, limits)
    elif compression:
        found = _of_compressed(path, compression, records, limits)
    elif extension in JSON_LINES_EXTENSIONS:
        found = _of_lines(path, size, records, limits)
    else:
        found = _of_beginning(path, size, records, limits)
    return _sample(*found, columns)


def _of_beginning(path: Path, size: int, records: int, limits: Limits) -> _Found:
    """The first records of a file that can only be read from its beginning."""
    with opened(path, limits) as file:
        read = file_records(file, path, limits)
        found = [record for _, record, _ in islice(read, records)]
        whole = len(found) < records
        return found, 1.0 if whole or not size else min(1.0, file.tell() / size)


def _of_lines(path: Path, size: int, records: int, limits: Limits) -> _Found:
    places = [(2 * spot + 1) * size // (2 * SPOTS) for spot in range(SPOTS)]  # each in the middle of its part
    try:
        with opened(path, limits) as stream:
            line = sum(len(one) for place in places for one in _lines(stream, place, 1, limits)) / SPOTS
            # As many bytes at every place: so many records, where lines are long, stand for so many in the file.
            wanted = min(line * records / SPOTS, limits.record)
            found: list[Any] = []
            read = 0
            for one in (one for place in places for one in _lines(stream, place, wanted, limits)):
                found += _record_of(one, limits)
                read += len(one)
    except OSError as error:
        raise UnreadableFile(path, f"cannot be read ({error}); check its permissions and the disk") from error
    return found, read / size


def _lines(stream: BinaryIO, place: int, wanted: float, limits: Limits) -> Iterator[bytes]:
    """Whole lines from the first that begins at a place or after it, until so many bytes are read; of one that is
    longer than a record may be, a part."""
    stream.seek(max(place - 1, 0))
    if place:
        stream.readline(limits.record)  # the rest of a line that began before
    while wanted > 0 and (line := stream.readline(limits.record)):
        wanted -= len(line)
        yield line


def _of_compressed(path: Path, compression: str, records: int, limits: Limits) -> _Found:
    found: list[Any] = []
    try:
        with opened(path, limits) as file, decompressed(file, compression, path, limits) as stream:
            for _, line in bounded_lines(stream, path, limits):
                found += [too_long(line.size, limits)] if isinstance(line, TooLong) else _record_of(line, limits)
                # Arrow reads 64 KiB ahead of the lines: little of what must have been read.
                if len(found) >= records and file.tell() >= WHOLE_BYTES // 2:
                    break
            share = file.tell() / os.fstat(file.fileno()).st_size if stream.peek(1) else 1.0
    except OSError as error:
        raise UnreadableFile(path, f"is not whole {compression} data ({error})") from error
    return found, share


def _of_parquet(path: Path, records: int, limits: Limits) -> _Found:
    import pyarrow as pa

    found: list[Any] = []
    try:
        with opened(path, limits) as raw, parquet_file(raw, path, limits) as file:
            rows, groups = file.parquet.metadata.num_rows, file.parquet.num_row_groups
            chosen = sorted({spot * groups // SPOTS for spot in range(SPOTS)}) if groups else []
            each = -(-records // max(len(chosen), 1))
            for group in chosen:
                batches: Iterator[Any] = file.parquet.iter_batches(each, row_groups=[group], columns=file.columns)
                found += batch_records(next(batches), file, limits)
    except (pa.ArrowException, OSError, StopIteration) as error:
        raise UnreadableFile(path, f"is not a whole Parquet file ({error})") from error
    return found, len(found) / rows if rows else 1.0


def _record_of(line: bytes, limits: Limits) -> list[Any]:
    """The record of a line, or why it is none; nothing for a blank line."""
    line = line.strip(b" \t\r\n")
    if not line:
        return []
    try:
        return [json_object(line.removeprefix(b"\xef\xbb\xbf"), limits)]
    except BadRecord as bad:
        return [BadRecord(bad.field, bad.reason)]  # without what it was raised in, which holds the line


def _sample(found: list[Any], share: float, columns: Mapping[str, str] | None) -> FileSample:
    examples: dict[str, Example] = {}  # by id: records of equal content are one
    for position, record in enumerate(found):
        try:
            if isinstance(record, BadRecord):
                raise record
            example = example_of(record, position + 1, "candidate", columns)
            examples.setdefault(example.id, example)
        except BadRecord:
            continue
    return FileSample(list(examples.values()), len(found) - len(examples), share)
