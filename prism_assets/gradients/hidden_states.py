"""Examples as the model represents them: the position-weighted mean of the last layer's hidden states.

Of T tokens with last hidden states h_1 … h_T (after the final norm, before the output embeddings)

    r = Σ_i i · h_i / Σ_i i          later tokens count more, for under causal attention they have seen more

as in SGPT (Muennighoff 2022, arXiv 2202.08904), taken over by RDS+ (Ivison et al. 2025, arXiv 2503.01807). All tokens
count, those of the prompt too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from prism_assets.errors import TooLittleMemory
from prism_assets.gradients.batching import OnBatch, Tokenized, check_examples, default_token_budget, plan_batches
from prism_assets.gradients.memory import is_out_of_memory
from prism_assets.gradients.transfer import HostCopy, a_batch_late, to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def representations(
    model: PeftModel,
    examples: Sequence[Tokenized],
    *,
    token_budget: int | None = None,
    progress: OnBatch | None = None,
) -> np.ndarray:
    """r / ‖r‖ of each example, float32 [n, H].

    Batches are a function of the examples' lengths alone. No logits are computed. Raises ValueError, naming the
    example's index, for one that the model cannot read or whose r is not finite or zero; MemoryError with advice.
    """
    model.eval()  # a starting adapter may have dropout
    decoder = cast("PreTrainedModel", model.get_base_model()).get_decoder()
    config = model.config.get_text_config()
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    check_examples(examples, embeddings.num_embeddings, getattr(config, "max_position_embeddings", None))
    budget = token_budget or default_token_budget(device)
    rows = np.zeros((len(examples), config.hidden_size), np.float32)
    batches = plan_batches([len(example.input_ids) for example in examples], budget)

    def run(positions: list[int]) -> HostCopy:
        ids, weights = _batch([examples[position].input_ids for position in positions], device)
        try:
            # Padding is on the right and has weight zero: no real token sees it, so no attention mask is needed.
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TooLittleMemory(
                f"hidden states of {len(positions)} examples of up to {ids.shape[1]} tokens do not fit the memory of "
                f"{device}: set features.token_budget below {budget}"
            ) from error
        means = torch.einsum("bt,bth->bh", weights, hidden.float())
        return HostCopy(torch.nn.functional.normalize(means, dim=1))

    done = 0
    for positions, copy in a_batch_late((positions, run(positions)) for positions in batches):
        (rows[positions],) = copy.arrays()
        done += len(positions)
        if progress is not None:
            progress(done, len(examples))
    usable = np.all(np.isfinite(rows), axis=1) & np.any(rows, axis=1)
    if not usable.all():
        raise ValueError(
            f"the hidden states of example {int(np.argmin(usable))} have a mean that is zero or not finite "
            f"({int((~usable).sum())} of {len(usable)}): the model cannot represent it in {embeddings.weight.dtype}"
        )
    return rows


def _batch(sequences: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids, int64 [b, T], and the weights i / Σ i of real tokens, float32 [b, T]."""
    width = max(map(len, sequences))
    ids = np.empty((len(sequences), width), np.int64)
    weights = np.zeros((len(sequences), width))
    for row, sequence in enumerate(sequences):
        length = len(sequence)
        ids[row, :length], ids[row, length:] = sequence, sequence[-1]
        weights[row, :length] = np.arange(1, length + 1) / (length * (length + 1) / 2)
    return to_device(ids, device), to_device(weights.astype(np.float32), device)
