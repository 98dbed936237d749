"""What new data costs: CPU seconds and bytes of adding 1%, 10% and 100% to a lake of 200 shards.

    python -m benchmarks.incremental --json

A process computes a lake whole, from the files in the inbox to the selections (candidates, live pool, warm-up,
features, index, target directions, selections; fine-tuning, evaluation and report are left out, since what they cost
depends on how many selected rows changed, not on how many arrived); then shards of the usual size are added and another
process runs again. Each run is a process of its own, forked after the imports, so it remembers nothing of the others.
From every figure the CPU time of a run with nothing to do, on the same lake, is subtracted. A share is the cost of an
addition over the cost of the whole lake.

Bytes are those of files that are new or changed below the lake's root, the Dagster instance left out; they are compared
with the artefacts of the new shards alone (candidates, rejects, other fields, feature blocks and their list, index
segment). The catalogue file, which is written anew at the end of every run, is counted on its own and in
`bytes_ratio_with_catalogue`.

Reads are counted at the doors of the lake and of the vector store: a feature block or a segment that was there before
the addition and whose rows are read again would show. `/proc/self/io` tells independently how much was read.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.project import ModelSize, build, records, run_project, write_records

# The artefacts that belong to a shard.
SHARD_TABLES = ("candidates", "rejects", "candidate_fields", "feature_blocks", "candidate_features", "index_segments")
CATALOGUE = "prism.duckdb"


class Measured(NamedTuple):
    """One run of the pipeline up to the selections."""

    cpu_seconds: float
    wall_seconds: float
    written: dict[str, int]  # bytes of new or changed files, by table
    read_bytes: int  # through read(2) and the like
    old_blocks_read: int  # feature blocks of before this run whose rows were read
    old_segments_read: int  # index segments of before this run that were opened for a query
    computed: dict[str, int]  # artefacts made, by step
    cpu_by_step: dict[str, float]


class Reads:
    """Which stored vectors are read, noted at the doors through which the pipeline reads them."""

    def __init__(self) -> None:
        self.blocks: set[Path] = set()
        self.segments: set[Path] = set()

    @contextmanager
    def noted(self) -> Iterator["Reads"]:
        from prism_assets.resources.index.store import VectorStore
        from prism_assets.resources.lake.lake import Lake

        read_table, open_segments = Lake.read_table, VectorStore.open

        def note_table(lake: Lake, artifact: Any, columns: Any = None) -> Any:
            if artifact.table == "feature_blocks":
                self.blocks.add(lake.local(artifact))
            return read_table(lake, artifact, columns)

        def note_segments(store: VectorStore, paths: Any) -> Any:
            # a part of a compacted segment names the file that it lies in
            self.segments.update(Path(getattr(one, "path", one)) for one in paths)
            return open_segments(store, paths)

        Lake.read_table, VectorStore.open = note_table, note_segments
        try:
            yield self
        finally:
            Lake.read_table, VectorStore.open = read_table, open_segments


def run_once(config: Path) -> Measured:
    """`run_here` in a child of this process. Raises RuntimeError where it fails; its traceback is on stderr."""
    context = multiprocessing.get_context("fork")
    answers, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(run_here(config)))
    child.start()
    sender.close()
    try:
        return answers.recv()
    except EOFError:
        raise RuntimeError(f"the run on {config} failed") from None
    finally:
        child.join()


def import_everything() -> None:
    """What every run needs, so that no figure contains its import."""
    import dagster  # noqa: F401
    import duckdb  # noqa: F401
    import faiss  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer  # noqa: F401

    torch.set_num_threads(1)  # more would be lost in the fork, and gain nothing on a model this small


def run_here(config: Path) -> Measured:
    """`prism run` up to the selections, measured."""
    from prism_assets.ops import pipeline
    from prism_assets.settings import load_settings

    settings = load_settings(config)
    root = settings.storage.root
    before = files_below(root)
    steps = pipeline.steps_of("select")
    reads = Reads()
    clock: list[float] = []
    read, cpu, wall = read_so_far(), time.process_time(), time.monotonic()
    listener = pipeline.Listener(
        on_step=lambda _: clock.append(-time.process_time()), on_result=lambda _: clock.append(time.process_time())
    )
    with reads.noted():
        results = run_project(config, steps, listener)
    cpu, wall, read = time.process_time() - cpu, time.monotonic() - wall, read_so_far() - read
    written: Counter[str] = Counter()
    for path, state in files_below(root).items():
        if before.get(path) != state:
            written[table_of(path)] += state[0]
    old = {root / path for path in before}
    return Measured(
        cpu,
        wall,
        dict(sorted(written.items())),
        read,
        len(reads.blocks & old),
        len(reads.segments & old),
        {result.step.title: result.computed for result in results},
        {result.step.title: sum(clock[2 * i : 2 * i + 2]) for i, result in enumerate(results)},
    )


def files_below(root: Path) -> dict[Path, tuple[int, int, int]]:
    """Size, modification time and inode of every file of a lake by relative path, the Dagster instance left out."""
    found = {}
    for parent, folders, names in os.walk(root):
        if Path(parent) == root:
            folders[:] = [name for name in folders if name != "dagster"]
        for name in names:
            path = Path(parent, name)
            status = path.stat()
            found[path.relative_to(root)] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def table_of(path: Path) -> str:
    """The table of an artefact; else the folder or file at the top of the lake."""
    return path.parts[1] if path.parts[0] == "artifacts" else path.parts[0]


def read_so_far() -> int:
    """Bytes that this process has read by system calls; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def idle(config: Path, repeats: int) -> Measured:
    """The median run (by CPU time) of several with nothing to do."""
    runs = sorted((run_once(config) for _ in range(repeats)), key=lambda run: run.cpu_seconds)
    return runs[len(runs) // 2]


def benchmark(folder: Path, *, shards: int, rows: int, repeats: int, size: ModelSize, log: Any) -> dict[str, Any]:
    """The whole measurement; `rows` is per shard."""
    import_everything()
    rehearsal = build(folder / "rehearsal", shards=2, rows=40, size=size)
    run_once(rehearsal)  # first calls are paid here
    project = folder / "project"
    config = build(project, shards=shards, rows=rows, size=size)
    whole = run_once(config)
    log(f"whole: {whole.cpu_seconds:.2f} CPU s, {shards} shards of {rows} rows")
    nothing = idle(config, repeats)
    log(f"nothing to do: {nothing.cpu_seconds:.2f} CPU s; made {nothing.computed}")
    whole_cost = whole.cpu_seconds - nothing.cpu_seconds
    result: dict[str, Any] = {
        "shards": shards,
        "rows": shards * rows,
        "model": size._asdict(),
        "whole_cpu_seconds": whole_cost,
        "whole_bytes": sum(whole.written.values()),
        "nothing_to_do_cpu_seconds": nothing.cpu_seconds,
        "nothing_to_do_wall_seconds": nothing.wall_seconds,
        "additions": {},
    }
    present = shards
    for percent, times in ((1, repeats), (10, 1), (100, 1)):
        more = max(1, round(shards * percent / 100))
        runs, costs = [], []
        for _ in range(times):
            for number in range(present, present + more):
                rows_of_shard = records(rows, seed=number)
                write_records(project / "data" / "candidates" / f"shard{number:04d}.jsonl", rows_of_shard)
            present += more
            run = run_once(config)
            after = idle(config, repeats if times == 1 else 1)
            runs.append(run)
            costs.append(run.cpu_seconds - (after.cpu_seconds if times == 1 else nothing.cpu_seconds))
            log(f"+{percent}%: {run.cpu_seconds:.2f} CPU s, of which new {costs[-1]:.2f}; made {run.computed}")
        entry = describe(runs[-1], nothing)
        entry |= {"cpu_seconds": statistics.median(costs), "added_shards": more, "share_of_rows": more / shards}
        entry["old_blocks_read"] = max(run.old_blocks_read for run in runs)
        entry["old_segments_read"] = max(run.old_segments_read for run in runs)
        result["additions"][f"{percent}_percent"] = entry
        result[f"cost_of_{percent}_percent"] = entry["cpu_seconds"] / whole_cost
    for key in ("bytes_ratio", "bytes_ratio_with_catalogue", "old_blocks_read", "old_segments_read"):
        result[key] = max(entry[key] for entry in result["additions"].values())
    return result


def describe(run: Measured, nothing: Measured) -> dict[str, Any]:
    """What an addition wrote and read."""
    own = sum(run.written.get(table, 0) for table in SHARD_TABLES)
    catalogue = run.written.get(CATALOGUE, 0)
    written = sum(run.written.values()) - catalogue
    return {
        "wall_seconds": run.wall_seconds,
        "cpu_by_step_beyond_a_run_with_nothing_to_do": {
            step: seconds - nothing.cpu_by_step.get(step, 0) for step, seconds in run.cpu_by_step.items()
        },
        "bytes_written": written,
        "bytes_of_the_shards_own_artefacts": own,
        "bytes_ratio": written / own,
        "bytes_ratio_with_catalogue": (written + catalogue) / own,
        "bytes_by_table": run.written,
        "catalogue_bytes": catalogue,
        "bytes_read_beyond_a_run_with_nothing_to_do": run.read_bytes - nothing.read_bytes,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--rows", type=int, default=400, help="rows of a shard")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size of the random model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="of the run with nothing to do, and of adding 1%%")
    parser.add_argument("--folder", type=Path, help="where the lake goes and stays; else a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    if arguments.shards < 100:
        parser.error("--shards: 1% of fewer than 100 shards is no shard")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="prism-incremental-"))
    os.environ.pop("DAGSTER_HOME", None)
    try:
        result = benchmark(
            folder,
            shards=arguments.shards,
            rows=arguments.rows,
            repeats=arguments.repeats,
            size=ModelSize(arguments.hidden, arguments.layers),
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    finally:
        if not arguments.folder:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
