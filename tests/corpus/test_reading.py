"""Files become tables while they are read, a few records in memory at a time."""

import json
import logging
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from prism_assets.corpus.encoder import TokenizedExample
from prism_assets.corpus.files import iter_examples, read_examples
from prism_assets.corpus.limits import Limits
from prism_assets.corpus.reading import read_tables
from prism_assets.corpus.record_file import RecordFile
from prism_assets.corpus.records import Reject
from prism_assets.corpus.template import Untokenizable
from prism_assets.corpus.token_tables import CANDIDATE_SCHEMA, TARGET_SCHEMA, encode_all, to_table
from prism_assets.errors import UnreadableFile
from prism_assets.progress import progress
from prism_assets.resources.lake import Lake, Recipe, hash_rows, hash_table
from prism_assets.resources.lake import spool as spools


class Stage:
    """What reading needs of a stage."""

    def __init__(self, folder: Path) -> None:
        self.lake, self.log = Lake(str(folder / "lake")), logging.getLogger("test_reading")

    def progress(self, what: str, total: int | None) -> Any:
        return progress(self.log, what, total)


class LettersAsTokens:
    """A token a letter of the completion; a completion with a digit has none."""

    def encode(self, messages: Any) -> TokenizedExample:
        text = messages[-1].content
        if any(letter.isdigit() for letter in text):
            raise Untokenizable("completion", "a digit")
        ids = np.array([0, *map(ord, text)], np.int32)
        return TokenizedExample(ids, np.arange(len(ids)) > 0, truncated="long" in text)


def record_file(path: Path, **options: Any) -> RecordFile:
    read = partial(iter_examples, kind=options.pop("kind", "candidate"), limits=options.pop("limits", Limits()))
    schema = options.pop("schema", CANDIDATE_SCHEMA)
    return RecordFile(path, "", "candidates", "rejects", "p", schema, read, fields="candidate_fields", **options)


def write(path: Path, count: int, *more: str) -> Path:
    words = ["alpha", "beta", "gamma delta", "long epsilon"]
    rows = [{"prompt": f"{number}", "completion": words[number % 4], "n": number} for number in range(count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + "".join(f"{one}\n" for one in more))
    return path


def test_tables_written_while_reading_are_those_of_all_rows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spools, "_ROWS_A_BATCH", 7)
    monkeypatch.setattr(spools, "_BYTES_A_BATCH", 400)
    odd = ['{"prompt": "3", "completion": "long epsilon"}', '{"prompt": "x"}', '{"prompt": "y", "completion": "4"}']
    path = write(tmp_path / "a.jsonl", 50, *odd)
    stage: Any = Stage(tmp_path)
    encoder: Any = LettersAsTokens()
    tables = read_tables(stage, record_file(path), encoder)
    examples, rejects = read_examples(path, "candidate")
    tokenized, untokenizable = encode_all(examples, encoder)
    whole = to_table(examples, tokenized, CANDIDATE_SCHEMA)

    assert [one.line for one in rejects] == [51, 52]
    assert rejects[0].reason == "duplicate of line 4"
    assert hash_table(tables.rows.table) == hash_table(whole)
    published = stage.lake.publish(Recipe("candidates", 1), tables.rows)
    assert stage.lake.read_table(published).equals(whole)
    assert published.content_hash == hash_table(stage.lake.read_table(published))
    assert stage.lake.read_first(published, 3, ["line", "prompt"]).to_pylist() == [
        {"line": line, "prompt": str(line - 1)} for line in (1, 2, 3)
    ]
    notes = {"completion_tokens": sum(map(len, whole["completion"].to_pylist())), "truncated": 12, "duplicates": 1}
    assert published.notes.items() >= {**notes, "rows": 50, "unused_fields": ["n"]}.items()
    refused = stage.lake.read_table(stage.lake.publish(Recipe("rejects", 1), tables.rejects))
    assert [Reject(**one) for one in refused.to_pylist()] == [*rejects, *untokenizable]
    fields = stage.lake.read_table(stage.lake.publish(Recipe("candidate_fields", 1), tables.fields)).to_pylist()
    assert fields == [{"id": one.id, "line": one.line, "fields": one.fields} for one in examples[:50]]
    assert fields[49]["fields"] == '{"n": 49}'


