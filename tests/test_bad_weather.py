"""Kills, races, damaged files and a full disk: the next run finishes with the same content and redoes next to nothing.

`pass_over` calls the functions of the assets in their order with a stand-in for Dagster's context, in this process, so
that a kill can be put at every point where something is published. The tests of whole processes use `prism run`'s own
function in children of a fork server, which imports the libraries once.
"""

import errno
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest

from conftest import Project, make_rows
from prism_assets.errors import LakeError, PipelineError
from prism_assets.ops.pipeline import steps_of
from prism_assets.resources import store as store_module
from prism_assets.resources.lake.lake import Lake
from prism_assets.work import engine_of

HEAVY = [
    "torch",
    "peft",
    "faiss",
    "duckdb",
    "pyarrow.parquet",
    "prism_assets.sft.trainer",
    "prism_assets.plots.training",
]
SMALL = {"strategies": ["prism", "random"], "seeds": [0]}


pytestmark = pytest.mark.usefixtures("blank_plots")


@pytest.fixture(scope="module")
def undisturbed(make_project, tmp_path_factory) -> Project:
    """A finished project. Read only."""
    project = make_project(tmp_path_factory.mktemp("undisturbed") / "project", **SMALL)
    project.run()
    return project


@pytest.fixture
def fresh(make_project, tmp_path) -> Project:
    """The same project before its first run."""
    return make_project(tmp_path / "project", **SMALL)


def contents(lake: Lake) -> dict[tuple[str, str | None, str], str]:
    """Content hash of what every head shows. The report holds paths and dates: that it is there is enough."""
    return {
        (entry["table"], entry["partition"], entry["scope"]): ""
        if entry["table"] == "report"
        else entry["content_hash"]
        for entry in lake.heads()
    }


def shard_keys(project: Project) -> list[str]:
    from prism_assets.corpus.inbox import scan

    return [file.key for file in scan(project.inbox, at_rest_seconds=0).files]


def pass_over(
    project: Project,
    resources: dict,
    only: tuple[str, ...] = (),
    shards: list[str] | None = None,
    begun: list[str] | None = None,
) -> None:
    """Every asset in the order of `prism run` (or those named), for all its partitions, without Dagster.

    begun: gets the name of each asset that is begun; the pass begins at the last one in it.
    """
    begun = [] if begun is None else begun
    since = begun[-1] if begun else None
    keys = shards if shards is not None else shard_keys(project)
    settings = project.settings
    partitions = {
        None: None,
        "shard": keys,
        "target": list(settings.targets),
        "target_strategy": [f"{strategy}|{target}" for strategy in settings.strategies for target in settings.targets],
    }
    assets = {asset.key.path[-1]: asset for asset in project.definitions.assets}
    for step in steps_of("run"):
        for name in step.assets:
            if (only and name not in only) or since not in (None, name):
                continue
            since = None
            begun.append(name)
            assets[name].op.compute_fn.decorated_fn(
                SimpleNamespace(
                    run_id="no dagster",
                    run=SimpleNamespace(tags={}),
                    resources=SimpleNamespace(**{name: engine_of(one) for name, one in resources.items()}),
                    asset_key=dg.AssetKey(name),
                    partition_keys=partitions[step.partitions],
                    has_partition_key=bool(step.partitions),
                    has_partition_key_range=bool(step.partitions),
                    instance=SimpleNamespace(get_dynamic_partitions=lambda _: keys),
                    log=logging.getLogger("dagster"),
                    add_asset_metadata=lambda *_, **__: None,
                    log_event=lambda _: None,
                )
            )


# -- kills -------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing in the pipeline catches it."""


