"""Makes a project around a real model: SmolLM2-135M-Instruct, 300 candidate rows of five kinds, and one target.

    .venv/bin/python examples/real_models/prepare.py runs/real_models
    .venv/bin/prism run --config runs/real_models/prism.yaml

The rows are made here, from templates and drawn numbers, so they are under this project's licence. The target is
`discounts`: word problems on prices, answered in worked steps. Of the pool, a fifth are problems of that kind and a
fifth are other problems with percentages; the rest is something else. Nothing held out is a candidate or a target.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from fetch import fetch  # noqa: E402  (the file beside this one)

ROWS_PER_KIND = 60
TARGETS, HELD_OUT = 16, 24
GOODS = [
    "coat",
    "kettle",
    "lamp",
    "bicycle",
    "desk",
    "tent",
    "camera",
    "carpet",
    "guitar",
    "blender",
    "backpack",
    "watch",
]
NAMES = ["Ana", "Bilal", "Chen", "Dora", "Emil", "Fatou", "Goran", "Hana", "Ivo", "Julia", "Kofi", "Lena"]
CAPITALS = {
    "Albania": "Tirana", "Bolivia": "Sucre", "Canada": "Ottawa", "Denmark": "Copenhagen", "Estonia": "Tallinn",
    "Finland": "Helsinki", "Ghana": "Accra", "Hungary": "Budapest", "Iceland": "Reykjavik", "Jordan": "Amman",
    "Kenya": "Nairobi", "Latvia": "Riga", "Mongolia": "Ulaanbaatar", "Norway": "Oslo", "Oman": "Muscat", "Peru": "Lima",
    "Qatar": "Doha", "Rwanda": "Kigali", "Senegal": "Dakar", "Tunisia": "Tunis", "Uruguay": "Montevideo",
    "Vietnam": "Hanoi", "Zambia": "Lusaka",
}  # fmt: skip
ASKED = ["What is the capital of {}?", "Name the capital city of {}.", "Which city is the seat of government of {}?"]


def discounts(rng: Random) -> tuple[str, str]:
    """A price after a discount, in worked steps."""
    price, percent = 20 * rng.randint(2, 40), 5 * rng.randint(1, 15)
    off = price * percent / 100
    who, what = rng.choice(NAMES), rng.choice(GOODS)
    question = (
        f"{who} buys a {what} that costs {price} dollars. The shop takes {percent}% off. How much does {who} pay?"
    )
    steps = f"The discount is {percent}% of {price}, which is {off:g} dollars. {price} - {off:g} = {price - off:g}."
    return question, f"{steps} The answer is {price - off:g}."


def shares(rng: Random) -> tuple[str, str]:
    """A part as a percentage of a whole, in worked steps."""
    whole = 20 * rng.randint(2, 30)
    percent = 5 * rng.randint(1, 19)
    part = whole * percent // 100
    who = rng.choice(NAMES)
    question = f"{who} has read {part} of {whole} pages. What percentage of the pages is that?"
    return (
        question,
        f"{part} / {whole} = {part / whole:g}. {part / whole:g} × 100 = {percent}. The answer is {percent}%.",
    )


def capitals(rng: Random) -> tuple[str, str]:
    """A fact."""
    country = rng.choice(list(CAPITALS))
    question = rng.choice(ASKED).format(country)
    return f"{question} ({rng.choice(NAMES)} asks.)", f"The capital of {country} is {CAPITALS[country]}."


def letters(rng: Random) -> tuple[str, str]:
    """A polite letter."""
    sender, reader, what = rng.choice(NAMES), rng.choice(NAMES), rng.choice(GOODS)
    day = rng.choice(["Monday", "Tuesday", "Thursday", "Friday", "Saturday"])
    question = f"Write a short note from {sender} to {reader}, who lent {sender} a {what} until {day}."
    answer = (
        f"Dear {reader}, thank you for lending me your {what}. I will bring it back on {day}. Best wishes, {sender}"
    )
    return question, answer


def sorting(rng: Random) -> tuple[str, str]:
    """Words in alphabetical order."""
    words = rng.sample(GOODS + [name.lower() for name in NAMES], 5)
    return f"Put these words in alphabetical order: {', '.join(words)}.", ", ".join(sorted(words))


KINDS: dict[str, Callable[[Random], tuple[str, str]]] = {
    kind.__name__: kind for kind in (discounts, shares, capitals, letters, sorting)
}


def prepare(out: Path, models: Path | None = None, seed: int = 0) -> None:
    """Write model (to `models`, by default below `out`), inbox, target and settings under `out`."""
    rng, used = Random(seed), set()

    def fresh(kind: str, number: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        while len(rows) < number:
            prompt, completion = KINDS[kind](rng)
            if prompt not in used:
                used.add(prompt)
                rows.append({"prompt": prompt, "completion": completion, "source": kind})
        return rows

    model = fetch("smollm2", models or out / "models")
    held_out = [{**row, "answer": row["completion"]} for row in fresh("discounts", HELD_OUT)]
    _write(out / "targets" / "discounts" / "eval.jsonl", held_out)
    _write(out / "targets" / "discounts" / "target.jsonl", fresh("discounts", TARGETS))
    for kind in KINDS:
        _write(out / "inbox" / f"{kind}.jsonl", fresh(kind, ROWS_PER_KIND))
    settings = (HERE / "prism.yaml").read_text(encoding="utf-8")
    (out / "prism.yaml").write_text(settings, encoding="utf-8")
    print(f"{model}\n{out / 'prism.yaml'}")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    prepare(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/real_models"))
