"""Held-out metrics: mean log-probability, target preference, greedy generation and exact match.

Pure functions on arrays, tokens and strings; higher is better for every metric.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

# What a model or a data set announces its final answer with; GSM8K writes "#### 18".
ANSWER_MARKER = re.compile(r"####|\banswer\s+is\b", re.IGNORECASE)

_NUMBER = re.compile(
    r"(?:(?<![^\s(\[{=:])-)?"  # a sign only where a number can begin: not in "5-3", not in "covid-19"
    r"(?:(?<!\d)\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?P<decimals>\.\d+)?"  # 1,000 and the Indian 1,00,000
    r"|(?:(?<![^\s(\[{=:])-)?(?<!\d)\.\d+"  # .5
)
_ARABIC_SEPARATORS = str.maketrans({"\u066b": ".", "\u066c": ",", "\u2212": "-"})


def held_out(
    mean_log_probs: Sequence[float] | np.ndarray, margins: Sequence[float] | np.ndarray | None = None
) -> dict[str, float]:
    """Mean log-probability and mean target preference (τ = 1) of n held-out examples.

    `mean_log_probs` [n]: s_j, the mean log-probability (nats per token) of each completion; for pairs, of
    the chosen one. `margins` [n], for pairs only: s_chosen − s_rejected.

    Returns `mean_log_prob` = mean_j s_j, and `target_preference` = mean_j exp(s_j) for plain examples or
    mean_j sigmoid(margin_j) for pairs: the preference objective J at temperature 1, on held-out examples.

    Raises ValueError where there is no example, a value is not finite or the lengths differ.
    """
    scores = _finite_vector("mean_log_probs", mean_log_probs)
    if margins is None:
        preferences = np.exp(scores)
    else:
        differences = _finite_vector("margins", margins)
        if differences.shape != scores.shape:
            raise ValueError(
                f"{len(scores)} mean_log_probs but {len(differences)} margins: one of each per pair"
            )
        preferences = np.exp(-np.logaddexp(0.0, -differences))  # sigmoid, without overflow
    return {"mean_log_prob": float(scores.mean()), "target_preference": float(preferences.mean())}


def summarize(values_per_seed: Sequence[float | None]) -> dict[str, float | int | None] | None:
    """`{"mean", "std", "seeds"}` of one metric over seeds; std is the sample's (ddof = 1), null for one seed.

    None where every value is None: the metric does not exist for these data. Raises ValueError where there is
    no seed, only some seeds have a value, or a value is not finite.
    """
    missing = [value is None for value in values_per_seed]
    if missing and all(missing):
        return None
    if any(missing):
        raise ValueError(f"the metric is missing for seed(s) number {np.flatnonzero(missing).tolist()} only")
    values = _finite_vector("values_per_seed", values_per_seed)
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    return {"mean": float(values.mean()), "std": std, "seeds": len(values)}


def score_histogram(
    scores: Sequence[float] | np.ndarray, *, selected: int, bins: int = 60
) -> dict[str, list[float] | list[int] | float | int | None]:
    """Histogram of the influence scores [n] of the pool, with the budget's cut-off.

    `selected` is the number of rows taken from the top; `cutoff` the lowest score taken, None where none is.
    Returns `edges` [bins + 1], `counts` [bins], `cutoff`, `selected`.
    """
    values = _finite_vector("scores", scores)
    if not 0 <= selected <= len(values):
        raise ValueError(f"selected is {selected}, but there are {len(values)} scores")
    counts, edges = np.histogram(values, bins=bins)
    cutoff = float(np.partition(values, -selected)[-selected]) if selected else None
    return {"edges": edges.tolist(), "counts": counts.tolist(), "cutoff": cutoff, "selected": int(selected)}


def _finite_vector(name: str, values: Any) -> np.ndarray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{name} needs a vector of at least one value, got shape {vector.shape}")
    bad = np.flatnonzero(~np.isfinite(vector))
    if len(bad):
        raise ValueError(
            f"{name} is not finite at position(s) {bad[:5].tolist()}, {len(bad)} of {len(vector)}"
        )
    return vector


# ---- generation


def generate(
    model: torch.nn.Module,
    prompts: Sequence[np.ndarray],
    *,
    pad_token_id: int,
    eos_token_id: int | Sequence[int] | None,
    max_new_tokens: int,
    batch_size: int = 16,
    context_length: int | None = None,
) -> list[np.ndarray]:
    """Greedy continuations, int32 [<= max_new_tokens] each, of `prompts`, token ids [T_i] each, in order.

    The end-of-sequence token and what follows it are cut off. Batches are made of prompts of similar length,
    padded on the left and masked, so a row's neighbours change its logits by rounding only. Decoding settings
    that the checkpoint carries (sampling, penalties, suppressed tokens) are put aside for the call.
    `model` is a transformers causal LM, or one with LoRA by PEFT.

    A prompt that leaves no room for `max_new_tokens` within `context_length` (default: the model's
    `max_position_embeddings`) loses its start, as everywhere in this project. Raises ValueError for an empty
    prompt (naming its position) and where `max_new_tokens` leaves no room for any prompt.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"max_new_tokens and batch_size must be positive, got {max_new_tokens} and {batch_size}"
        )
    # PEFT puts LoRA layers into the model itself, so the model inside a PeftModel is the adapted one.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    limit = context_length or getattr(inner.config, "max_position_embeddings", None)
    if limit is not None and limit <= max_new_tokens:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, but the context has {limit} tokens: no room for a prompt"
        )
    rows = [
        np.asarray(prompt, dtype=np.int64)[-(limit - max_new_tokens) if limit else 0 :] for prompt in prompts
    ]
    empty = [position for position, row in enumerate(rows) if not len(row)]
    if empty:
        raise ValueError(f"prompt(s) number {empty[:5]} have no tokens: nothing to continue")

    stops = [] if eos_token_id is None else np.atleast_1d(eos_token_id).tolist()
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        eos_token_id=stops or None,
        use_cache=True,
    )
    order = sorted(range(len(rows)), key=lambda position: (len(rows[position]), position))
    results: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * len(rows)
    with _plain_decoding(inner, config), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            positions = order[start : start + batch_size]
            ids, mask = _left_padded([rows[position] for position in positions], pad_token_id, inner.device)
            output = inner.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            for position, tokens in zip(positions, output[:, ids.shape[1] :].cpu().numpy(), strict=True):
                ends = np.flatnonzero(np.isin(tokens, stops))
                results[position] = tokens[: ends[0] if len(ends) else len(tokens)].astype(np.int32)
    return results