@contextmanager
def killed_before_the_second_new_file(started: Counter) -> Iterator[None]:
    """Everything that is moved to a place where nothing is yet is counted; the process "dies" before the second.

    As after a SIGKILL, no one tidies up: drafts stay where they are. `started` counts what was written, by its place.
    """
    moved: set[str] = set()
    dead = False
    replace, link, remove = os.replace, os.link, store_module._remove

    def watched(move):
        def one(source, target):
            nonlocal dead
            place = Path(target)
            counts = "unpublished" not in place.parts and place.parent.name != "cache"  # caches of files' hashes
            if counts and not place.exists():
                started[str(target)] += 1
                if moved:
                    dead = True
                    raise Killed(str(target))
                moved.add(str(target))
            move(source, target)

        return one

    def left_there(path):
        if not dead:
            remove(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watched(replace))
        patch.setattr(os, "link", watched(link))
        patch.setattr(store_module, "_remove", left_there)
        yield


def test_killed_before_every_publish_the_next_run_goes_on(fresh, undisturbed):
    """Each attempt publishes one new file or head and dies before the next; the whole graph is made step by step.

    An attempt begins at the asset that the one before died in: that what is finished is found is seen at the end."""
    resources = fresh.definitions.resources
    started: Counter = Counter()
    deaths: list[str] = []
    begun: list[str] = []
    for _ in range(200):
        try:
            with killed_before_the_second_new_file(started):
                pass_over(fresh, resources, begun=begun)
            break
        except Killed as death:
            deaths.append(str(death))
    else:
        pytest.fail(f"not finished after 200 kills: {deaths[-3:]}")
    made = dict(started)
    with killed_before_the_second_new_file(started):
        pass_over(fresh, resources)
    assert dict(started) == made
    assert contents(fresh.lake) == contents(undisturbed.lake)
    tables = {Path(place).parent.name for place in deaths}
    assert {"candidates", "feature_blocks", "index_segments", "target_directions", "selection", "adapters"} <= tables
    # What the kill cost: the one thing in progress was begun once more, nothing else was ever made again.
    assert not [place for place, times in Counter(deaths).items() if times > 1]
    assert len(deaths) > 40
    assert {place for place, times in started.items() if times == 2} == set(deaths)
    assert max(started.values()) == 2
    drafts = list((fresh.lake.folder / "unpublished").iterdir())
    assert drafts  # they were left behind, and harmed nothing


def run_in_child(folder: str, ready=None, plots: bool = False) -> None:
    """`prism run` in a process of its own, on the project's own Dagster instance."""
    import torch

    from prism_assets.definitions import build_definitions
    from prism_assets.ops.home import instance_of
    from prism_assets.ops.pipeline import run_pipeline
    from prism_assets.plots import canvas
    from prism_assets.project import Project as Named
    from prism_assets.settings import load_settings

    torch.set_num_threads(1)
    if not plots:
        canvas.png = lambda figure: b"no picture"
    config = Path(folder) / "prism.yaml"
    os.environ["PRISM_CONFIG"] = str(config)
    settings = load_settings(config)
    definitions = build_definitions(settings)
    if ready is not None:
        ready.wait(60)
    with instance_of(settings) as instance:
        run_pipeline(Named.of(settings), definitions, instance)


