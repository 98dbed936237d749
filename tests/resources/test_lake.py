"""The lake: what identifies an artefact, what publishing promises when things go wrong, and the DuckDB views."""

import errno
import json
import os
import threading
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from prism_assets.errors import DamagedArtifact, LakeError
from prism_assets.resources import store as store_module
from prism_assets.resources.lake.hashing import hash_folder, hash_table, hash_tensors
from prism_assets.resources.lake.lake import Lake
from prism_assets.resources.lake.recipe import SIDECAR, Recipe, digest

KINDS = ("table", "tensors", "folder")


@pytest.fixture
def lake(tmp_path):
    return Lake(root=str(tmp_path / "lake"))


def some_table(rows=10, seed=0):
    """One column of every kind of type that the stages publish."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, 3)).astype(np.float16)
    return pa.table(
        {
            "id": [f"row {number}" for number in range(rows)],
            "score": pa.array([None if number % 4 == 1 else number / 7 for number in range(rows)], pa.float64()),
            "tokens": pa.array([list(range(number % 3)) for number in range(rows)], pa.list_(pa.int32())),
            "mask": pa.array([[True] * (number % 3) for number in range(rows)], pa.list_(pa.bool_())),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), 3),
            "nothing": pa.nulls(rows, pa.string()),
        }
    )


def publish(lake, kind, recipe, content=0, run_id="run"):
    """Publish something of a kind; `content` changes what is in it."""
    if kind == "table":
        return lake.publish_table(recipe, some_table(seed=content), run_id=run_id)
    if kind == "tensors":
        tensors = {"a": torch.arange(6.0).reshape(2, 3) + content, "b": torch.ones(2, dtype=torch.bfloat16)}
        return lake.publish_tensors(recipe, tensors, run_id=run_id)

    def write(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "numbers.bin").write_bytes(bytes([content]) * 500)
        (folder / "names.txt").write_text("names")
        return {"files": 2}

    return lake.publish_folder(recipe, write, run_id=run_id)


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def nothing_half_made(lake, table):
    """Neither an artefact of the table nor a draft is on the disk."""
    return not list(lake.artifacts(table)) and not any(
        files_below(lake.folder / name) for name in ("artifacts", "unpublished", "heads")
    )


# -- content hashes ----------------------------------------------------------------------------------------------


def test_content_hash_of_a_table_does_not_see_how_it_is_laid_out(tmp_path):
    table = some_table(12)
    chunked = pa.concat_tables([table.slice(0, 5), table.slice(5, 1), table.slice(6)])
    sliced = pa.concat_tables([some_table(3, seed=9), table, some_table(2, seed=8)]).slice(3, 12)
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=5, compression="zstd")
    read_back = pq.read_table(tmp_path / "t.parquet")
    with_metadata = table.replace_schema_metadata({"made": "by"})
    assert chunked["id"].num_chunks == 3 and sliced["vector"].num_chunks == 1
    hashes = [hash_table(one) for one in (table, chunked, sliced, read_back, with_metadata)]
    assert len(set(hashes)) == 1


@pytest.mark.parametrize("name", ["id", "score", "tokens", "mask", "vector", "nothing"])
def test_content_hash_of_a_table_sees_every_value_name_and_type(name):
    table = some_table(12)
    position = table.column_names.index(name)
    values = table[name].to_pylist()
    other = {"id": "x", "score": 0.5, "tokens": [9], "mask": [False], "vector": [1.0, 2.0, 3.0], "nothing": "x"}[name]
    changed = table.set_column(
        position, name, pa.array([*values[:5], other, *values[6:]], table.schema.field(name).type)
    )
    renamed = table.rename_columns([f"{one}2" if one == name else one for one in table.column_names])
    swapped = table.take([1, 0, *range(2, 12)])
    hashes = {hash_table(one) for one in (table, changed, renamed, swapped)}
    assert len(hashes) == 4


def test_content_hash_of_a_table_tells_null_from_zero_and_types_apart():
    column = {"null": [None], "zero": [0.0], "nan": [float("nan")]}
    tables = [pa.table({"a": pa.array(values, pa.float64())}) for values in column.values()]
    tables += [pa.table({"a": pa.array([0], kind)}) for kind in (pa.int32(), pa.int64(), pa.float32())]
    assert len({hash_table(table) for table in tables}) == len(tables)


def test_content_hash_of_a_table_does_not_see_what_lies_under_nulls():
    valid = pa.array([True, False, True, True]).buffers()[1]
    arrays = [
        pa.Array.from_buffers(pa.float64(), 4, [valid, pa.py_buffer(np.array([1.0, hidden, 3.0, 4.0]).tobytes())])
        for hidden in (0.0, 77.0)
    ]
    assert arrays[0].equals(arrays[1])
    assert hash_table(pa.table({"a": arrays[0]})) == hash_table(pa.table({"a": arrays[1]}))


def test_content_hash_of_an_empty_table_survives_the_round_trip(lake):
    empty = some_table(4).slice(0, 0)
    artifact = lake.publish_table(Recipe("t", 1), empty)
    assert hash_table(lake.read_table(artifact)) == hash_table(empty) == artifact.content_hash


def test_content_hash_of_tensors_ignores_order_and_memory_layout_and_sees_values():
    matrix = torch.arange(6.0).reshape(2, 3)
    reference = hash_tensors({"a": matrix, "b": torch.ones(2)})
    assert hash_tensors({"b": torch.ones(2), "a": matrix.t().contiguous().t()}) == reference
    assert hash_tensors({"a": matrix.reshape(3, 2), "b": torch.ones(2)}) != reference
    assert hash_tensors({"a": matrix + 1e-6, "b": torch.ones(2)}) != reference
    assert hash_tensors({"a": matrix, "c": torch.ones(2)}) != reference
    assert hash_tensors({"a": matrix, "b": torch.ones(2, dtype=torch.float64)}) != reference


def test_content_hash_of_a_folder_ignores_its_place_and_sees_names_and_bytes(tmp_path):
    hashes = {}
    for name, files in {
        "one": {"a": b"1", "b/c": b"2"},
        "same": {"b/c": b"2", "a": b"1"},
        "bytes": {"a": b"1", "b/c": b"3"},
        "names": {"a": b"1", "b/d": b"2"},
        "moved": {"a": b"1", "c": b"2"},
    }.items():
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(content)
        hashes[name] = hash_folder(tmp_path / name)
    assert hashes["one"] == hashes["same"]
    assert len(set(hashes.values())) == 4


# -- fingerprints ------------------------------------------------------------------------------------------------


def test_fingerprint_depends_on_contents_settings_and_stage_version_alone(lake):
    first = publish(lake, "table", Recipe("source", 1, partition="first"))
    twin = publish(lake, "table", Recipe("source", 2, partition="renamed"))  # other artefact, same content
    other = publish(lake, "table", Recipe("source", 3), content=1)
    assert first.fingerprint != twin.fingerprint and first.content_hash == twin.content_hash

    base = Recipe("stage", 1, {"rate": 0.1, "names": ["a"]}, {"rows": first, "file": "abc"})
    same = [
        Recipe("stage", 1, {"names": ["a"], "rate": 0.1}, {"file": "abc", "rows": twin}),
        Recipe("stage", 1, base.settings, base.inputs, lineage={"pool": other}),
        Recipe("stage", 1, base.settings, base.inputs, partition="any", version="v2"),
    ]
    different = [
        Recipe("stage", 2, base.settings, base.inputs),
        Recipe("stage", 1, {**base.settings, "rate": 0.2}, base.inputs),
        Recipe("stage", 1, base.settings, {**base.inputs, "rows": other}),
        Recipe("stage", 1, base.settings, {**base.inputs, "rows": [first]}),
        Recipe("stage", 1, base.settings, {"lines": first, "file": "abc"}),
        Recipe("other", 1, base.settings, base.inputs),
    ]
    assert {recipe.fingerprint for recipe in same} == {base.fingerprint}
    assert len({base.fingerprint, *(recipe.fingerprint for recipe in different)}) == len(different) + 1


def test_digest_is_independent_of_key_order_and_takes_any_text():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest([1, 2]) != digest([2, 1])
    assert len(digest("a lone surrogate \udcff, and ü")) == 32


# -- publishing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_published_is_found_with_its_header(lake, kind):
    source = publish(lake, "table", Recipe("source", 1, partition="p"))
    recipe = Recipe("t", 3, {"rate": 0.5}, {"rows": source}, {"pool": [source]}, partition="x", version="v")
    assert lake.find(recipe) is None
    made = publish(lake, kind, recipe, run_id="run 7")
    found = lake.find(recipe)
    assert found == made and lake.local(found).exists()
    header = found.header
    assert (header["table"], header["version"], header["partition"]) == ("t", "v", "x")
    assert (header["stage_version"], header["settings"], header["run_id"]) == (3, {"rate": 0.5}, "run 7")
    reference = {"table": "source", "fingerprint": source.fingerprint, "content_hash": source.content_hash}
    assert header["inputs"] == {"rows": reference} and header["lineage"] == {"pool": [reference]}
    assert header["fingerprint"] == recipe.fingerprint in lake.local(found).name
    assert not files_below(lake.folder / "unpublished")


def test_content_comes_back_as_it_was(lake):
    table = some_table(9)
    published = lake.publish_table(Recipe("t", 1), table)
    assert lake.read_table(published).equals(table)
    assert lake.read_table(published, ["score"]).column_names == ["score"]
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4).to(torch.bfloat16), "c": torch.randn(3, 2).t()}
    back = lake.read_tensors(lake.publish_tensors(Recipe("u", 1), tensors))
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_attachments_lie_beside_the_table(lake):
    recipe = Recipe("t", 1)
    artifact = lake.publish_table(recipe, some_table(), attachments={".jsonl": lambda path: path.write_text("{}\n")})
    assert lake.local(artifact, suffix=".jsonl").read_text() == "{}\n"
    assert [one.fingerprint for one in lake.artifacts("t")] == [recipe.fingerprint]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", ["before the rename", "while flushing"])
def test_a_crash_at_any_point_of_publishing_leaves_nothing_half_made(lake, monkeypatch, kind, point):
    class Crash(Exception):
        pass

    def crash(*arguments, **keywords):
        raise Crash

    with monkeypatch.context() as patch:
        if point == "before the rename":
            patch.setattr(store_module.os, "replace", crash)
            patch.setattr(store_module.os, "link", crash)
        else:
            patch.setattr(store_module.os, "fsync", crash)
        with pytest.raises(Crash):
            publish(lake, kind, Recipe("t", 1))
    assert nothing_half_made(lake, "t")
    assert publish(lake, kind, Recipe("t", 1)) == lake.find(Recipe("t", 1))


def test_a_writer_that_raises_leaves_nothing_half_made(lake):
    def write_half(folder):
        (folder / "first.bin").write_bytes(b"1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lake.publish_folder(Recipe("t", 1), write_half)

    def attachment(path):
        path.write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        lake.publish_table(Recipe("t", 1), some_table(), attachments={".jsonl": attachment})
    assert nothing_half_made(lake, "t")


def test_a_table_is_never_seen_before_its_attachments(lake):
    def attachment(path):
        assert lake.find(Recipe("t", 1)) is None
        path.write_text("[]")

    def crash(path):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        lake.publish_table(Recipe("t", 1), some_table(), attachments={".a": attachment, ".b": crash})
    assert lake.find(Recipe("t", 1)) is None


def test_a_process_killed_while_writing_leaves_only_a_draft(lake):
    recipe = Recipe("t", 1)
    child = os.fork()
    if child == 0:

        def write(folder):
            (folder / "half.bin").write_bytes(b"1")
            os._exit(9)

        lake.publish_folder(recipe, write)
    os.waitpid(child, 0)
    assert lake.find(recipe) is None and not list(lake.artifacts("t"))
    assert [Path(name).name for name in files_below(lake.folder)] == ["half.bin"]
    assert publish(lake, "folder", recipe) == lake.find(recipe)


@pytest.mark.parametrize("kind", KINDS)
def test_of_two_publishers_the_first_wins_and_neither_fails(lake, kind):
    """The second publisher has the same recipe, another run id and (as a GPU may give it) other last bits."""
    recipe = Recipe("t", 1)
    first = publish(lake, kind, recipe, content=0, run_id="first")
    before = {name: (lake.folder / name).read_bytes() for name in files_below(lake.folder)}
    second = publish(lake, kind, recipe, content=1, run_id="second")
    assert second == first and second.header["run_id"] == "first"
    assert {name: (lake.folder / name).read_bytes() for name in files_below(lake.folder)} == before


@pytest.mark.parametrize("kind", KINDS)
def test_many_publishers_at_once_leave_one_artefact(lake, monkeypatch, kind):
    recipe = Recipe("t", 1)
    everyone_is_ready = threading.Barrier(4)
    flush = store_module._flush

    def flush_and_wait(path):  # all drafts are whole before the first is moved into place
        flush(path)
        everyone_is_ready.wait(timeout=20)

    monkeypatch.setattr(store_module, "_flush", flush_and_wait)
    results, errors = [], []

    def work(number):
        try:
            results.append(publish(lake, kind, recipe, run_id=f"run {number}"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(results) == 4 and len({artifact.header["run_id"] for artifact in results}) == 1
    assert len(list(lake.artifacts("t"))) == 1
    assert not files_below(lake.folder / "unpublished")


def test_a_file_system_without_hard_links_is_good_enough(lake, monkeypatch):
    def no_links(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(store_module.os, "link", no_links)
    assert publish(lake, "table", Recipe("t", 1)) == lake.find(Recipe("t", 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_said_and_leaves_nothing(lake, monkeypatch, kind):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "fsync", full)
        with pytest.raises(LakeError, match=r"disk of the lake .* is full .*: t was not published"):
            publish(lake, kind, Recipe("t", 1))
    assert nothing_half_made(lake, "t")


def test_a_full_disk_inside_safetensors_is_said_too(lake, monkeypatch):
    """safetensors reports the operating system's error as an exception of its own."""
    import safetensors
    import safetensors.torch

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(LakeError, match="is full"):
        publish(lake, "tensors", Recipe("t", 1))
    assert nothing_half_made(lake, "t")