def test_a_file_that_turns_out_to_be_damaged_leaves_no_row_of_it(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", 20, "{", "{", "{")
    stage: Any = Stage(tmp_path)
    encoder: Any = LettersAsTokens()
    with pytest.raises(UnreadableFile, match=r"limits\.rejects allows; the first is line 21"):
        read_tables(stage, record_file(path, limits=Limits(rejects=2)), encoder)
    tables = read_tables(stage, record_file(path, limits=Limits(rejects=2), may_be_unreadable=True), encoder)
    assert [one.table.num_rows for one in tables] == [0, 1, 0]
    (reject,) = tables.rejects.table.read(0, 9).to_pylist()  # pyright: ignore[reportAttributeAccessIssue]
    assert (reject["line"], reject["field"]) == (0, "file")


def test_choices_are_a_column_where_a_record_has_some(tmp_path: Path):
    stage: Any = Stage(tmp_path)
    encoder: Any = LettersAsTokens()
    path = write(tmp_path / "plain.jsonl", 3)
    plain = read_tables(stage, record_file(path, kind="eval", schema=TARGET_SCHEMA), encoder).rows.table
    assert plain.schema.names == TARGET_SCHEMA.names
    path = write(tmp_path / "with.jsonl", 3, '{"prompt": "z", "completion": "no", "choices": ["yes", "no"]}')
    some = read_tables(stage, record_file(path, kind="eval", schema=TARGET_SCHEMA), encoder).rows.table
    assert some.read(0, 4)["choices"].to_pylist() == [None, None, None, ["yes", "no"]]  # pyright: ignore[reportAttributeAccessIssue]


def test_of_a_record_that_was_read_only_its_id_stays_in_memory(tmp_path: Path):
    def peak(count: int) -> int:
        path = write(tmp_path / f"{count}.jsonl", count)
        stage: Any = Stage(tmp_path)
        encoder: Any = LettersAsTokens()
        tracemalloc.start()
        read_tables(stage, record_file(path), encoder)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)  # imports, caches
    small, large = peak(5_000), peak(15_000)
    assert (large - small) / 10_000 < 250  # an example has thousands of bytes


def test_large_tables_are_published_under_a_hash_of_blocks_whatever_their_chunks(monkeypatch: pytest.MonkeyPatch):
    from prism_assets.resources.lake import hashing

    table = pa.table({"text": [str(number) for number in range(40)], "list": [[number] for number in range(40)]})
    chunked = pa.concat_tables([table.slice(0, 13), table.slice(13, 1), table.slice(14)])
    whole = hash_table(table)
    assert hash_rows(table) == whole
    monkeypatch.setattr(hashing, "ROWS_A_BLOCK", 16)
    in_blocks = hash_rows(table)
    assert in_blocks == hash_rows(chunked) != whole == hash_table(chunked)
    assert hash_rows(table.slice(0, 39)) != in_blocks
    assert hash_rows(table.slice(16, 16)) == hash_table(chunked.slice(16, 16))
    # Texts that 32-bit offsets cannot reach.
    monkeypatch.setattr(hashing, "_MOST_BYTES", 10)
    assert hash_rows(table) == hash_rows(chunked) != in_blocks


def test_a_long_name_counts_as_what_waits_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    real = spools.Spool.append

    def append(spool: Any, row: Any, size: int = 0) -> None:
        sizes.append(size)
        real(spool, row, size)

    monkeypatch.setattr(spools.Spool, "append", append)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "x", "completion": "y", "source": "s" * 50_000}) + "\n")
    stage: Any = Stage(tmp_path)
    encoder: Any = LettersAsTokens()
    read_tables(stage, record_file(path), encoder)
    assert max(sizes) > 50_000
