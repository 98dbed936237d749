"""Files that were made to take all memory or all time, read by a process that may have little of both."""

import gzip
import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_assets.corpus.files import json_object, read_examples
from prism_assets.corpus.limits import FREE_BYTES, Limits, bounded_slices
from prism_assets.corpus.records import BadRecord
from prism_assets.corpus.sampling import sample_file
from prism_assets.errors import UnreadableFile

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
GOOD = {"prompt": "a", "completion": "b"}

READER = """
import resource, sys, time
import duckdb, pyarrow, pyarrow.compute, pyarrow.parquet
from pathlib import Path
from prism_assets.corpus.files import read_examples
from prism_assets.corpus.sampling import sample_file
from prism_assets.errors import UnreadableFile

path, mib = Path(sys.argv[1]), int(sys.argv[2])
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + mib * 2**20,) * 2)
start = time.process_time()
for read in (lambda: read_examples(path, "candidate"), lambda: sample_file(path, 100))[: int(sys.argv[3])]:
    try:
        found = read()
        print("rows", len(found[0]), [one.reason for one in found[1][:2]] if isinstance(found[1], list) else found[1])
    except UnreadableFile as error:
        print("unreadable:", error.reason)
print("seconds", round(time.process_time() - start, 1))
"""


# Address space that is reserved and not used would count.
LITTLE = {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"}


def read_in_little_memory(path: Path, mib: int, sample: bool = True) -> list[str]:
    """What comes of reading a file, and of sampling it, with so much memory more than an idle process has."""
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path), str(mib), str(1 + sample)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **LITTLE},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *said, seconds = done.stdout.splitlines()
    assert float(seconds.split()[1]) < 20
    return said


def repeated(path: Path, content: bytes, times: int) -> Path:
    """A .gz whose decompressed content is so many repetitions: members may follow each other."""
    path.write_bytes(gzip.compress(content) * times)
    return path


def test_three_megabytes_that_hold_a_line_of_three_gigabytes(tmp_path):
    path = repeated(tmp_path / "a.jsonl.gz", b"a" * (64 * MIB), 48)
    assert 2.5 * MIB < path.stat().st_size < 3.5 * MIB
    (reading,) = read_in_little_memory(path, 128, sample=False)
    assert "more than 200 times its" in reading and "limits.expansion" in reading


def test_a_line_of_a_quarter_of_a_gigabyte_beside_good_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(GOOD).encode() + b"\n"
    with open(path, "wb") as file:
        file.write(good)
        file.seek(2**28, 1)  # a hole: zeros, which take no space on the disk
        file.write(b"\n" + good.replace(b"a", b"c"))
    reading, _ = read_in_little_memory(path, 128)
    assert reading.startswith("rows 2 ['268,435,456 bytes, and limits.record allows 16,000,000'")


@pytest.mark.parametrize("kind", ["plain", "gz"])
def test_blank_lines_without_end(tmp_path, kind):
    if kind == "plain":
        path = tmp_path / "a.jsonl"
        path.write_bytes(b"\n" * 1_500_000)
    else:
        path = repeated(tmp_path / "a.jsonl.gz", b"\n" * (64 * MIB), 24)
        assert path.stat().st_size < 1.7 * MIB
    reading, _ = read_in_little_memory(path, 128)
    assert "more than the 1,000,000 blank lines that limits.blank_lines allows" in reading


def test_a_parquet_file_whose_every_row_repeats_a_long_text(tmp_path):
    prompt = pa.array(["x" * MIB, "y" * MIB]).take(pa.array([0, 1] * 75)).dictionary_encode()
    turns = pa.array([[{"role": "user", "content": "x" * MIB}, {"role": "assistant", "content": "y"}]] * 150)
    pq.write_table(pa.table({"prompt": prompt, "completion": ["b"] * 150}), tmp_path / "a.parquet", store_schema=False)
    pq.write_table(pa.table({"messages": turns}), tmp_path / "b.parquet")
    for name, rows in (("a.parquet", 2), ("b.parquet", 1)):
        assert (tmp_path / name).stat().st_size < MIB
        (reading,) = read_in_little_memory(tmp_path / name, 160, sample=False)
        assert reading.startswith(f"rows {rows} ['duplicate of line 1'")


def test_a_parquet_file_of_very_many_equal_rows(tmp_path):
    count = 20_000_000
    zeros = pa.Array.from_buffers(pa.int8(), count, [None, pa.py_buffer(bytes(count))])
    prompt = pa.DictionaryArray.from_arrays(zeros, ["a"])
    table = pa.table({"prompt": prompt, "completion": prompt})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=count)
    assert (tmp_path / "a.parquet").stat().st_size < MIB
    reading, sampling = read_in_little_memory(tmp_path / "a.parquet", 128)
    assert "limits.expansion" in reading and "limits.expansion" in sampling