def test_a_full_disk_while_a_head_is_moved_keeps_the_old_head(lake, monkeypatch):
    old = lake.point(publish(lake, "table", Recipe("t", 1)), "p")
    new = publish(lake, "table", Recipe("t", 2), content=1)

    def full(self, text, *arguments, **keywords):
        self.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(LakeError, match="is full"):
            lake.point(new, "p")
    assert lake.head("t", "p") == old
    assert len(files_below(lake.folder / "heads")) == 1


def test_other_errors_of_the_disk_are_not_called_a_full_disk(lake, monkeypatch):
    def forbidden(descriptor):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store_module.os, "fsync", forbidden)
    with pytest.raises(PermissionError):
        publish(lake, "table", Recipe("t", 1))


# -- damage ------------------------------------------------------------------------------------------------------


def damage_by_truncation(path):
    file = path / "inner" / "numbers.bin" if path.is_dir() else path
    with open(file, "rb+") as handle:
        handle.truncate(file.stat().st_size // 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_artefact_is_named_set_aside_and_rebuilt(lake, caplog, kind):
    recipe = Recipe("t", 1)
    artifact = publish(lake, kind, recipe)
    damage_by_truncation(lake.local(artifact))
    assert lake.find(recipe) is None
    aside = [path for path in lake.local(artifact).parent.iterdir() if path.name.endswith(".damaged")]
    assert len(aside) == 1 and not lake.local(artifact).exists()
    assert lake.local(artifact).name in caplog.text and aside[0].name in caplog.text and "rebuilt" in caplog.text
    assert list(lake.artifacts("t")) == []
    rebuilt = publish(lake, kind, recipe)
    assert rebuilt.content_hash == artifact.content_hash and lake.find(recipe) == rebuilt


@pytest.mark.parametrize("loss", ["a file", "the sidecar", "half of the sidecar"])
def test_a_folder_that_lost_something_is_rebuilt(lake, loss):
    recipe = Recipe("t", 1)
    artifact = publish(lake, "folder", recipe)
    sidecar = lake.local(artifact) / SIDECAR
    if loss == "a file":
        (lake.local(artifact) / "names.txt").unlink()
    elif loss == "the sidecar":
        sidecar.unlink()
    else:
        sidecar.write_text(sidecar.read_text()[:40])
    assert lake.find(recipe) is None
    assert publish(lake, "folder", recipe).content_hash == artifact.content_hash


@pytest.mark.parametrize("kind", ["table", "tensors"])
def test_a_file_of_something_else_is_not_taken_for_an_artefact(lake, kind):
    recipe = Recipe("t", 1)
    artifact = publish(lake, kind, recipe)
    if kind == "table":
        pq.write_table(pa.table({"a": [1]}), lake.local(artifact))
    else:
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, lake.local(artifact))
    assert lake.find(recipe) is None


