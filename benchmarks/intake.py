"""What reading costs before any token is made: CPU seconds and memory of a file of candidates on its way into the lake.

    python -m benchmarks.intake --json [--rows 1000000]

Generated rows (a prompt of 25 words, a completion of 35, a source and a number as id) are written as JSON Lines, read,
validated, compared with each other and published as the three tables of a shard, in a process of its own. In the
tokenizer's place stands one that gives every row the same 100 tokens, so their columns are written too.

JSON: `rows`, `mib` of the file, `cpu_seconds` (reading and publishing apart, and all), `peak_mib` of the process and
how much of that it had before (`start_mib`).
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

WORDS, TOKENS, SUPERVISED = 5000, 100, 50


def write_rows(path: Path, rows: int) -> None:
    """JSON Lines of random words."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(WORDS)]
    with path.open("w", encoding="utf-8") as out:
        for number in range(rows):
            prompt, completion = (" ".join(rng.choices(words, k=count)) for count in (25, 35))
            record = {"prompt": prompt, "completion": completion, "source": f"s{number % 7}", "id": number}
            out.write(json.dumps(record) + "\n")


class SameTokens:
    """An encoder for which every row has the same tokens."""

    def __init__(self) -> None:
        import numpy as np

        from prism_assets.corpus.encoder import TokenizedExample

        self._tokens = TokenizedExample(np.arange(TOKENS, dtype=np.int32), np.arange(TOKENS) >= TOKENS - SUPERVISED)

    def encode(self, messages: Any) -> Any:
        """The tokens."""
        return self._tokens


class OnlyALake:
    """What reading needs of a stage."""

    def __init__(self, root: Path) -> None:
        from prism_assets.resources.lake import Lake

        self.lake, self.log = Lake(str(root)), logging.getLogger(__name__)

    def progress(self, what: str, total: int | None) -> Any:
        """As of a stage."""
        from prism_assets.progress import progress

        return progress(self.log, what, total)


def measured(folder: Path) -> dict[str, Any]:
    """Read `folder/rows.jsonl` into the lake `folder/lake`."""
    from prism_assets.corpus.files import iter_examples
    from prism_assets.corpus.reading import read_tables
    from prism_assets.corpus.record_file import RecordFile
    from prism_assets.corpus.token_tables import CANDIDATE_SCHEMA
    from prism_assets.resources.lake import Recipe

    stage: Any = OnlyALake(folder / "lake")
    encoder: Any = SameTokens()
    path = folder / "rows.jsonl"
    read = partial(iter_examples, kind="candidate")
    source = RecordFile(path, "", "candidates", "rejects", "rows", CANDIDATE_SCHEMA, read, fields="candidate_fields")
    start_mib, begun = _peak_mib(), time.process_time()
    tables = read_tables(stage, source, encoder)
    reading = time.process_time() - begun
    for name, rows in zip(("candidates", "rejects", "candidate_fields"), tables, strict=True):
        stage.lake.publish(Recipe(name, 1), rows)
    every = time.process_time() - begun
    return {
        "rows": tables.rows.table.num_rows,
        "mib": path.stat().st_size / 2**20,
        "cpu_seconds": {"reading": reading, "publishing": every - reading, "all": every},
        "peak_mib": _peak_mib(),
        "start_mib": start_mib,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON on one line")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="of a file that is there already (the process that measures)")
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(measured(options.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows.jsonl", options.rows)
        command = [sys.executable, "-m", "benchmarks.intake", "--folder", folder]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(json.dumps(found) if options.json else json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
