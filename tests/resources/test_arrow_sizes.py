"""Sizes of Arrow files before they are decompressed, against Arrow's own batches."""

import struct

import numpy as np
import pyarrow as pa
import pytest

from prism_assets.resources.arrow_sizes import decompressed_size

TABLE = pa.table(
    {
        "text": [f"{row} " * 500 for row in range(1000)],
        "entry": pa.array(["u", "v"] * 500).dictionary_encode(),
        "list": [[1, 2]] * 1000,
        "struct": [{"a": 1, "b": "x"}] * 1000,
        "null": pa.nulls(1000),
    }
)


@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_it_is_what_the_buffers_take(tmp_path, new, compression, legacy):
    options = pa.ipc.IpcWriteOptions(compression=compression, use_legacy_format=legacy)
    path = tmp_path / "a.arrow"
    with new(str(path), TABLE.schema, options=options) as writer:
        writer.write_table(TABLE, max_chunksize=300)
    reader = pa.ipc.open_file(str(path)) if new is pa.ipc.new_file else pa.ipc.open_stream(path.read_bytes())
    batches = [reader.get_batch(at) for at in range(4)] if new is pa.ipc.new_file else list(reader)
    plain = pa.BufferOutputStream()
    with pa.ipc.new_stream(plain, TABLE.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    with open(path, "rb") as file:
        file.seek(3)
        found = decompressed_size(file)
        assert file.tell() == 3
    # Apart from alignment and messages it is what the same batches take without compression.
    assert 0.99 * plain.getvalue().size < found < plain.getvalue().size
    assert found > 0.99 * sum(batch.nbytes for batch in batches)


def test_a_batch_that_the_footer_names_twice_counts_twice(tmp_path):
    path = tmp_path / "a.arrow"
    with pa.ipc.new_file(str(path), pa.schema({"a": pa.int64()})) as writer:
        writer.write_table(pa.table({"a": range(10_000)}))
        writer.write_table(pa.table({"a": range(10)}))
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<i", content, len(content) - 10)
    footer = len(content) - 10 - length
    # The blocks of the two batches follow each other in the footer: where a message begins, and its two lengths.
    first = next(
        at
        for at in range(footer, len(content) - 58)
        if struct.unpack_from("<q", content, at + 16)[0] == 80_000
        and struct.unpack_from("<q", content, at + 40)[0] < 200
    )
    content[first + 24 : first + 48] = content[first : first + 24]
    path.write_bytes(content)
    reader = pa.ipc.open_file(str(path))
    assert [reader.get_batch(at).num_rows for at in range(2)] == [10_000, 10_000]
    with open(path, "rb") as file:
        assert decompressed_size(file) == 160_000


def test_damage_is_an_error_and_nothing_else(tmp_path):
    path, random, refused = tmp_path / "a.arrow", np.random.default_rng(0), 0
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        with new(str(path), TABLE.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(TABLE)
        whole = path.read_bytes()
        for _ in range(300):
            content = bytearray(whole[: random.integers(len(whole))] if random.random() < 0.2 else whole)
            for _ in range(8):
                content[random.integers(len(content))] ^= 1 << random.integers(8)
            path.write_bytes(content)
            with open(path, "rb") as file:
                try:
                    assert decompressed_size(file) >= 0
                except OSError:
                    refused += 1
    assert refused > 100