@pytest.fixture(scope="module")
def processes():
    """Children that start with the libraries imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DAGSTER_HOME", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield context


def published(lake: Lake) -> int:
    return sum(1 for path in (lake.folder / "artifacts").glob("*/*"))


def test_three_sigkills_end_to_end(fresh, undisturbed, processes):
    lake = fresh.lake
    times: dict[str, tuple[int, int]] = {}
    for wanted in (3, 12, 22):  # kill when so many artefacts are there: in the corpus, the features, the selections
        child = processes.Process(target=run_in_child, args=(str(fresh.folder),))
        child.start()
        deadline = time.monotonic() + 100
        while published(lake) < wanted and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        now = {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in lake.folder.glob("artifacts/*/*")}
        assert len(now) >= wanted
        assert {path: now.get(path) for path in times} == times  # nothing was made again
        times = now
    child = processes.Process(target=run_in_child, args=(str(fresh.folder),))
    child.start()
    child.join(100)
    assert child.exitcode == 0
    now = {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in lake.folder.glob("artifacts/*/*")}
    assert {path: now[path] for path in times} == times
    assert contents(lake) == contents(undisturbed.lake)


def test_ctrl_c_to_the_whole_process_group_leaves_one_message(fresh):
    """As a terminal sends it: every process that the run started gets it too."""
    environment = {name: value for name, value in os.environ.items() if name not in ("DAGSTER_HOME", "PRISM_CONFIG")}
    command = [sys.executable, "-c", "from prism_assets.cli import main; main()", "run", "--config", str(fresh.config)]
    process = subprocess.Popen(
        command,
        env={**environment, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell that started the tests in the background made SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first = next(line for line in process.stdout if "✓" in line)  # after what the run will take
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=100)
    assert "Base model" in first
    assert process.returncode == 1
    assert rest.splitlines()[-1] == "Interrupted. What was finished is kept; run again to go on."
    assert all(line.startswith("✓") for line in rest.splitlines()[:-1]), rest


# -- races -------------------------------------------------------------------------------------------------------


def test_two_whole_runs_at_once_corrupt_nothing(fresh, undisturbed, processes):
    """Both work on every shard, target and strategy, in one lake and one Dagster instance."""
    from prism_assets.ops.home import instance_of

    with instance_of(fresh.settings):
        pass  # the instance's databases are made once, before both need them
    ready = processes.Barrier(2)
    children = [processes.Process(target=run_in_child, args=(str(fresh.folder), ready)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(150)
    assert [child.exitcode for child in children] == [0, 0]
    assert contents(fresh.lake) == contents(undisturbed.lake)
    assert len(list(fresh.lake.artifacts("feature_blocks"))) == 2
    assert not list((fresh.lake.folder / "unpublished").iterdir())
    assert not list(fresh.lake.folder.rglob("*.damaged"))


def features_in_child(folder: str, shards: list[str], ready) -> None:
    """Rows and features of some shards, in a process of its own."""
    import torch

    from prism_assets.definitions import build_definitions
    from prism_assets.settings import load_settings

    torch.set_num_threads(1)
    config = Path(folder) / "prism.yaml"
    os.environ["PRISM_CONFIG"] = str(config)
    settings = load_settings(config)
    project = SimpleNamespace(settings=settings, definitions=build_definitions(settings))
    ready.wait(60)
    pass_over(project, project.definitions.resources, ("candidates", "candidate_features"), shards)


def test_two_runs_on_different_shards_at_once(undisturbed, processes, tmp_path):
    project = undisturbed.copy(tmp_path / "copy")
    lake = project.lake
    before = contents(lake)
    for name in range(2):
        project.add(f"late{name}", make_rows(30, seed=500 + name))
    late = sorted(set(shard_keys(project)) - {partition for _, partition, _ in before})
    ready = processes.Barrier(2)
    children = [processes.Process(target=features_in_child, args=(str(project.folder), [key], ready)) for key in late]
    for child in children:
        child.start()
    for child in children:
        child.join(100)
    assert [child.exitcode for child in children] == [0, 0]
    now = contents(lake)
    assert {key: now[key] for key in before} == before
    alone = undisturbed.copy(tmp_path / "alone")
    for name in range(2):
        alone.add(f"late{name}", make_rows(30, seed=500 + name))
    pass_over(alone, alone.definitions.resources, ("candidates", "candidate_features"))
    assert now == contents(alone.lake)
    assert len(now) - len(before) == 2 * 5  # rows, rejects, other fields, a block and a list of blocks of each


@pytest.mark.parametrize("strategy", ["prism", "random"])
def test_a_selection_in_flight_finishes_against_the_manifest_that_it_started_from(
    undisturbed, tmp_path, monkeypatch, strategy
):
    project = undisturbed.copy(tmp_path / "copy").configure(strategies=[strategy])
    lake, resources = project.lake, project.definitions.resources
    before = lake.require("selection", f"{strategy}|plain")
    pool = before.header["inputs"]["pool"]
    lake.local(before).unlink()
    gone, *stay = shard_keys(project)
    read_table, moved = Lake.read_table, []

    def the_world_moves_on(lake, artifact, columns=None):
        table = read_table(lake, artifact, columns)
        if artifact.table == "live_pool" and not moved:
            moved.append(artifact.fingerprint)
            for entry in lake.heads("candidates"):
                if entry["partition"] == gone:
                    lake.retire("candidates", gone, entry["scope"])
            pass_over(project, resources, ("live_pool",), stay)
        return table

    monkeypatch.setattr(Lake, "read_table", the_world_moves_on)
    pass_over(project, resources, ("selection",))
    now = lake.heads("live_pool")[0]["fingerprint"]
    assert moved == [pool["fingerprint"]] and now != pool["fingerprint"]
    after = lake.require("selection", f"{strategy}|plain")
    assert after.header["inputs"]["pool"] == pool
    assert after.content_hash == before.content_hash
    assert gone in lake.read_table(after, ["shard"])["shard"].to_pylist()


# -- damage ------------------------------------------------------------------------------------------------------

DAMAGED = {
    "candidates": None,
    "rejects": None,
    "candidate_fields": None,
    "feature_blocks": None,
    "index_segments": "segment.faiss",
    "target_directions": None,
    "adapters": "adapter_model.safetensors",
    "warmup_checkpoints": "checkpoint-0.safetensors",
    "selection": None,
}


def test_truncated_files_of_every_kind_are_named_and_rebuilt(undisturbed, tmp_path, caplog):
    project = undisturbed.copy(tmp_path / "copy")
    lake = project.lake
    before = contents(lake)
    shard = shard_keys(project)[0]
    cut_files = []
    for table, inner in DAMAGED.items():
        artifact = next(one for one in lake.artifacts(table) if one.partition in (None, shard, "plain", "prism|plain"))
        path = lake.local(artifact, inner) if inner else lake.local(artifact)
        os.truncate(path, path.stat().st_size * 2 // 3)
        cut_files.append(lake.local(artifact))
    with caplog.at_level(logging.WARNING, logger="dagster"):
        computed = project.run()
    assert contents(lake) == before
    for path in cut_files:
        assert path.exists()
        assert [
            one for one in path.parent.iterdir() if re.fullmatch(re.escape(path.name) + r"\.\w{8}\.damaged", one.name)
        ]
        assert any(str(path) in record.getMessage() and "rebuilt" in record.getMessage() for record in caplog.records)
    assert computed["Candidates"] == 1  # the shard whose rows (or whose rejects) were lost
    assert computed["Candidate features"] == 1 and computed["Index"] == 1
    assert computed["Live pool and warm-up"] == 1  # the checkpoints; manifest and sample were whole
    assert sum(project.run().values()) == 0


def flip_a_bit(path: Path, column: str) -> None:
    """In the last page of a column of a Parquet file; header, footer and size stay as they are."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path)
    group = metadata.row_group(metadata.num_row_groups - 1)
    chunks = [group.column(position) for position in range(group.num_columns)]
    chunk = next(one for one in chunks if one.path_in_schema.split(".")[0] == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(content)


FLIPPED = {
    "candidates": "id",
    "live_pool": "shard",
    "feature_blocks": "vector",
    "target_features": "score",
    "target_weights": "prism",
    "selection": "score",
}


def test_a_flipped_bit_fails_the_run_that_reads_it_by_name_and_the_next_run_rebuilds(undisturbed, tmp_path):
    project = undisturbed.copy(tmp_path / "copy")
    lake = project.lake
    before = contents(lake)
    shard = shard_keys(project)[0]
    damaged = set()
    for table, column in FLIPPED.items():
        artifact = next(one for one in lake.artifacts(table) if one.partition in (None, shard, "plain", "prism|plain"))
        flip_a_bit(lake.local(artifact), column)
        damaged.add(lake.local(artifact))
    # Blocks are read only by what is made from them. (Rows are read once the damaged selection is made again.)
    for segment in lake.artifacts("index_segments"):
        shutil.rmtree(lake.local(segment))
    named: set[Path] = set()
    for _ in range(len(FLIPPED) + 1):
        try:
            project.run()
            break
        except PipelineError as failure:
            found = {path for path in damaged if str(path) in str(failure)}
            assert found - named, failure  # each run comes upon another, and none twice
            assert "damaged" in str(failure) and "prism run" in str(failure)
            named |= found
    else:
        pytest.fail("not finished")
    aside = {Path(str(path).rsplit(".", 2)[0]) for path in lake.folder.glob("artifacts/*/*.damaged")}
    assert aside == named and len(named) == len(damaged)
    assert contents(lake) == before


def test_remembered_scores_that_were_damaged_are_computed_again(undisturbed, tmp_path):
    project = undisturbed.copy(tmp_path / "copy")
    lake = project.lake
    entries = sorted(lake.cache_file("scores").glob("*/*"))
    assert len(entries) == 2 * len(shard_keys(project)) // 2  # one direction is selected with: `prism`
    good = entries[0].read_bytes()
    entries[0].write_bytes(good[:8] + bytes([good[8] ^ 1]) + good[9:])  # as long as before, one bit flipped
    entries[1].write_bytes(entries[1].read_bytes()[:-3])
    before = lake.require("selection", "prism|plain")
    lake.local(before).unlink()
    project.run()
    after = lake.require("selection", "prism|plain")
    assert after.content_hash == before.content_hash
    assert entries[0].read_bytes() == good


# -- a full disk -------------------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL_AT = {
    "candidates": ("pyarrow.parquet.ParquetWriter", "Candidates"),
    "index_segments": ("faiss.write_index", "Index"),
    "target_directions": ("safetensors.torch.save_file", "Target directions"),
}


