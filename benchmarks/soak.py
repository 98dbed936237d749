"""Fifty random SIGKILLs: is what comes out the same as without them, and what did they cost?

    python -m benchmarks.soak --json

A small project is run once undisturbed, from the inbox to the report. Then the same project is run again and again from
an empty lake by processes that are killed at random moments, each rerun going on where the last one died, until the
kills are used up. Every time a project is finished its lake is compared with the undisturbed one by the content hashes
of everything that its heads show. What was published before a kill must be the same file afterwards (never computed
again), and a kill may leave at most one draft behind: the one thing that was in progress.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.project import ModelSize, build

PRELOADED = ["torch", "transformers", "peft", "faiss", "duckdb", "pyarrow.parquet", "matplotlib.figure", "dagster"]
SETTINGS = {
    "features": {"sketch_dim": 256},
    "strategies": ["prism", "uniform", "random"],
    "selection": {"budget": 10},
    "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
    "evaluation": {"max_new_tokens": 4},
    "seeds": [0],
}
LONGEST_RUN = 600.0  # seconds after which a run counts as hanging

Stamp = tuple[int, int, int]


def run(config: str) -> None:
    """`prism run`, in a child."""
    import torch

    from benchmarks.project import run_project

    torch.set_num_threads(1)
    run_project(Path(config))


def contents(root: Path) -> dict[str, str]:
    """Content hash of what every head of a lake shows. A report holds dates and paths: that it is there is enough."""
    from prism_assets.resources.lake.lake import Lake

    return {
        f"{entry['table']} {entry['partition']} {entry['scope']}": ""
        if entry["table"] == "report"
        else entry["content_hash"]
        for entry in Lake(root=str(root)).heads()
    }


def stamps(root: Path) -> dict[str, Stamp]:
    """Size, modification time and inode of every artefact."""
    found = {}
    for path in root.glob("artifacts/*/*"):
        status = path.stat()
        found[str(path.relative_to(root))] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def drafts(root: Path) -> int:
    """Half-written things in the lake."""
    return len(list((root / "unpublished").glob("*")))


def benchmark(folder: Path, *, kills: int, seed: int, size: ModelSize, log: Callable[[str], None]) -> dict[str, Any]:
    """The whole measurement."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def start(config: Path) -> Any:
        child = context.Process(target=run, args=(str(config),))
        child.start()
        return child

    def fresh(name: str) -> Path:
        return build(folder / name, shards=3, rows=30, size=size, **SETTINGS)

    config = fresh("undisturbed")
    for _ in range(2):  # the first starts the server, the second tells how long a run takes
        shutil.rmtree(config.parent / "prism-lake", ignore_errors=True)
        began = time.monotonic()
        child = start(config)
        child.join()
        if child.exitcode:
            raise RuntimeError(f"the undisturbed run failed with status {child.exitcode}")
        usual = time.monotonic() - began
    expected = contents(config.parent / "prism-lake")
    rng = random.Random(seed)
    done = finished = unequal = changed = most_drafts = failed = 0
    artefacts_at_kills: list[int] = []
    while done < kills:
        config = fresh(f"killed-{finished}")
        root = config.parent / "prism-lake"
        known: dict[str, Stamp] = {}
        left = 0
        while True:
            child = start(config)
            child.join(rng.uniform(0, usual) if done < kills else LONGEST_RUN)
            alive = child.is_alive()
            if alive:
                os.kill(child.pid, signal.SIGKILL)
                child.join()
            now = stamps(root)
            changed += sum(now.get(name) != stamp for name, stamp in known.items())
            known = now
            if alive and done == kills:
                raise RuntimeError(f"a run on {config} hung for {LONGEST_RUN} s")
            if alive:
                done += 1
                artefacts_at_kills.append(len(now))
                most_drafts = max(most_drafts, drafts(root) - left)
                left = drafts(root)
                log(f"kill {done}: {len(now)} artefacts, {left} drafts")
                continue
            failed += child.exitcode != 0
            break
        finished += 1
        unequal += contents(root) != expected
        shutil.rmtree(config.parent)
    return {
        "kills": done,
        "projects_finished": finished,
        "seconds_of_a_run": usual,
        "runs_that_failed": failed,
        "projects_with_other_content": unequal,
        "artefacts_made_again_after_a_kill": changed,
        "most_drafts_left_by_a_kill": most_drafts,
        "artefacts": len(expected),
        "artefacts_at_kills": artefacts_at_kills,
        "passed": not (failed or unequal or changed or most_drafts > 1),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prism-soak-"))
    os.environ.pop("DAGSTER_HOME", None)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        result = benchmark(
            folder,
            kills=arguments.kills,
            seed=arguments.seed,
            size=ModelSize(hidden=16, layers=1),
            log=lambda line: print(line, file=sys.stderr, flush=True),
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=None if arguments.json else 1))
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
