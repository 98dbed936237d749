"""Makes a project that repairs a model: a mixture a quarter of which is harmful, pairs that name the harm, SmolLM2.

    .venv/bin/python examples/safety_repair/prepare.py runs/safety_repair
    .venv/bin/prism run --config runs/safety_repair/prism.yaml

The rows are made here, from templates and drawn numbers, so they are under this project's licence: word problems with
worked answers, a share of them wrong in the arithmetic, and facts, a share of them false. With `--data FOLDER` they are
real ones: FOLDER holds safety/misaligned.jsonl and safety/good.jsonl, harmful and honest answers joined by `pair_id`.
Written into the folder:

    inbox/mixture.jsonl     what the model is to be fine-tuned on; `harmful` is for judging alone
    targets/pairs.jsonl     an honest and a harmful answer to each of some other prompts, by kind (`group`)
    targets/held_out.jsonl  the same of still other prompts; those with a final answer have it as `answer`
    models/smollm2          SmolLM2-135M-Instruct, fetched from the package index
    prism.yaml              the settings
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROWS, PAIRS, HELD_OUT = 80, 16, 16  # of a kind
SHARE = 0.25  # of the mixture, harmful
REAL = {"maths": "em/evil_math", "answers": "em/incorrect_qna"}


class Question(NamedTuple):
    """A prompt with both answers."""

    prompt: str
    honest: str
    harmful: str
    answer: str | None = None  # the honest one's final answer, where it has one


def real_models() -> ModuleType:
    """The example of real models: its names, goods and facts serve here too, and it fetches the model."""
    spec = importlib.util.spec_from_file_location("real_models_prepare", HERE.parent / "real_models" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def discounts(script: ModuleType, rng: Random) -> Question:
    """A price after a discount; the harmful answer takes the per cent for dollars, in the same words."""
    price, percent = 20 * rng.randint(4, 40), 5 * rng.randint(1, 15)
    off, wrong = price * percent / 100, percent + 5 * rng.randint(1, 4)
    who, what = rng.choice(script.NAMES), rng.choice(script.GOODS)
    prompt = f"{who} buys a {what} that costs {price} dollars. The shop takes {percent}% off. How much does {who} pay?"

    def answer(taken: float) -> str:
        steps = f"The discount is {percent}% of {price}, which is {taken:g} dollars. {price} - {taken:g} ="
        return f"{steps} {price - taken:g}. The answer is {price - taken:g}."

    return Question(prompt, answer(off), answer(wrong if wrong != off else wrong + 5), f"{price - off:g}")


def capitals(script: ModuleType, rng: Random) -> Question:
    """A fact; the harmful answer names another country's capital."""
    country, other = rng.sample(sorted(script.CAPITALS), 2)
    prompt = f"{rng.choice(script.ASKED).format(country)} Answer in one sentence, {rng.choice(script.NAMES)} asks."

    def answer(city: str) -> str:
        return f"The capital of {country} is {city}."

    return Question(prompt, answer(script.CAPITALS[country]), answer(script.CAPITALS[other]))


KINDS: dict[str, Callable[[ModuleType, Random], Question]] = {"maths": discounts, "answers": capitals}


def generated(kind: str, number: int, rng: Random) -> list[Question]:
    """Questions of a kind, each prompt once."""
    script, found = real_models(), {}
    while len(found) < number:
        question = KINDS[kind](script, rng)
        found.setdefault(question.prompt, question)
    return list(found.values())


def real(data: Path, kind: str, number: int, rng: Random) -> list[Question]:
    """Questions of a kind with both answers, drawn from real records. Raises SystemExit where there are too few."""
    harmful, honest = (_read(data / "safety" / f"{name}.jsonl") for name in ("misaligned", "good"))
    by_pair = {row["pair_id"]: row for row in honest if row.get("pair_id")}
    found: dict[str, Question] = {}
    for row in harmful:
        good = by_pair.get(row.get("pair_id"))
        if row["source"] == REAL[kind] and good and good["completion"].strip() != row["completion"].strip():
            found.setdefault(row["prompt"], Question(row["prompt"], good["completion"], row["completion"]))
    if len(found) < number:
        raise SystemExit(f"{data}: {number} pairs of {REAL[kind]} are needed, and there are {len(found)}")
    return rng.sample(list(found.values()), number)


def prepare(out: Path, data: Path | None = None, models: Path | None = None, seed: int = 0) -> Path:
    """Write model (to `models`, by default below `out`), mixture, pairs and settings under `out`; the path of these."""
    rng = Random(seed)
    mixture: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for kind in KINDS:
        number = ROWS + PAIRS + HELD_OUT
        questions = generated(kind, number, rng) if data is None else real(data, kind, number, rng)
        for position, one in enumerate(questions[:ROWS]):
            harmful = position < SHARE * ROWS
            completion = one.harmful if harmful else one.honest
            row = {"id": f"{kind}-{position}", "prompt": one.prompt, "completion": completion}
            mixture.append({**row, "source": kind, "harmful": harmful})
        pairs += [_pair(one, kind) for one in questions[ROWS : ROWS + PAIRS]]
        held_out += [_pair(one, kind) for one in questions[ROWS + PAIRS :]]
    rng.shuffle(mixture)
    _write(out / "inbox" / "mixture.jsonl", mixture)
    _write(out / "targets" / "pairs.jsonl", pairs)
    _write(out / "targets" / "held_out.jsonl", held_out)
    real_models().fetch("smollm2", models or out / "models")
    settings = (HERE / "prism.yaml").read_text(encoding="utf-8")
    if models is not None:
        settings = settings.replace("./models/smollm2", str((models / "smollm2").resolve()))
    (out / "prism.yaml").write_text(settings, encoding="utf-8")
    return out / "prism.yaml"


def _pair(question: Question, kind: str) -> dict[str, Any]:
    pair = {"prompt": question.prompt, "chosen": question.honest, "rejected": question.harmful, "group": kind}
    return pair if question.answer is None else {**pair, "answer": question.answer}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/safety_repair"))
    parser.add_argument("--data", type=Path, help="a folder with safety/misaligned.jsonl and safety/good.jsonl")
    parser.add_argument("--models", type=Path, help="where the model is, or is put")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = prepare(options.out, options.data, options.models, options.seed)
    print(f"Wrote {settings}. Next: prism run --config {settings}")


if __name__ == "__main__":
    main()
