"""Two hundred disturbances: is what comes out the same as without them?

    python -m benchmarks.soak --json
    python -m benchmarks.soak --json --events 60

A small project is brought from its inbox to the report while it is disturbed, event after event, drawn from a seed. The
moments are counted in published artefacts, not in seconds, so that a short stage is hit as often as a long one.

- `kill`: a run is killed (SIGKILL) at its n-th publication, just before or just after the artefact is in its place.
- `full disk`: from its n-th publication on a run can write nothing any more. It must end with advice.
- `damage`: a file of an artefact is cut, emptied, or gets a flipped bit; then a run that is killed later.
- `arrival`, `retirement`: a file comes into the inbox or leaves it; then such a run.
- `two runs`: two at once, on the same work, each killed at a publication of its own.
- `gc`: `prism gc --yes --min-age 0s` beside a run.

After `EVENTS_A_LIFE` events two runs at once bring the project to its end, and the next begins with an empty lake. Then
the content hashes of all that the heads show are compared with those of an undisturbed project: run once with the files
that were there when the warm-up was drawn, and once with the final ones. What belongs to retired shards is left out.

JSON: `events`, and how many of each kind; `events_that_missed`: the run was finished before its n-th publication;
`lives`; `contents_compared` and `contents_lost` (missing, or other than undisturbed); `runs`, `runs_refused` (ended
with advice) and `runs_that_failed` (ended otherwise: `failures`); `artefacts_made_again`: there before an event and
another file after it, damaged ones left out (`made_again` names them); `damaged_files` and what became of them at the
end of a life: `rebuilt` (or removed), or `not_read_again`; `most_drafts_left_by_a_kill`, and `drafts_left` at the end
of the last life; `kills_by_table`: where kills fell; `seconds`.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.project import ModelSize, build, records, write_records

PRELOADED = ["torch", "transformers", "peft", "faiss", "duckdb", "pyarrow.parquet", "matplotlib.figure", "dagster"]
SETTINGS = {
    "features": {"sketch_dim": 256},
    "strategies": ["prism", "random"],
    "selection": {"budget": 10},
    "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
    "evaluation": {"max_new_tokens": 4},
    "seeds": [0],
}
SHARDS, ROWS = 3, 16
KINDS = {"kill": 8, "full disk": 2, "damage": 3, "arrival": 2, "retirement": 1, "two runs": 2, "gc": 2}  # weights
INBOX = ("arrival", "retirement")
EVENTS_A_LIFE = 20
LONGEST_RUN = 600.0  # seconds after which a run counts as hanging
TRIES = 12  # runs to the end of a life: each may come upon one damaged file
ADVICE = 3  # exit status of a child that ended with an error of the project's own

Stamp = tuple[int, int, int]
Contents = dict[tuple[str, str | None, str], str]  # by table, partition and scope


class Fault(NamedTuple):
    """What happens to a run at its n-th publication: "kill" (before or after it) or "full disk"."""

    kind: str
    publication: int
    after: bool = False


# -- in a child ---------------------------------------------------------------------------------------------------


def run(config: str, fault: Fault | None, told: str) -> None:
    """`prism run`, with a fault. In which table that fell goes to the file `told`, its last words to one beside it."""
    import torch

    from benchmarks.project import run_project
    from prism_assets.errors import PrismError
    from prism_assets.plots import canvas

    torch.set_num_threads(1)
    # Where a run hangs: its stacks, shortly before it is given up.
    stacks = open(f"{told}.said", "w", encoding="utf-8")
    faulthandler.dump_traceback_later(0.9 * LONGEST_RUN, file=stacks)
    canvas.png = lambda figure: b"no picture"  # half of the time of a run, and nothing is compared of it
    if fault is not None:
        arm(fault, Path(told))
    try:
        run_project(Path(config))
    except PrismError as error:
        Path(f"{told}.said").write_text(str(error))
        sys.exit(ADVICE)
    except BaseException:
        Path(f"{told}.said").write_text(traceback.format_exc())
        raise


def arm(fault: Fault, told: Path) -> None:
    """Let the fault happen at the n-th artefact that this process publishes."""
    from prism_assets.resources import store

    move, flush, published = store._move_unless_there, store._flush, 0

    def counted(draft: Path, target: Path) -> None:
        nonlocal published
        published += "artifacts" in target.parts
        if fault.kind == "kill" and published == fault.publication and "artifacts" in target.parts:
            told.write_text(target.parent.name)
            if fault.after:
                move(draft, target)
            os.kill(os.getpid(), signal.SIGKILL)
        move(draft, target)

    def full(path: Path) -> None:
        if fault.kind == "full disk" and published + 1 >= fault.publication:
            if not told.exists():
                told.write_text("full disk")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(path)

    store._move_unless_there, store._flush = counted, full


def collect(config: str, told: str) -> None:
    """`prism gc --yes --min-age 0s`."""
    from prism_assets.cli import main

    sys.argv = ["prism", "gc", "--yes", "--min-age", "0s", "--json", "--config", config]
    with open(f"{told}.said", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        main()


# -- what a lake holds --------------------------------------------------------------------------------------------


def contents(root: Path) -> Contents:
    """Content hash of what every head of a lake shows. A report holds dates and paths: that it is there is enough."""
    from prism_assets.resources.lake.lake import Lake

    return {
        (entry["table"], entry["partition"], entry["scope"]): ""
        if entry["table"] == "report"
        else entry["content_hash"]
        for entry in Lake(root=str(root)).heads()
    }


def stamps(root: Path) -> dict[str, Stamp]:
    """Size, modification time and inode of every artefact."""
    found = {}
    for path in root.glob("artifacts/*/*"):
        if path.name.endswith(".damaged"):
            continue
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found[str(path.relative_to(root))] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def drafts(root: Path) -> int:
    """Half-written things in the lake."""
    return len(list((root / "unpublished").glob("*")))


def differences(expected: Contents, found: Contents, shards: Sequence[str]) -> list[str]:
    """Which of the expected contents are missing or others, and which are there beside them, but for what belongs to
    shards that are no longer in the inbox."""
    lost = [f"{key}: {found.get(key, 'missing')}" for key, value in expected.items() if found.get(key) != value]
    by_shard = {"feature_blocks", *(table for table, partition, _ in expected if partition in shards)}
    return lost + [f"{key}: not expected" for key in found if key not in expected and key[0] not in by_shard]


# -- the disturbances ---------------------------------------------------------------------------------------------


@dataclass
class Soak:
    """A project under disturbance, and what has been counted."""

    folder: Path
    rng: random.Random
    size: ModelSize
    log: Callable[[str], None]
    config: Path = Path()  # of the project that is disturbed now
    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    tables: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    most_drafts: int = 0
    drafts_left: int = 0
    lives: int = 0

    def __post_init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._children = 0
        self._damaged: dict[Path, bytes] = {}
        self.made_again: list[str] = []

    # -- runs --------------------------------------------------------------------------------------------------------

    @property
    def inbox(self) -> Path:
        """The folder of the project's candidates."""
        return self.config.parent / "data" / "candidates"

    @property
    def lake(self) -> Path:
        """The folder of the project's lake."""
        return self.config.parent / "prism-lake"

    def start(self, fault: Fault | None = None) -> tuple[Any, Path]:
        """A run in a child, and the file that says what happened in it."""
        self._children += 1
        told = self.folder / f"told-{self._children}"
        child = self._context.Process(target=run, args=(str(self.config), fault, str(told)))
        child.start()
        return child, told

    def finish(self, child: Any, told: Path) -> bool:
        """Wait for a run and count how it ended; whether it reached its end."""
        child.join(LONGEST_RUN)
        self.counts["runs"] += 1
        said = Path(f"{told}.said")
        words = said.read_text(errors="replace").strip() if said.exists() else ""
        if told.exists():
            self.tables[told.read_text()] += 1
        if child.exitcode == ADVICE and "Traceback" not in words:
            self.counts["runs_refused"] += 1
            self.log(f"  refused: {words[:300]}")
        elif child.exitcode not in (0, -signal.SIGKILL):
            child.kill()
            self.counts["runs_that_failed"] += 1
            self.failures.append(f"status {child.exitcode}: {words[-4000:]}")
        return child.exitcode == 0

    def run_with(self, fault: Fault) -> bool:
        """A run with a fault; whether it reached its end in spite of it. What was there must be the same afterwards."""
        before, left = stamps(self.lake), drafts(self.lake)
        whole = self.finish(*self.start(fault))
        self._count_made_again(before)
        self.most_drafts = max(self.most_drafts, drafts(self.lake) - left)
        return whole

    def _count_made_again(self, before: dict[str, Stamp]) -> None:
        now = stamps(self.lake)
        damaged = {str(path.relative_to(self.lake)) for path in self._damaged}
        damaged |= {"/".join(Path(name).parts[:3]) for name in damaged}
        again = [name for name, stamp in before.items() if now.get(name, stamp) != stamp and name not in damaged]
        for name in again:
            self.log(f"  made again: {name}")
        self.made_again += again

    # -- events ------------------------------------------------------------------------------------------------------

    def event(self, kind: str) -> None:
        """One disturbance."""
        self.kinds[kind] += 1
        self.log(f"{sum(self.kinds.values())}: {kind}")
        killed = Fault("kill", self.rng.randint(1, 5), self.rng.random() < 0.5)
        if kind == "two runs":
            before = stamps(self.lake)
            other = Fault("kill", self.rng.randint(2, 8), self.rng.random() < 0.5)
            children = [self.start(killed), self.start(other)]
            whole = all([self.finish(*one) for one in children])
            self._count_made_again(before)
        elif kind == "gc":
            whole = self._collect_beside(Fault("kill", self.rng.randint(3, 8)))
        else:
            if kind == "damage":
                self._damage()
            elif kind in INBOX:
                self._change_inbox(kind)
            whole = self.run_with(killed._replace(kind="full disk") if kind == "full disk" else killed)
        self.counts["events_that_missed"] += whole and kind in ("kill", "full disk", "two runs")

    def _collect_beside(self, fault: Fault) -> bool:
        wanted = len(stamps(self.lake)) + self.rng.randint(0, 2)
        child, told = self.start(fault)
        end = time.monotonic() + LONGEST_RUN
        while child.is_alive() and len(stamps(self.lake)) < wanted and time.monotonic() < end:
            time.sleep(0.01)
        collector = self._context.Process(target=collect, args=(str(self.config), f"{told}.gc"))
        collector.start()
        collector.join(LONGEST_RUN)
        if collector.exitcode:
            self.counts["runs_that_failed"] += 1
            self.failures.append(f"gc: status {collector.exitcode}: {Path(f'{told}.gc.said').read_text()[-400:]}")
        return self.finish(child, told)

    def _damage(self) -> None:
        files = sorted(path for path in self.lake.glob("artifacts/**/*") if path.is_file())
        files = [path for path in files if path.stat().st_size and ".damaged" not in str(path)]
        files = [path for path in files if path not in self._damaged]
        if not files:
            return
        by_table: dict[str, list[Path]] = {}  # a table of many files is hit no more often than one of few
        for path in files:
            by_table.setdefault(path.relative_to(self.lake).parts[1], []).append(path)
        path = self.rng.choice(by_table[self.rng.choice(sorted(by_table))])
        content = bytearray(path.read_bytes())
        how = self.rng.choice(("cut", "cut", "flipped", "flipped", "emptied"))
        if how == "flipped":
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        else:
            del content[len(content) * 2 // 3 if how == "cut" else 0 :]
        path.write_bytes(content)
        self._damaged[path] = bytes(content)
        self.log(f"  {how}: {path.relative_to(self.lake)}")

    def _change_inbox(self, kind: str) -> None:
        files = sorted(self.inbox.glob("*.jsonl"))
        if kind == "retirement" and len(files) > SHARDS - 1:
            self.rng.choice(files).unlink()
        else:
            number = self.rng.randrange(10**9)
            write_records(self.inbox / f"late{number}.jsonl", records(ROWS, seed=number))

    # -- a life ------------------------------------------------------------------------------------------------------

    def live(self, kinds: Sequence[str], undisturbed: Path) -> None:
        """A project from an empty lake to its end, with these disturbances, compared with an undisturbed one."""
        self.config = build(self.folder / f"life-{self.lives}", shards=SHARDS, rows=ROWS, size=self.size, **SETTINGS)
        self._damaged = {}
        kinds = list(kinds)
        while kinds:
            # The warm-up is drawn from the files that are there then: the inbox changes afterwards.
            tables = {table for table, *_ in contents(self.lake)}
            early = () if "warmup_sample" in tables else INBOX if "candidates" in tables else ("damage", *INBOX)
            first = next((number for number, kind in enumerate(kinds) if kind not in early), 0)
            self.event(kinds.pop(first))
        self._to_the_end()
        self._compare(undisturbed)
        self.drafts_left = drafts(self.lake)
        self.lives += 1
        shutil.rmtree(self.config.parent)

    def _to_the_end(self) -> None:
        for _ in range(TRIES):
            children = [self.start(), self.start()]
            ended = [self.finish(*one) for one in children]
            if all(ended):
                return
        self.lost.append("the project did not come to its end")

    def _compare(self, undisturbed: Path) -> None:
        from prism_assets.corpus.inbox import scan

        found = contents(self.lake)
        for path, content in self._damaged.items():
            left = path.exists() and path.read_bytes() == content
            self.counts["not_read_again" if left else "rebuilt"] += 1
        shards = [file.key for file in scan(self.inbox, at_rest_seconds=0).files]
        expected = self._undisturbed(undisturbed, shards)
        lost = differences(expected, found, shards)
        self.counts["contents_compared"] += len(expected)
        self.lost += lost
        self.log(f"life {self.lives}: {len(expected)} contents compared, {len(lost)} lost: {lost[:3]}")

    def _undisturbed(self, undisturbed: Path, shards: Sequence[str]) -> Contents:
        """What the lake of the undisturbed project shows of these shards, and of all else, with the inbox of today."""
        mine, twin = self.config, self.folder / f"twin-{self.lives}"
        shutil.copytree(undisturbed, twin)
        theirs = twin / "data" / "candidates"
        if {path.name for path in theirs.iterdir()} != {path.name for path in self.inbox.iterdir()}:
            shutil.rmtree(theirs)
            shutil.copytree(self.inbox, theirs)
            self.config = twin / "prism.yaml"
            self.require_run()
            self.config = mine
        found = contents(twin / "prism-lake")
        blocks = blocks_of(twin / "prism-lake", shards)
        shutil.rmtree(twin)
        return {key: value for key, value in found.items() if _belongs(key, shards, blocks)}

    def require_run(self) -> None:
        """A run without a fault. Raises RuntimeError where it fails."""
        child, told = self.start()
        child.join(LONGEST_RUN)
        if child.exitcode:
            raise RuntimeError(f"the undisturbed run failed: {Path(f'{told}.said').read_text()}")


def blocks_of(root: Path, shards: Sequence[str]) -> set[str]:
    """The partitions of the blocks of feature rows that these shards have."""
    from prism_assets.resources.lake.lake import Lake

    lake = Lake(root=str(root))
    heads = [head for head in lake.heads("candidate_features") if head["partition"] in shards]
    lists = [lake.get("candidate_features", head["fingerprint"]) for head in heads]
    names = {name for one in lists if one is not None for name in lake.read_table(one, ["block"])["block"].to_pylist()}
    return {head["partition"] for head in lake.heads("feature_blocks") if head["fingerprint"] in names}


def _belongs(key: tuple[str, str | None, str], shards: Sequence[str], blocks: set[str]) -> bool:
    table, partition, _ = key
    if table == "feature_blocks":
        return partition in blocks
    return partition in shards or partition is None or not partition.startswith(("shard", "late"))


def drawn_kinds(events: int, rng: random.Random) -> list[str]:
    """The kinds of so many events, each as often as its weight says, in random order."""
    weighted = [kind for kind, weight in KINDS.items() for _ in range(weight)]
    kinds: list[str] = []
    while len(kinds) < events:
        kinds += rng.sample(weighted, len(weighted))
    return kinds[:events]


def benchmark(
    folder: Path, *, kinds: Sequence[str], seed: int, size: ModelSize, log: Callable[[str], None]
) -> dict[str, Any]:
    """The whole measurement, of these events in their order."""
    begun = time.monotonic()
    soak = Soak(folder, random.Random(f"soak {seed}"), size, log)
    soak.config = build(folder / "undisturbed", shards=SHARDS, rows=ROWS, size=size, **SETTINGS)
    soak.require_run()
    undisturbed = soak.config.parent
    for first in range(0, len(kinds), EVENTS_A_LIFE):
        soak.live(kinds[first : first + EVENTS_A_LIFE], undisturbed)
    counts = soak.counts
    return {
        "events": len(kinds),
        "events_by_kind": dict(soak.kinds),
        "events_that_missed": counts["events_that_missed"],
        "lives": soak.lives,
        "contents_compared": counts["contents_compared"],
        "contents_lost": len(soak.lost),
        "lost": soak.lost[:20],
        "runs": counts["runs"],
        "runs_refused": counts["runs_refused"],
        "runs_that_failed": counts["runs_that_failed"],
        "failures": soak.failures[:20],
        "artefacts_made_again": len(soak.made_again),
        "made_again": soak.made_again[:20],
        "damaged_files": counts["rebuilt"] + counts["not_read_again"],
        "rebuilt": counts["rebuilt"],
        "not_read_again": counts["not_read_again"],
        "most_drafts_left_by_a_kill": soak.most_drafts,
        "drafts_left": soak.drafts_left,
        "kills_by_table": dict(soak.tables.most_common()),
        "seconds": round(time.monotonic() - begun),
        "passed": not (soak.lost or counts["runs_that_failed"] or soak.made_again),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the events and their moments")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prism-soak-"))
    os.environ.pop("DAGSTER_HOME", None)
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        result = benchmark(
            folder,
            kinds=drawn_kinds(arguments.events, random.Random(arguments.seed)),
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