def test_an_arrow_file_of_which_little_says_much(tmp_path):
    def write(name: str, table: pa.Table, compression: str | None = None) -> Path:
        new = pa.ipc.new_stream if name == "compressed" else pa.ipc.new_file
        with new(str(tmp_path / name), table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
            writer.write_table(table)
        assert (tmp_path / name).stat().st_size < 2 * MIB
        return tmp_path / name

    count, long = 2000, b"x" * MIB
    views = np.tile(np.frombuffer(struct.pack("<i4sii", len(long), long[:4], 0, 0), np.int32), count)
    shared = pa.Array.from_buffers(pa.string_view(), count, [None, pa.py_buffer(views.tobytes()), pa.py_buffer(long)])
    rows = {"prompt": [str(row) for row in range(count)], "completion": ["b"] * count}
    files = [
        write("compressed", pa.table({"prompt": [long.decode()] * 300, "completion": ["b"] * 300}), "zstd"),
        write("views", pa.table({**rows, "completion": shared})),
        write("nulls", pa.table({"prompt": pa.nulls(50_000_000), "completion": pa.nulls(50_000_000)})),
    ]
    for path in files:
        arrow = path.rename(path.with_suffix(".arrow"))
        (said,) = read_in_little_memory(arrow, 256, sample=False)
        assert "limits.expansion" in said, arrow
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([count], pa.int32()), [long.decode()])
    path = write("runs", pa.table({"prompt": runs, "completion": ["b"] * count})).rename(tmp_path / "runs.arrow")
    (reading,) = read_in_little_memory(path, 256, sample=False)
    assert reading.startswith("rows 1 ['duplicate of line 1'")


def test_a_compressed_buffer_that_asks_for_a_terabyte(tmp_path):
    path = tmp_path / "a.arrow"
    with pa.ipc.new_file(
        str(path), pa.schema({"prompt": pa.string()}), options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_table(pa.table({"prompt": ["x" * 4321]}))
    content = path.read_bytes()
    at = content.rindex(struct.pack("<q", 4321))  # the buffer of the text; before it stand the offsets
    path.write_bytes(content[:at] + struct.pack("<q", 2**40) + content[at + 8 :])
    assert "limits.expanded" in read_in_little_memory(path, 128)[0]


def test_arrow_columns_of_every_layout_are_read(tmp_path):
    count = 50
    rows = {"prompt": [f"{row} " * 40_000 for row in range(count)], "completion": ["b"] * count}
    notes = {
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array([20, count], pa.int32()), ["x", "y"]),
        "numbers": pa.array([1, 2] * 25).dictionary_encode(),
        "lists": pa.DictionaryArray.from_arrays(pa.array([0, 1] * 25, pa.int8()), pa.array([["x"], ["y", "z"]])),
        "views": pa.array(["a" * 20_000] * count).cast(pa.string_view()),
        "list views": pa.array([["a", "b"]] * count, pa.list_view(pa.string_view())),
    }
    for name, note in notes.items():
        # Texts of prompts as views, as polars writes them: rows enough for several parts.
        table = pa.table({**rows, "prompt": pa.array(rows["prompt"]).cast(pa.string_view()), "note": note})
        with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
        examples, rejects = read_examples(tmp_path / "a.arrow", "candidate")
        assert [one.prompt_text for one in examples] == rows["prompt"] and not rejects, name


def test_every_limit_names_its_figure_and_its_setting(tmp_path):
    path = tmp_path / "a.jsonl"
    deep = {**GOOD, "more": [[[["x"]]]]}
    path.write_text(
        "\n\n\n".join(
            json.dumps(one) for one in (GOOD, deep, {**GOOD, "prompt": "c" * 200}, {**GOOD, "completion": 1}, [])
        )
    )
    examples, rejects = read_examples(path, "candidate", limits=Limits(depth=4, record=150))
    assert len(examples) == 1
    assert rejects[0].reason == "more than 4 arrays and objects within each other (limits.depth)"
    long = len(json.dumps({**GOOD, "prompt": "c" * 200}))
    assert rejects[1].reason == f"{long} bytes, and limits.record allows 150"
    assert rejects[1].excerpt.startswith('{"prompt": "ccc') and len(rejects[1].excerpt) <= 160
    with pytest.raises(UnreadableFile, match="more than the 7 blank lines that limits.blank_lines allows"):
        read_examples(path, "candidate", limits=Limits(blank_lines=7))
    with pytest.raises(UnreadableFile, match="than 2 rejected or repeated records.*limits.rejects.*line 4: duplicate"):
        read_examples(path, "candidate", limits=Limits(rejects=2))
    assert len(read_examples(path, "candidate", limits=Limits(blank_lines=8, rejects=3))[1]) == 3
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    with pytest.raises(UnreadableFile, match="more than the 100 bytes that limits.expanded allows"):
        read_examples(tmp_path / "a.jsonl.gz", "candidate", limits=Limits(expanded=100))


