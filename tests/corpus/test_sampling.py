"""Samples of candidate files against the files read whole."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_assets.corpus.files import read_examples
from prism_assets.corpus.sampling import WHOLE_BYTES, sample_file
from prism_assets.errors import UnreadableFile

# Longer and longer: what is read at the beginning alone is not like the rest.
RECORDS = [{"prompt": f"{number} " * (1 + number // 400), "completion": str(number)} for number in range(20_000)]
LINES = "".join(json.dumps(one) + "\n" for one in RECORDS)


def test_a_small_file_is_read_whole_without_its_duplicates(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*RECORDS[:50], RECORDS[0]]) + "{no json\n")
    sample = sample_file(path, 10)
    assert (sample.examples, len(sample.examples) + sample.rejected) == (read_examples(path, "candidate")[0], 52)
    assert sample.share == 1


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_file_is_sampled_all_over_and_its_rows_follow_from_the_share(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text(LINES)
        assert path.stat().st_size > WHOLE_BYTES
    else:
        pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=500)
    sample = sample_file(path, 800)
    assert 600 <= len(sample.examples) <= 1_300 and sample.rejected == 0
    numbers = [int(one.completion_text) for one in sample.examples]
    assert min(numbers) < 5_000 and max(numbers) > 18_000
    # Of bytes: longer rows are sampled as often as short ones, so characters are right where rows are not quite.
    assert len(sample.examples) / sample.share == pytest.approx(20_000, rel=0.15 if kind == "jsonl" else 0.01)
    characters = sum(len(one.prompt_text) for one in sample.examples) / sample.share
    assert characters == pytest.approx(sum(len(one["prompt"]) for one in RECORDS), rel=0.1)


def test_a_large_compressed_file_is_sampled_at_its_beginning(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    alike = [{"prompt": f"{number * 7919 % 99991} " * 20, "completion": str(number**3)} for number in range(100_000)]
    path.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in alike).encode()))
    assert path.stat().st_size > WHOLE_BYTES
    sample = sample_file(path, 100)
    assert sample.share < 1
    assert len(sample.examples) / sample.share == pytest.approx(100_000, rel=0.15)


def test_bad_records_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(LINES + "\n" + '{"prompt": "no completion"}\n[1]\n' * 20_000)
    sample = sample_file(path, 800)
    assert sample.rejected / sample.share == pytest.approx(40_000, rel=0.25)


@pytest.mark.parametrize(
    ("name", "content"), [("a.parquet", b"PAR1 not"), ("a.jsonl", b""), ("a.txt", b"{}"), ("a.jsonl.gz", b"no gzip")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFile, match=name):
        sample_file(tmp_path / name, 10)