@contextmanager
def _plain_decoding(model: torch.nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and `config` as the model's own: generate() takes what it is not told from there."""
    own_config, was_training = model.generation_config, model.training
    model.generation_config = config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own_config
        model.train(was_training)


def _left_padded(
    rows: Sequence[np.ndarray], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rows` (each [T_i]) as token ids [b, T] and attention mask [b, T], padded on the left."""
    length = max(map(len, rows))
    ids = np.full((len(rows), length), pad_token_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for row, tokens in enumerate(rows):
        ids[row, length - len(tokens) :] = tokens
        mask[row, length - len(tokens) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


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
      where they stand between two digits: "3:30" != "330";
    - an English article is removed only at the start and before a word of two letters or more: answers like
      "a" (multiple choice) and "b a c" are left whole, unlike in SQuAD's script.

    A text that has nothing but punctuation is compared as it is.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = "".join(_decimal_digit(character) for character in folded.translate(_ARABIC_SEPARATORS))
    # Currency signs go first, so that the sign of "-$3" stands before its number.
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
    """text[start:end] without punctuation and symbols; a space for one that stands between two digits."""
    kept = []
    for position in range(start, end):
        if unicodedata.category(text[position])[0] not in "PS":
            kept.append(text[position])
        elif text[position - 1 : position].isdigit() and text[position + 1 : position + 2].isdigit():
            kept.append(" ")
    return "".join(kept)


def exact_match(prediction_text: str, answers: str | Sequence[str]) -> bool:
    """Whether the answer in `prediction_text` equals one of `answers`, both extracted and normalised.

    Raises ValueError where there is no answer to compare with.
    """
    accepted = [answers] if isinstance(answers, str) else list(answers)
    if not accepted:
        raise ValueError("exact match needs at least one answer")
    prediction = normalize_answer(extract_answer(prediction_text))
    return any(prediction == normalize_answer(extract_answer(answer)) for answer in accepted)