@pytest.mark.parametrize("table", FULL_AT)
def test_a_full_disk_fails_the_step_clearly_and_leaves_no_half_artefact(undisturbed, tmp_path, monkeypatch, table):
    project = undisturbed.copy(tmp_path / "copy")
    lake = project.lake
    before = contents(lake)
    lost = [lake.local(artifact) for artifact in lake.artifacts(table)]
    for path in lost:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    function, step = FULL_AT[table]
    whole = {path: path.stat().st_mtime_ns for path in lake.folder.glob("artifacts/*/*")}

    def half_written(*arguments, **keywords):
        """A part of the file reaches the disk."""
        for argument in arguments:
            if isinstance(argument, str | Path) and "prism" in str(argument):
                Path(argument).write_bytes(b"half")
        if function == "safetensors.torch.save_file":  # as it says it: an exception of its own, no error number
            raise RuntimeError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")
        if function == "faiss.write_index":
            raise RuntimeError(f"Error: write failed: {os.strerror(errno.ENOSPC)}")
        full()

    with monkeypatch.context() as patch:
        patch.setattr(function, half_written)
        with pytest.raises(PipelineError) as failure:
            project.run()
    message = str(failure.value)
    assert message.startswith(step) and "is full" in message and str(lake.folder) in message and "prism gc" in message
    assert "Traceback" not in message
    now = {path: path.stat().st_mtime_ns for path in lake.folder.glob("artifacts/*/*")}
    assert now == whole
    assert not list((lake.folder / "unpublished").iterdir())
    project.run()
    assert contents(lake) == before


def test_a_disk_that_fills_up_while_scores_are_remembered(undisturbed, tmp_path, monkeypatch):
    lake = undisturbed.copy(tmp_path / "copy").lake
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(LakeError, match="is full"):
        lake.remember("scores/a/b", b"1234")
    assert lake.recall("scores/a/b") is None
    assert not list(lake.cache_file("scores").rglob("*.*")) and not list((lake.folder / "unpublished").iterdir())
    monkeypatch.undo()
    lake.remember("scores/a/b", b"1234")
    assert lake.recall("scores/a/b") == b"1234"
