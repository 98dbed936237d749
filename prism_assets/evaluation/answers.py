"""Final answers: found in a text, normalised and compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# What a model or a data set announces its final answer with; GSM8K writes "#### 18".
ANSWER_MARKER = re.compile(r"####|\banswer\s+is\b", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?:(?<![^\s(\[{=:])-)?"  # a sign only where a number can begin: not in "5-3", not in "covid-19"
    r"(?:(?<!\d)\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?P<decimals>\.\d+)?"  # 1,000 and the Indian 1,00,000
    r"|(?:(?<![^\s(\[{=:])-)?(?<!\d)\.\d+"  # .5
)
_ARABIC_SEPARATORS = str.maketrans({"\u066b": ".", "\u066c": ",", "\u2212": "-"})


# ---- exact match


def extract_answer(text: str) -> str:
    """The final answer in `text`: what follows the last "####" or "answer is" on its line, or the whole text.

    "####" is GSM8K's marker (Cobbe et al. 2021, arXiv 2110.14168). Where the marker ends its line, the next
    line that is not blank is taken.
    """
    markers = list(ANSWER_MARKER.finditer(text))
    if not markers:
        return text.strip()
    lines = text[markers[-1].end() :].strip().splitlines()
    return lines[0].strip() if lines else ""


def normalize_answer(text: str) -> str:
    """`text` in the form in which answers are compared, in any script.

    After SQuAD's evaluation script (Rajpurkar et al. 2016, arXiv 1606.05250: lower case, no punctuation, no
    article, single spaces), with DROP's care for numbers (Dua et al. 2019, arXiv 1903.00161):

    - Unicode NFKC and case folding; decimal digits of every script become 0 to 9;
    - a number keeps its minus sign and its decimals: "1,000" = "1000", "18." = "18.00" = "18", ".5" = "0.5",
      but "-3" != "3" and "0.18" != "18". The decimal sign is a point; leading zeros stay ("001" != "1");
    - punctuation and symbols (Unicode P and S, so currency and per cent signs too) are removed, and separate
      between two digits: "3:30" != "330";
    - an English article is removed only at the start and before a word of two letters or more: answers like
      "a" (multiple choice) and "b a c" are left whole, unlike in SQuAD's script.

    A text that has nothing but punctuation is compared as it is.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = "".join(_decimal_digit(character) for character in folded.translate(_ARABIC_SEPARATORS))
    # Currency signs go first, so that the sign of "-$3" is next to its number.
    folded = "".join(character for character in folded if unicodedata.category(character) != "Sc")
    pieces, position = [], 0
    for number in _NUMBER.finditer(folded):
        pieces += [_without_punctuation(folded, position, number.start()), _plain_number(number.group())]
        position = number.end()
    pieces.append(_without_punctuation(folded, position, len(folded)))
    words = "".join(pieces).split()
    if len(words) > 1 and words[0] in {"a", "an", "the"} and len(words[1]) > 1:
        words = words[1:]
    return " ".join(words) or " ".join(folded.split())


def _decimal_digit(character: str) -> str:
    digit = unicodedata.decimal(character, None)
    return character if digit is None else str(digit)


def _plain_number(number: str) -> str:
    whole, point, decimals = number.replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    whole = whole + "0" if whole in ("", "-") else whole
    return whole + (point + decimals if decimals else "")


def _without_punctuation(text: str, start: int, end: int) -> str:
    """text[start:end] without punctuation and symbols; a space for one between two digits."""
    kept = []
    for position in range(start, end):
        if unicodedata.category(text[position])[0] not in "PS":
            kept.append(text[position])
        elif text[position - 1 : position].isdigit() and text[position + 1 : position + 2].isdigit():
            kept.append(" ")
    return "".join(kept)


def gives_unwanted_answer(prediction_text: str, unwanted_text: str, answers: Sequence[str]) -> bool | None:
    """Whether the answer in `prediction_text` is the one in `unwanted_text`, both extracted and normalised.

    None where the unwanted text has one of the accepted `answers`: then the answer does not tell the two apart.
    """
    unwanted = normalize_answer(extract_answer(unwanted_text))
    if any(unwanted == normalize_answer(extract_answer(answer)) for answer in answers):
        return None
    return normalize_answer(extract_answer(prediction_text)) == unwanted


def exact_match(prediction_text: str, answers: str | Sequence[str]) -> bool:
    """Whether the answer in `prediction_text` equals one of `answers`, both extracted and normalised.

    Raises ValueError where there is no answer to compare with.
    """
    accepted = [answers] if isinstance(answers, str) else list(answers)
    if not accepted:
        raise ValueError("exact match needs at least one answer")
    prediction = normalize_answer(extract_answer(prediction_text))
    return any(prediction == normalize_answer(extract_answer(answer)) for answer in accepted)
