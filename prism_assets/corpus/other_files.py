"""Records of JSON arrays, of CSV and TSV, and of Arrow files, which `datasets` writes: one at a time."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prism_assets.corpus.arrow_values import require_sound, schema_without_views, without_runs
from prism_assets.corpus.limits import Limits, bounded_slices, bytes_of_rows, require_bounded_arrow, too_long
from prism_assets.corpus.records import EXCERPT_CHARACTERS, BadRecord, excerpt_of
from prism_assets.errors import UnreadableFile

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_CHUNK = 2**16
# Line or number of a record, the record or why there is none, and a function that gives its excerpt.
Record = tuple[int, "dict | BadRecord", Callable[[], str]]


def json_array_records(
    stream: BinaryIO, path: Path, limits: Limits, object_of: Callable[[bytes], dict]
) -> Iterator[Record]:
    """The elements of an array of objects, numbered from 1. Raises UnreadableFile where it is no whole array."""
    text, number = _Text(stream, path, limits), 0
    if text.next() != "[":
        raise UnreadableFile(path, "is no JSON array of objects; name it .jsonl if it has one object a line")
    text.skip(1)
    while text.next() != "]":
        number += 1
        raw = text.element()
        try:
            record: dict | BadRecord = object_of(raw.encode("utf-8", "surrogatepass"))
        except BadRecord as bad:
            record = bad
        yield number, record, lambda raw=raw: excerpt_of(raw[:EXCERPT_CHARACTERS])
        if text.next() == ",":
            text.skip(1)
        elif text.next() != "]":
            raise UnreadableFile(path, f"lacks a comma or the closing bracket after element {number:,}")
    text.skip(1)
    if text.next():
        raise UnreadableFile(path, f"goes on after the closing bracket, which follows element {number:,}")


class _Text:
    """A JSON text that is read as far as it is needed, never more than one record beyond it."""

    def __init__(self, stream: BinaryIO, path: Path, limits: Limits) -> None:
        self._stream, self._path, self._limits = stream, path, limits
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder(parse_int=str)  # it finds the end of a value; no number is too long for that
        self._text, self._at, self._ended = "", 0, False

    def next(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_CHUNK):
                return ""

    def skip(self, characters: int) -> None:
        """Go on behind so many characters."""
        self._at += characters

    def element(self) -> str:
        """The text of the value that begins here. Raises UnreadableFile for one that is none, or is too long."""
        while True:
            try:
                _, end = self._json.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:
                    found, self._at = self._text[self._at : end], end
                    return found
                error = None
            except json.JSONDecodeError as caught:
                error = caught
            except RecursionError:
                raise UnreadableFile(self._path, "holds a value that is nested too deeply") from None
            held = len(self._text) - self._at
            if held > self._limits.record:
                raise UnreadableFile(
                    self._path, f"holds an element of more than the {self._limits.record:,} bytes of limits.record"
                )
            if not self._more(max(_CHUNK, held)):  # twice as much each time: an element is not parsed ever again
                if error is None:
                    continue
                near = excerpt_of(self._text[error.pos : error.pos + 40])
                raise UnreadableFile(self._path, f"is no valid JSON near {near!r}: {error.msg}")

    def _more(self, size: int) -> bool:
        if self._ended:
            return False
        raw = self._stream.read(size)
        self._ended = not raw
        try:
            self._text, self._at = self._text[self._at :] + self._decoder.decode(raw, final=not raw), 0
        except UnicodeDecodeError as error:
            raise UnreadableFile(self._path, f"is not UTF-8 ({error.reason}); save it as UTF-8") from None
        return True


def table_of_text_records(stream: BinaryIO, path: Path, limits: Limits, delimiter: str) -> Iterator[Record]:
    """The rows of CSV or TSV with the columns of the first row; an empty cell counts as absent. The line of a row is
    its first."""
    before = csv.field_size_limit(limits.record)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names) or not all(names):
            raise UnreadableFile(path, "needs a first line with a different name for each column")
        line = reader.line_num
        for row in reader:
            first, line = line + 1, reader.line_num
            if not row:
                continue
            record: dict | BadRecord
            if len(row) != len(names):
                record = BadRecord(
                    "", f"{len(row)} cells, and there are {len(names)} columns; quote what holds a comma"
                )
            else:
                record = {name: cell or None for name, cell in zip(names, row, strict=True)}
            yield first, record, lambda row=row: excerpt_of(delimiter.join(row)[: 2 * EXCERPT_CHARACTERS])
    except csv.Error as error:
        raise UnreadableFile(path, f"is not well-formed after line {reader.line_num:,}: {error}") from None
    except UnicodeDecodeError as error:
        raise UnreadableFile(path, f"is not UTF-8 ({error.reason}); save it as UTF-8") from None
    finally:
        csv.field_size_limit(before)
        text.detach()


def arrow_records(
    stream: BinaryIO,
    path: Path,
    limits: Limits,
    rows_of: Callable[[Any], Iterator[dict | BadRecord]],
    excerpt: Callable[[Any], str],
) -> Iterator[Record]:
    """The rows of an Arrow file or stream (`Dataset.save_to_disk` writes streams), numbered from 1."""
    import pyarrow as pa

    row = 0
    try:
        require_bounded_arrow(stream, path, limits)
        for batch in _batches(pa.PythonFile(_NoLonger(stream), "r")):
            require_sound(batch)
            batch = without_runs(batch)
            if (schema := schema_without_views(batch.schema)) != batch.schema:
                limits.require_expansion(path, os.fstat(stream.fileno()).st_size, bytes_of_rows(batch))
                batch = batch.cast(schema)
            for part in bounded_slices(batch, limits):
                records = [too_long(part, limits)] if isinstance(part, int) else rows_of(part)
                for record in records:
                    row += 1
                    yield row, record, lambda record=record: excerpt(record)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of the name of a column
        raise UnreadableFile(path, f"is not a whole Arrow file ({error}); write it again, or copy it again") from error


class _NoLonger:
    """A file of which never more is asked for than it holds: a damaged length is no reason to ask for memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        """As of any file."""
        left = max(self._size - self._file.tell(), 0)
        return self._file.read(left if size < 0 else min(size, left))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _batches(file: Any) -> Iterator[Any]:
    import pyarrow as pa

    try:
        reader = pa.ipc.open_stream(file)
    except pa.ArrowInvalid:
        file.seek(0)
        whole = pa.ipc.open_file(file)
        for number in range(whole.num_record_batches):
            yield whole.get_batch(number)
        return
    yield from reader


def describes_a_dataset(path: Path) -> bool:
    """Whether a .json file is what `Dataset.save_to_disk` writes beside the Arrow files."""
    if path.name == "dataset_dict.json":
        return any((folder / "state.json").exists() for folder in path.parent.iterdir() if folder.is_dir())
    return path.name in ("state.json", "dataset_info.json") and any(path.parent.glob("*.arrow"))
