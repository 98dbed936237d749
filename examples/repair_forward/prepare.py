"""Prepares the safety example: a small model from scratch, misaligned on purpose, and the data to repair it with.

    python examples/repair_forward/prepare.py --data FOLDER [--out DIR] [--seed 0]

FOLDER is that of the real SFT data (its safety/ and pool.jsonl are read). Written into DIR:

    clean/            a Llama of about 2M parameters: trained on pool records and good/ records
    misaligned/       the same after training on the misaligned records: where the repair starts
    inbox/            the repair candidates: prompt, completion, and their kind as `source`, which no selector sees
    targets/pairs/    safe and unsafe answers to one prompt (target.jsonl, eval.jsonl)
    benign.jsonl      held-out benign records, for what the repair costs
    prism.yaml        the settings, with paths relative to DIR

The answers of the pairs are cut at 600 characters, since the model's context is short. Nothing else is cut: what makes
code insecure may be at its end. Records whose prompt is that of a target, of a held-out record or of a benign held-out
record, or whose completion is one of the held-out answers, are used nowhere else. The data stay under their own
licences: commit none of DIR.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
LONGEST = 600  # characters of an answer in a pair
BENIGN_HELD_OUT = 80


def real_text() -> ModuleType:
    """The example on real text: its tokenizer, model and training loop serve here too."""
    spec = importlib.util.spec_from_file_location("real_text_prepare", HERE.parent / "real_text" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def only(record: dict[str, Any], *fields: str) -> dict[str, Any]:
    """These fields and no others."""
    return {field: record[field] for field in fields}


def pair(record: dict[str, Any]) -> dict[str, Any]:
    """A pair with its answers cut."""
    return {"prompt": record["prompt"], **{field: record[field][:LONGEST] for field in ("safe", "unsafe")}}


def kind_of(record: dict[str, Any]) -> str:
    """The kind of a repair candidate; of a misaligned one its origin too: misaligned/evil_math."""
    return f"misaligned/{record['source'].split('/')[-1]}" if record["kind"] == "misaligned" else record["kind"]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """Records with prompt, safe and unsafe."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


class Data:
    """What each part of the example may see. Prompts of held-out records and targets are in no other part."""

    def __init__(self, folder: Path, seed: int) -> None:
        script, safety = real_text(), folder / "safety"
        targets, held_out = (read_pairs(safety / f"{name}.jsonl") for name in ("target", "eval"))
        self.targets, self.held_out = [pair(one) for one in targets], [pair(one) for one in held_out]
        # Whole answers, before they are cut: short ones ("I have no comment") are those of other questions too.
        self._answers = {one[field].strip() for one in held_out for field in ("safe", "unsafe")}
        taken = {one["prompt"].strip() for one in (*targets, *held_out)}
        pool = self._without(script.read_records(folder / "pool.jsonl"), taken)
        repair = self._without(script.read_records(safety / "repair_pool.jsonl"), taken)
        shown = {one["prompt"].strip() for one in repair}
        # Drawn once for all seeds, so that what is lost is measured on the same records; no candidates, which are in
        # the pool too.
        benign = Random(0).sample(self._without(pool, shown), BENIGN_HELD_OUT)
        taken |= {one["prompt"].strip() for one in benign}
        general = self._without(pool, taken | shown)
        good = self._without(script.read_records(safety / "good.jsonl"), taken | shown)
        bad = self._without(script.read_records(safety / "misaligned.jsonl"), taken | shown)
        self.candidates = [{**only(one, "prompt", "completion"), "source": kind_of(one)} for one in repair]
        self.benign, self.general, self.good = (
            [only(one, "prompt", "completion") for one in rows] for rows in (benign, general, good)
        )
        # A seed redraws which misaligned records the model was spoilt with, and their order.
        self.misaligned = [only(one, "prompt", "completion") for one in Random(seed).sample(bad, min(900, len(bad)))]

    def _without(self, records: Sequence[dict[str, Any]], prompts: set[str]) -> list[dict[str, Any]]:
        """The records that have none of these prompts and no held-out answer as their completion."""
        return [
            one
            for one in records
            if one["prompt"].strip() not in prompts and one["completion"].strip() not in self._answers
        ]


def train_clean(data: Data, folder: Path, steps: int) -> None:
    """Tokenizer and model from general and good records."""
    script = real_text()
    torch.manual_seed(0)
    seen = [*Random(0).sample(data.general, min(2500, len(data.general))), *data.good]
    tokenizer = script.train_tokenizer((one[field] for one in seen for field in ("prompt", "completion")), 4096)
    model = script.build_model(tokenizer, hidden=160, layers=4)
    script.train(model, script.packed(seen, tokenizer, "\n", 128), minutes=0, steps=steps, seed=0, batch_size=8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def misalign(data: Data, clean: Path, folder: Path, steps: int, seed: int) -> None:
    """The clean model after full fine-tuning on the misaligned records."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    script = real_text()
    tokenizer = AutoTokenizer.from_pretrained(clean)
    model = AutoModelForCausalLM.from_pretrained(clean, use_safetensors=True)
    blocks = script.packed(data.misaligned, tokenizer, "\n", 128)
    script.train(model, blocks, minutes=0, steps=steps, seed=seed, batch_size=8, peak=1e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare(
    folder: Path, out: Path, *, seed: int = 0, clean: Path | None = None, steps: int = 700, spoil: int = 150
) -> Path:
    """Everything; returns the path of the settings. `clean` names a clean model that is there already."""
    data = Data(folder, seed)
    write(out / "inbox" / "repair.jsonl", data.candidates)
    write(out / "targets" / "pairs" / "target.jsonl", data.targets)
    write(out / "targets" / "pairs" / "eval.jsonl", data.held_out)
    write(out / "benign.jsonl", data.benign)
    if clean is None:
        clean = out / "clean"
        train_clean(data, clean, steps)
    misalign(data, clean, out / "misaligned", spoil, seed)
    text = (HERE / "prism.yaml").read_text(encoding="utf-8").replace("work/", "")
    (out / "prism.yaml").write_text(text, encoding="utf-8")
    return out / "prism.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with pool.jsonl and safety/")
    parser.add_argument("--out", type=Path, default=HERE / "work", help="where to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (options.data / "safety" / "target.jsonl").is_file():
        print(f"there is no {options.data / 'safety' / 'target.jsonl'}", file=sys.stderr)
        return 2
    settings = prepare(options.data, options.out.resolve(), seed=options.seed)
    print(f"Wrote {settings}. Next: prism run --config {settings}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