def test_a_line_of_exactly_the_longest_length_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(GOOD)
    for end in ("\n", ""):
        path.write_text(line + end)
        assert len(read_examples(path, "candidate", limits=Limits(record=len(line)))[0]) == 1
        assert not read_examples(path, "candidate", limits=Limits(record=len(line) - 1))[0]


def test_a_small_file_of_little_variety_may_expand_as_it_likes(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write((json.dumps(GOOD) + "\n").encode() * 30_000)
    assert 30_000 * 35 < FREE_BYTES and path.stat().st_size * 200 < 30_000 * 35
    assert len(read_examples(path, "candidate")[1]) == 29_999


def test_depth_is_counted_in_arrays_and_objects():
    for depth in (1, 2, 5, 30):
        raw = b'{"a":' * depth + b"1" + b"}" * depth
        assert json_object(raw, Limits(depth=depth))
        with pytest.raises(BadRecord, match="within each other"):
            json_object(raw, Limits(depth=depth - 1))
    wide = json.dumps({"messages": [{"role": "user", "content": "a"}] * 500}).encode()
    assert json_object(wide, Limits(depth=3))


def test_one_name_given_twice_among_a_hundred_thousand_is_found_at_once():
    raw = json.dumps({str(number): 1 for number in range(100_000)})[:-1] + ', "99999": 2}'
    with pytest.raises(BadRecord, match="given twice") as found:
        json_object(raw.encode())
    assert found.value.field == "99999"


@pytest.mark.parametrize(
    "record",
    [
        {str(number): 1 for number in range(300_000)},
        {**GOOD, "choices": [str(number) for number in range(300_000)]},
        {"x" * 5_000_000: 1},
    ],
    ids=["names", "choices", "a long name"],
)
def test_a_record_of_very_many_things_is_rejected_within_seconds(tmp_path, record):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    start = time.process_time()
    _, (reject,) = read_examples(path, "eval")
    assert time.process_time() - start < 5 and len(reject.reason) < 500


def test_rows_are_cut_into_parts_that_hold_all_of_them(monkeypatch):
    from prism_assets.corpus import limits

    monkeypatch.setattr(limits, "_SLICE_BYTES", 100)
    texts = ["a" * size for size in (1, 90, 90, 250, 3, 40, 40, 40)]
    batch = pa.record_batch({"prompt": pa.array(texts).dictionary_encode(), "m": [[{"c": "b"}]] * 8})
    parts = list(bounded_slices(batch, Limits(record=200)))
    assert [one for one in parts if isinstance(one, int)] != []
    kept = [row["prompt"] for part in parts if not isinstance(part, int) for row in part.to_pylist()]
    assert kept == [text for text in texts if len(text) < 200]
    # Sizes are those of the rows written out, in slices too.
    whole = pa.record_batch({"prompt": pa.array(texts)})
    for start in range(8):
        alone = list(bounded_slices(batch.slice(start, 1), Limits(record=1)))
        assert alone[0] >= len(texts[start]) and alone[0] <= whole.slice(start, 1).nbytes + 40


def test_texts_of_every_kind_of_column_are_read_as_they_are(tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["ä", "b", "c"], pa.large_string()),
            "completion": pa.array(["x", "x", "y"]).dictionary_encode(),
            "id": pa.array([1, 2, 3]),
            "source": pa.array([None, "s", "s"]),
            "other": pa.array([[1.0], [2.0], [3.0]]),
        }
    )
    for store in (True, False):
        pq.write_table(table, tmp_path / "a.parquet", store_schema=store)
        examples, _ = read_examples(tmp_path / "a.parquet", "candidate")
        assert [(one.prompt_text, one.completion_text, one.record_id, one.source) for one in examples] == [
            ("ä", "x", "1", None),
            ("b", "x", "2", "s"),
            ("c", "y", "3", "s"),
        ]


def test_a_link_out_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "secret.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "inbox" / "a.jsonl").symlink_to(tmp_path / "secret.jsonl")
    limits = Limits(inside=tmp_path / "inbox")
    path = tmp_path / "inbox" / "a.jsonl"
    for read in (lambda: read_examples(path, "candidate", limits=limits), lambda: sample_file(path, 10, limits)):
        with pytest.raises(UnreadableFile, match="leads out of the inbox.*candidates.follow_links"):
            read()
    assert len(read_examples(tmp_path / "inbox" / "a.jsonl", "candidate")[0]) == 1