@pytest.mark.parametrize("kind", ["table", "tensors"])
def test_one_flipped_bit_is_named_when_it_is_read_and_the_artefact_counts_as_not_made(lake, kind):
    recipe = Recipe("t", 1, partition="p")
    values = np.random.default_rng(0).normal(size=5000)

    def publish_values():
        if kind == "table":
            return lake.publish_table(recipe, pa.table({"a": values}))
        return lake.publish_tensors(recipe, {"a": torch.from_numpy(values)})

    read = lake.read_table if kind == "table" else lake.read_tensors
    artifact = lake.point(publish_values(), "p")
    whole = lake.local(artifact).read_bytes()
    content = bytearray(whole)
    content[20_000] ^= 1  # the header and the size stay as they were
    lake.local(artifact).write_bytes(content)
    with pytest.raises(
        DamagedArtifact, match=rf"{lake.local(artifact).name} \(t\[p\]\) is damaged .* will be rebuilt.*prism run"
    ):
        read(artifact)
    assert lake.find(recipe) is None and lake.head("t", "p") is None
    (aside,) = lake.local(artifact).parent.glob("*.damaged")
    assert aside.read_bytes() == content
    rebuilt = publish_values()
    assert rebuilt.content_hash == artifact.content_hash and rebuilt.key == artifact.key
    read(rebuilt)


