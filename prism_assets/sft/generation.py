"""Greedy generation in batches, with keys and values cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Steps after which rows that have ended are dropped from their batch: a call costs far less than such steps.
STEPS = 16

# ---- generation


def generate(
    model: torch.nn.Module,
    prompts: Sequence[np.ndarray],
    *,
    pad_token_id: int,
    eos_token_id: int | Sequence[int] | None,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[np.ndarray]:
    """Greedy continuations, int32 [<= max_new_tokens] each, of `prompts`, token ids [T_i] each, in order.

    The end-of-sequence token and what follows it are cut off. Batches are made of prompts of similar length,
    padded on the left and masked, so a row's neighbours change its logits by rounding only. Rows that have ended leave
    their batch every `STEPS` steps where the model's cache allows it, so that a few long answers do not hold all
    others. Decoding settings
    that the checkpoint carries (sampling, penalties, suppressed tokens) are put aside for the call.
    `model` is a transformers causal LM, or one with LoRA by PEFT.

    A prompt that leaves no room for `max_new_tokens` within the model's `max_position_embeddings` loses its start, as
    everywhere in this project. Raises ValueError for an empty
    prompt (naming its position) and where `max_new_tokens` leaves no room for any prompt.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be positive, got {max_new_tokens} and {batch_size}")
    # PEFT puts LoRA layers into the model itself, so the model inside a PeftModel is the adapted one.
    given = cast("Any", model)
    inner = given.get_base_model() if hasattr(model, "get_base_model") else given
    limit = getattr(inner.config, "max_position_embeddings", None)
    if limit is not None and limit <= max_new_tokens:
        raise ValueError(
            f"max_new_tokens is {max_new_tokens}, but the context has {limit} tokens: no room for a prompt"
        )
    rows = [np.asarray(prompt, dtype=np.int64)[-(limit - max_new_tokens) if limit else 0 :] for prompt in prompts]
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
        return_dict_in_generate=True,
    )
    order = sorted(range(len(rows)), key=lambda position: (len(rows[position]), position))
    results: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * len(rows)
    with _plain_decoding(inner, config), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            positions = order[start : start + batch_size]
            ids, mask = _left_padded([rows[position] for position in positions], pad_token_id, inner.device)
            config.max_new_tokens = max_new_tokens
            generated = _continued(inner, ids, mask, config, stops)
            for position, tokens in zip(positions, generated, strict=True):
                ends = np.flatnonzero(np.isin(tokens, stops))
                results[position] = tokens[: ends[0] if len(ends) else len(tokens)].astype(np.int32)
    return results


def _continued(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, config: GenerationConfig, stops: Sequence[int]
) -> list[np.ndarray]:
    """The tokens that follow each row of `ids` [b, T], at least up to its end; `mask` [b, T] is the attention mask.

    `config.max_new_tokens` is how many at most; it is changed.
    """
    prompt, left = ids.shape[1], cast("int", config.max_new_tokens)
    results: list[np.ndarray] = [np.empty(0)] * len(ids)
    rows = np.arange(len(ids))  # those still in the batch
    cache: DynamicCache | None = None
    steps = STEPS if stops else left
    while len(rows):
        config.max_new_tokens = steps = min(steps, left)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=config,
        )
        made, left = output.sequences[:, prompt:].cpu().numpy(), left - steps
        cache = output.get("past_key_values")
        if left and not _is_plain(cache):  # of another kind, which may not be continued with fewer rows
            steps, left, cache = left + steps, left + steps, None
            continue
        ended = np.isin(made, list(stops)).any(axis=1) | (left == 0)
        for row in np.flatnonzero(ended):
            results[rows[row]] = made[row]
        rows, kept = rows[~ended], torch.from_numpy(np.flatnonzero(~ended)).to(ids.device)
        ids = output.sequences[kept]
        mask = torch.cat([mask[kept], mask.new_ones(len(kept), ids.shape[1] - mask.shape[1])], dim=1)
        if len(rows) and cache is not None and ended.any():
            cache.batch_select_indices(kept)
    return results


def _is_plain(cache: Any) -> bool:
    """Whether it holds keys and values alone, a row each."""
    return type(cache) is DynamicCache and {type(layer) for layer in cache.layers} <= {
        DynamicLayer,
        DynamicSlidingWindowLayer,
    }


def pad_token_id(tokenizer: Any) -> int:
    """The token that fills batches; it is masked everywhere, so EOS serves where the tokenizer has none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


@contextmanager
def _plain_decoding(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, and `config` as the model's own: generate() reads from there what it is not given."""
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
