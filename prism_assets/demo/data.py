"""The demo's data and settings: an inbox of string skills in several formats, targets, held-out examples.

Every target file is heterogeneous: half of its examples are of the skill it is named for, half are noise.
What is held out for it is the skill alone. Nothing held out is a target or a candidate, and no target is a
candidate.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prism_assets.demo.skills import NOISE, SKILLS, SkillExample, draw

MODEL = Path(__file__).parent / "model"
INBOX = "inbox"

TARGET_SKILLS = ("reverse", "sort")
ROWS_PER_SKILL = 180
NOISE_ROWS = 840
TARGETS_PER_SKILL = 16
NOISE_TARGETS = 16
HELD_OUT_ROWS = 150
DUPLICATES = 6


def write_demo_data(folder: Path | str, seed: int = 0) -> None:
    """Writes `inbox/` (four shards) and `targets/<name>/{target,eval}.jsonl` under `folder`.

    The same seed gives the same bytes (for one pyarrow version). The inbox holds 3,000 different candidates,
    and on purpose a few records that are rejected (broken JSON, no completion, an empty one), some that are
    twice in one shard, and some that are in two.
    """
    folder = Path(folder)
    rng = Random(seed)
    used: set[str] = set()

    def fresh(source: str, number: int) -> list[SkillExample]:
        return draw_fresh(source, number, rng, used)

    for name in TARGET_SKILLS:
        place = folder / "targets" / name
        place.mkdir(parents=True, exist_ok=True)
        targets = fresh(name, TARGETS_PER_SKILL) + fresh(NOISE, NOISE_TARGETS)
        rng.shuffle(targets)
        _write_lines(place / "target.jsonl", map(_record, targets))
        held_out = fresh(name, HELD_OUT_ROWS)
        _write_lines(place / "eval.jsonl", ({**_record(row), "answer": row.completion} for row in held_out))

    pool = [row for name in SKILLS for row in fresh(name, ROWS_PER_SKILL)] + fresh(NOISE, NOISE_ROWS)
    rng.shuffle(pool)
    _write_inbox(folder / INBOX, pool)


def draw_fresh(source: str, number: int, rng: Random, used: set[str]) -> list[SkillExample]:
    """`number` examples of a source whose prompts are not yet in `used`; adds them to it."""
    drawn: list[SkillExample] = []
    while len(drawn) < number:
        example = draw(source, rng)
        if example.prompt not in used:
            used.add(example.prompt)
            drawn.append(example)
    return drawn


def demo_settings() -> dict[str, Any]:
    """The content of the demo's `prism.yaml`, whose paths are relative to it: the folder may be moved and copied."""
    targets = {name: Path("targets") / name for name in TARGET_SKILLS}
    return {
        "model": {"name": str(MODEL), "dtype": "float32"},
        "lora": {"rank": 8, "alpha": 16},
        "tokenization": {"max_length": 64, "separator": ""},
        "warmup": {"share": 0.05, "epochs": 4, "learning_rate": 5.0e-4},
        "features": {"optimizer": "adam", "sketch_dim": 4096},
        "candidates": {"inbox": INBOX, "at_rest_seconds": 0},
        "targets": {
            name: {"examples": str(place / "target.jsonl"), "eval": str(place / "eval.jsonl")}
            for name, place in targets.items()
        },
        "preference": {"temperature": 1.0},
        "selection": {"budget": "5%"},
        "training": {"epochs": 10, "steps": 80, "batch_size": 16, "learning_rate": 2.0e-3},
        "evaluation": {"max_new_tokens": 10, "batch_size": HELD_OUT_ROWS},
        "strategies": ["prism", "prism-cover", "uniform", "less", "random"],
        "seeds": [0, 1, 2],
        "storage": {"root": "lake", "report": "report"},
    }


def _write_inbox(inbox: Path, pool: Sequence[SkillExample]) -> None:
    """The pool in four shards of four formats; the first and the last hold duplicates and bad records."""
    inbox.mkdir(parents=True, exist_ok=True)
    first, second, third, fourth = (pool[part::4] for part in range(4))
    in_two_shards = second[:DUPLICATES]

    records = [{"id": f"row-{number}", **_record(row)} for number, row in enumerate(first)]
    records += records[:DUPLICATES]
    rejected = [
        {"prompt": "copy: abcd=", "source": "copy"},
        {"prompt": "last: abcd=", "completion": "", "source": "last"},
    ]
    broken = '{"prompt": "reverse: abcd=", "completion": "dc'
    (inbox / "strings-1.jsonl").write_text(_lines([*records, *rejected]) + broken + "\n", encoding="utf-8")

    # No file name and no time in the header: the same rows give the same bytes.
    with (inbox / "strings-2.jsonl.gz").open("wb") as file:
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as stream:
            stream.write(_lines(map(_conversation, second)).encode("utf-8"))

    columns = {
        "instruction": [row.prompt for row in third],
        "input": [None] * len(third),
        "output": [row.completion for row in third],
        "source": [row.source for row in third],
    }
    schema = pa.schema([(name, pa.string()) for name in columns])
    pq.write_table(pa.table(columns, schema=schema), inbox / "strings-3.parquet")

    with pa.CompressedOutputStream(str(inbox / "strings-4.jsonl.zst"), "zstd") as stream:
        stream.write(_lines(map(_record, [*fourth, *in_two_shards])).encode("utf-8"))


def _record(row: SkillExample) -> dict[str, Any]:
    return {"prompt": row.prompt, "completion": row.completion, "source": row.source}


def _conversation(row: SkillExample) -> dict[str, Any]:
    turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
    return {"messages": turns, "source": row.source}


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text(_lines(records), encoding="utf-8")