def test_a_table_that_cannot_be_reached_is_not_called_damaged(lake):
    artifact = publish(lake, "table", Recipe("t", 1))
    lake.local(artifact).rename(lake.local(artifact, suffix=".elsewhere"))
    with pytest.raises(LakeError, match="cannot be read") as failure:
        lake.read_table(artifact)
    assert not isinstance(failure.value, DamagedArtifact) and not list(lake.local(artifact).parent.glob("*.damaged"))


# -- heads -------------------------------------------------------------------------------------------------------


def test_a_head_shows_what_it_was_pointed_at_last(lake):
    old, new = publish(lake, "table", Recipe("t", 1)), publish(lake, "tensors", Recipe("t", 2))
    lake.point(old, "p", "scope", "run 1")
    lake.point(old, "q", "scope")
    lake.point(old, "p")
    lake.point(new, "p", "scope", "run 2")
    assert lake.head("t", "p", "scope") == new
    assert lake.head("t", "q", "scope") == lake.head("t", "p") == old
    assert lake.head("t", "r", "scope") is None and lake.head("u", "p", "scope") is None
    entries = {(entry["partition"], entry["scope"]): entry for entry in lake.heads("t")}
    assert len(entries) == 3
    assert entries["p", "scope"]["fingerprint"] == new.fingerprint and entries["p", "scope"]["run_id"] == "run 2"
    lake.retire("t", "p", "scope")
    lake.retire("t", "never there")
    assert lake.head("t", "p", "scope") is None and lake.get("t", new.fingerprint) == new


