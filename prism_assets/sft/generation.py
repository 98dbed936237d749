"""Greedy generation in batches, with keys and values cached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from transformers import GenerationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    padded on the left and masked, so a row's neighbours change its logits by rounding only. Decoding settings
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
