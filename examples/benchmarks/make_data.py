"""Writes `reverse.jsonl` beside this file: 200 questions on the demo's skill `reverse`, with four answers each.

A wrong answer is the word unchanged, the right answer with two neighbours swapped, or with its letters shuffled.
No word is one of the demo's (seed 0). Run it from the top of the project: python examples/benchmarks/make_data.py
"""

import json
import tempfile
from pathlib import Path
from random import Random

from prism_assets.corpus.files import read_examples
from prism_assets.demo.data import write_demo_data
from prism_assets.demo.skills import letters

QUESTIONS = 200


def question(word: str, rng: Random) -> dict:
    """A record of the task files: prompt, choices (all of the same letters), position of the right one, answer."""
    right = word[::-1]
    choices = {right, word}
    while len(choices) < 4:
        answer = list(right)
        if len(choices) == 2:
            at = rng.randrange(len(answer) - 1)
            answer[at : at + 2] = answer[at + 1], answer[at]
        else:
            rng.shuffle(answer)
        choices.add("".join(answer))
    shuffled = sorted(choices)
    rng.shuffle(shuffled)
    return {"prompt": f"reverse: {word}=", "choices": shuffled, "gold": shuffled.index(right), "answer": right}


def known_words(folder: Path) -> set[str]:
    """The argument of every prompt in the demo's inbox, targets and held-out records."""
    write_demo_data(folder, seed=0)
    words = set()
    for path in [*(folder / "inbox").iterdir(), *folder.glob("targets/*/*.jsonl")]:
        examples, _ = read_examples(path, "candidate")
        words |= {example.prompt_text.partition(": ")[2].rstrip("=") for example in examples}
    return words


def main() -> None:
    rng = Random(20)
    with tempfile.TemporaryDirectory() as folder:
        used = known_words(Path(folder))
    lines = []
    while len(lines) < QUESTIONS:
        word = letters(rng)
        # Of a palindrome and of a word of few letters there are no four different answers.
        if word not in used and word != word[::-1] and len(set(word)) >= 4:
            used.add(word)
            lines.append(json.dumps(question(word, rng)) + "\n")
    Path(__file__).with_name("reverse.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