def test_a_partition_without_artefact_is_asked_for_with_advice(lake):
    with pytest.raises(LakeError, match=r"no t\[p\] yet: materialise it first, or run `prism run`"):
        lake.require("t", "p")


def test_a_head_whose_artefact_is_damaged_counts_as_absent(lake):
    artifact = lake.point(publish(lake, "table", Recipe("t", 1)), "p")
    damage_by_truncation(lake.local(artifact))
    assert lake.head("t", "p") is None


AWKWARD = [
    "../../escaped",
    "/etc/passwd",
    "..",
    "a/b",
    "O'Brien; DROP TABLE heads;--",
    'say "hi"',
    "ü 日本",
    "%2e%2e",
    "",
]


def test_names_from_data_never_leave_the_lake(lake, tmp_path):
    artifact = publish(lake, "table", Recipe("t", 1))
    for name in AWKWARD:
        lake.point(artifact, name, scope=name)
    assert {path.name for path in tmp_path.iterdir()} == {"lake"}
    inside = (lake.folder / "heads" / "t").resolve()
    heads = [path for path in inside.rglob("*") if path.is_file()]
    assert len(heads) == len(AWKWARD)
    assert all(path.resolve().parent.parent == inside for path in heads)
    for name in AWKWARD:
        assert lake.head("t", name, scope=name) == artifact
    assert {entry["partition"] for entry in lake.heads("t")} == set(AWKWARD)


# -- the views ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["plain", "it's [a] lake *"])
def test_views_show_what_pyarrow_reads(tmp_path, folder):
    lake = Lake(root=str(tmp_path / folder))
    parts = {"it's": some_table(5, seed=1), 'a "b"': some_table(7, seed=2)}
    for number, (partition, table) in enumerate(parts.items()):
        lake.point(lake.publish_table(Recipe("my rows", number, partition=partition), table), partition, "v1")
    # An artefact that no head shows is no part of the view.
    lake.publish_table(Recipe("my rows", 99), some_table(3, seed=3))
    columns = ", ".join(some_table(1).column_names)
    with lake.connect() as connection:
        for partition in parts:
            found = connection.sql(
                f'SELECT {columns} FROM "my rows" WHERE "partition" = ? AND "version" = ? ORDER BY id',
                params=[partition, "v1"],
            )
            assert (
                found.to_arrow_table().to_pylist()
                == pq.read_table(lake.local(lake.head("my rows", partition, "v1"))).sort_by("id").to_pylist()
            )
        assert connection.execute('SELECT count(*) FROM "my rows"').fetchone() == (12,)
        assert connection.execute("SELECT count(*) FROM artifacts").fetchone() == (3,)


