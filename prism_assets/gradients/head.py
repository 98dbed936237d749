"""Log-probabilities of the supervised tokens, without logits anywhere else and without all logits at once.

The hidden states before the output embeddings (`lm_head`) are gathered at the N supervised positions,
and the logits are formed a chunk of positions at a time. The gradient of each token's log-probability with
respect to its own hidden state,

    d log p(y) / dh = (e_y - softmax(z)) dz/dh,     z = cap * tanh(scale * (W h + c) / cap)

is formed in the same loop (scale: Cohere, Granite; cap: Gemma's soft-capping; both absent elsewhere), so the
backward pass is one multiplication by the tokens' weights and no logit outlives its chunk.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits of one chunk, in elements: a few megabytes on a CPU, so that the passes over them stay in its cache.
CHUNK_ELEMENTS_CPU = 2**20
CHUNK_ELEMENTS_GPU = 2**27


class LogitTransform(NamedTuple):
    """What a model does to W h + c: z = cap * tanh(scale * (W h + c) / cap), or only the scale where cap is
    None."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    @classmethod
    def identify(cls, ramp: Tensor, transformed: Tensor, config) -> LogitTransform | None:
        """The transform that turned `ramp` into `transformed`, or None if it is none of these.

        ramp: known logits, shape [..., V], that include values near zero and far from it; config: the text
        model's.
        """
        ramp, transformed = ramp.double(), transformed.double()
        tolerance = 0.02 if transformed.abs().max() > 1e3 else 1e-3  # logits in half precision are coarse when large
        cap = getattr(config, "final_logit_softcapping", None) or None
        small = (ramp.abs() > 0) & (ramp.abs() < 1)
        scale = float((transformed[small] / ramp[small]).median()) if cap is None else 1.0
        for candidate in (cls(1.0, None), cls(1.0, cap), cls(scale, None)):
            error = (candidate(ramp) - transformed).abs()
            if bool((error <= tolerance * (1 + transformed.abs())).all()):
                return candidate
        return None


def token_log_probs(hidden: Tensor, targets: Tensor, head: nn.Module, transform: LogitTransform) -> Tensor:
    """log p(target) at each position, differentiable in `hidden`.

    hidden: [N, H]; targets: int64 [N]; head: a linear layer with weight [V, H]. Returns float32 [N] (float64
    for a float64 model).
    """
    return _TokenLogProbs.apply(hidden, targets, head.weight, head.bias, transform)


def log_probs_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [N, V], targets [N] -> log p(target) [N] in float32 (float64 of float64), by autograd's own
    operations."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])[:, 0]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, targets, weight, bias, transform):
        vocabulary = weight.shape[0]
        elements = CHUNK_ELEMENTS_GPU if hidden.is_cuda else CHUNK_ELEMENTS_CPU
        rows = max(32, elements // vocabulary)
        needs_gradient = ctx.needs_input_grad[0]
        jacobian = torch.empty_like(hidden) if needs_gradient else None  # [N, H]
        log_probs = []
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = transform(F.linear(hidden[chunk], weight, bias))  # [n, V]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            all_log_probs = torch.log_softmax(logits, dim=-1)
            log_probs.append(all_log_probs.gather(1, targets[chunk, None])[:, 0])
            if jacobian is not None:
                jacobian[chunk] = _hidden_gradient(all_log_probs, logits, targets[chunk], weight, transform)
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        return torch.cat(log_probs) if log_probs else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx, gradient):
        (jacobian,) = ctx.saved_tensors
        return jacobian * gradient[:, None].to(jacobian.dtype), None, None, None, None


def _hidden_gradient(
    log_probs: Tensor, logits: Tensor, targets: Tensor, weight: Tensor, transform: LogitTransform
) -> Tensor:
    """d log p(target) / dh [n, H] from all log-probabilities [n, V] (overwritten) and transformed logits [n,
    V]."""
    probabilities = log_probs.exp_()
    if transform.cap is None:
        # (e_y - p) W = W_y - p W: the target's row is looked up instead of being written into p.
        gradient = torch.addmm(weight[targets], probabilities.to(weight.dtype), weight, alpha=-1)
    else:
        scores = probabilities.neg_()
        scores.scatter_add_(1, targets[:, None], torch.ones_like(targets[:, None], dtype=scores.dtype))
        scores *= 1 - (logits / transform.cap).square()
        gradient = scores.to(weight.dtype) @ weight
    return gradient if transform.scale == 1.0 else gradient * transform.scale


def ramp_logits(vocabulary: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Known logits [1, 1, V] from -120 to 120, dense near zero, that show what a model does to its logits."""
    steps = torch.linspace(-1, 1, vocabulary, dtype=torch.float64)
    ramp = 120 * steps.sign() * steps.abs() ** math.e
    return ramp.to(device, dtype)[None, None]
