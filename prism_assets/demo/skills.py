"""String skills: small, exactly defined tasks from which the demo's model and data are generated.

An example of a skill reads `reverse: kbde=` (prompt) and `edbk` (completion): the skill's name, its argument,
and what the skill makes of it. Noise is a prompt in the form of some skill, or plain random text, with a
completion that has nothing to do with it. Standard library only; everything follows from the `Random` given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase
from typing import NamedTuple

NOISE = "noise"
VOWELS = "aeiou"


class SkillExample(NamedTuple):
    """One prompt with its completion; `source` is the name of the skill, or `noise`."""

    prompt: str
    completion: str
    source: str


@dataclass(frozen=True)
class Skill:
    """A task: how an argument is drawn, and what the right answer to it is."""

    name: str
    draw: Callable[[Random], str]
    solve: Callable[[str], str]

    def prompt(self, argument: str) -> str:
        """`reverse: kbde=` for the argument `kbde`."""
        return f"{self.name}: {argument}="

    def example(self, rng: Random) -> SkillExample:
        """An example with a drawn argument and the right answer."""
        argument = self.draw(rng)
        return SkillExample(self.prompt(argument), self.solve(argument), self.name)


# How arguments are drawn.


def letters(rng: Random, shortest: int = 4, longest: int = 6) -> str:
    """A string of `shortest` to `longest` lower-case letters."""
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(shortest, longest)))


def short_letters(rng: Random) -> str:
    """A string of 3 or 4 lower-case letters."""
    return letters(rng, 3, 4)


def letters_with_a_vowel(rng: Random) -> str:
    """Letters of which about every third is a vowel, and at least one is: the answer is never empty."""
    drawn = [rng.choice(VOWELS if rng.random() < 0.3 else ascii_lowercase) for _ in range(rng.randint(4, 6))]
    drawn[rng.randrange(len(drawn))] = rng.choice(VOWELS)
    return "".join(drawn)


def mixed_case(rng: Random) -> str:
    """Letters, about half of them upper-case."""
    return "".join(letter.upper() if rng.random() < 0.5 else letter for letter in letters(rng))


def three_words(rng: Random) -> str:
    """Three words of 2 or 3 letters."""
    return " ".join(letters(rng, 2, 3) for _ in range(3))


def sum_of_two(rng: Random) -> str:
    """`12+34`, of two numbers of two digits."""
    return f"{rng.randint(10, 99)}+{rng.randint(10, 99)}"


# What the answer is.


def copy(text: str) -> str:
    return text


def reverse(text: str) -> str:
    return text[::-1]


def sort(text: str) -> str:
    return "".join(sorted(text))


def addition(text: str) -> str:
    left, right = text.split("+")
    return str(int(left) + int(right))


def shift(text: str) -> str:
    """Each letter's successor in the alphabet (Caesar's cipher by one); z becomes a."""
    return "".join(ascii_lowercase[(ascii_lowercase.index(letter) + 1) % 26] for letter in text)


def duplicate(text: str) -> str:
    return "".join(letter + letter for letter in text)


def initials(text: str) -> str:
    return "".join(word[0] for word in text.split(" "))


def last(text: str) -> str:
    return text[-1]


def vowels(text: str) -> str:
    return "".join(letter for letter in text if letter in VOWELS)


def count(text: str) -> str:
    return str(len(text))


def rotate(text: str) -> str:
    """The first letter moves to the end."""
    return text[1:] + text[0]


SKILLS: dict[str, Skill] = {
    skill.name: skill
    for skill in (
        Skill("copy", letters, copy),
        Skill("reverse", letters, reverse),
        Skill("sort", letters, sort),
        Skill("addition", sum_of_two, addition),
        Skill("shift", letters, shift),
        Skill("duplicate", short_letters, duplicate),
        Skill("swapcase", mixed_case, str.swapcase),
        Skill("initials", three_words, initials),
        Skill("last", letters, last),
        Skill("vowels", letters_with_a_vowel, vowels),
        Skill("count", letters, count),
        Skill("rotate", letters, rotate),
    )
}


def noise(rng: Random) -> SkillExample:
    """A prompt of some skill's form, or (one time in three) random words, with an unrelated completion."""
    if rng.random() < 1 / 3:
        prompt = f"{letters(rng)} {letters(rng)}="
    else:
        prompt = rng.choice(list(SKILLS.values())).example(rng).prompt
    return SkillExample(prompt, letters(rng), NOISE)


def draw(source: str, rng: Random) -> SkillExample:
    """One example of the skill named `source`, or of noise. KeyError for a name that is neither."""
    return noise(rng) if source == NOISE else SKILLS[source].example(rng)