def test_lineage_can_be_asked_for_in_sql(lake):
    source = lake.point(publish(lake, "table", Recipe("source", 1, partition="p")), "p", "v", "run 1")
    tensors = publish(lake, "tensors", Recipe("middle", 1, {"k": 2}, {"rows": [source]}, {"pool": source}))
    with lake.connect() as connection:
        edges = connection.execute("SELECT * EXCLUDE fingerprint FROM lineage ORDER BY defines").fetchall()
        heads = connection.execute("SELECT table_name, version, partition, run_id, file FROM heads").fetchall()
        settings = connection.execute(
            "SELECT settings->>'k', file FROM artifacts WHERE table_name = 'middle'"
        ).fetchone()
    reference = ("source", source.fingerprint, source.content_hash)
    assert edges == [("middle", "pool", *reference, False), ("middle", "rows", *reference, True)]
    assert heads == [("source", "v", "p", "run 1", str(lake.local(source).resolve()))]
    assert settings == ("2", str(lake.local(tensors).resolve()))


def test_the_header_is_readable_by_duckdb_alone(lake):
    artifact = publish(lake, "table", Recipe("t", 4, {"rate": 0.5}, partition="it's"))
    (text,) = duckdb.execute(
        "SELECT decode(value) FROM parquet_kv_metadata(?) WHERE decode(key) = 'prism'", [str(lake.local(artifact))]
    ).fetchone()
    assert json.loads(text) == dict(artifact.header)


def test_the_catalogue_is_rebuilt_under_a_reader_and_after_deletion(lake):
    lake.point(publish(lake, "table", Recipe("t", 1)), "a")
    path = lake.rebuild_catalog()
    reader = duckdb.connect(str(path), read_only=True)
    assert reader.execute("SELECT count(*) FROM t").fetchone() == (10,)
    lake.point(publish(lake, "table", Recipe("t", 2), content=1), "b")
    lake.rebuild_catalog()  # neither waits for the reader nor disturbs it
    assert reader.execute("SELECT count(*) FROM t").fetchone() == (10,)
    reader.close()
    with duckdb.connect(str(path), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (20,)
    path.unlink()
    lake.rebuild_catalog()
    with duckdb.connect(str(path), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM heads").fetchone() == (2,)
    assert not files_below(lake.folder / "unpublished")


def test_long_lists_of_settings_stand_in_the_header_and_not_in_the_catalogue(lake):
    settings = {"shards": [f"shard{number}" for number in range(21)], "few": ["a", "b"], "rank": 3}
    artifact = lake.publish_table(Recipe("t", 1, settings), pa.table({"a": [1]}))
    with lake.connect() as connection:
        (found,) = connection.execute("SELECT settings FROM artifacts").fetchone()
    assert json.loads(found) == {"shards": "21 entries", "few": ["a", "b"], "rank": 3}
    assert artifact.header["settings"] == settings


def test_the_catalogue_of_a_small_lake_is_small(lake):
    lake.publish_table(Recipe("t", 1), pa.table({"a": [1]}))
    assert lake.rebuild_catalog().stat().st_size < 200_000  # three blocks of DuckDB's usual size are 800,000


def test_the_catalogue_of_an_empty_lake_has_its_tables(lake):
    with duckdb.connect(str(lake.rebuild_catalog()), read_only=True) as connection:
        for table in ("heads", "artifacts", "lineage"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_the_catalogue_leaves_damaged_files_out(lake):
    lake.point(publish(lake, "table", Recipe("t", 1)), "a")
    damage_by_truncation(lake.local(lake.point(publish(lake, "table", Recipe("t", 2)), "b")))
    with lake.connect() as connection:
        assert connection.execute("SELECT DISTINCT partition FROM t").fetchall() == [("a",)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_of_a_table_is_read_from_its_file_and_nothing_else_has_one(lake, kind):
    artifact = publish(lake, kind, Recipe("things", 1))
    schema = lake.schema(artifact)
    assert (
        schema is None
        if kind != "table"
        else dict(zip(schema.names, schema.types)) == dict(zip(some_table().schema.names, some_table().schema.types))
    )
