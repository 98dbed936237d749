"""Causal attention on a CPU, a block of queries at a time: with its backward pass it takes up to 45% less time than
torch's own kernel from about 100 tokens on, and as long below.

Queries s..e see the keys 0..e alone, so about half of the scores are never formed. The probabilities
P = softmax(scale Q K^T) are kept for the backward pass,

    dV = P^T dO      dS = P * (dO V^T - rowsum(dO * O))      dQ = scale dS K      dK = scale dS^T Q

(FlashAttention, arXiv 2205.14135, appendix B.2, but for its recomputation of P, which costs a CPU more than it
saves). What is kept grows with the square of the length; long examples, and all attention that is not plainly
causal, go to torch's kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BLOCK = 64  # queries
# What is kept is T / 2 numbers a token and head. At this length that is about a third of what a decoder layer with
# heads of 64 keeps for its backward pass anyway.
LONGEST = 1024
CHANGES_SCORES = ("position_bias", "softcap", "cache")  # settings that torch's function knows

# Of a thread, so that what one engine does changes nothing for a model that another thread runs.
_in_blocks: ContextVar[bool] = ContextVar("attention in blocks", default=False)


@contextmanager
def attention_in_blocks(device: torch.device) -> Iterator[None]:
    """Within the context, in this thread, models on a CPU attend as described above where they would ask torch's
    `scaled_dot_product_attention`; other attention, and other devices, are left alone.

    The function behind the name "sdpa" is replaced once a process, by one that does the same outside of the context;
    the name in a model's configuration is not, for models compare it.
    """
    if device.type == "cpu" and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    token = _in_blocks.set(device.type == "cpu")
    try:
        yield
    finally:
        _in_blocks.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **settings,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [b, h, T, d], key and value [b, h / g, T, d] -> [b, T, h,
    d].

    transformers gives no mask where attention is causal and nothing else; only then, and where nothing is added
    to the scores, are blocks used.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not (
        _in_blocks.get()
        and causal
        and attention_mask is None
        and not dropout
        and all(settings.get(name) is None for name in CHANGES_SCORES)
        and query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.float64)
        and 1 < query.shape[2] <= LONGEST
        and (query.shape[0], *query.shape[2:]) == (key.shape[0], *key.shape[2:])
        and key.shape == value.shape
    ):
        # A new interface has what is registered for every model, and not what is set above.
        return AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **settings
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scale).transpose(1, 2).contiguous(), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale Q K^T, each query seeing the keys up to its own position) V.

    query: [b, h, T, d]; key, value: [b, h / g, T, d], each head of them shared by g consecutive heads of the
    query. Returns [b, h, T, d].
    """
    return _CausalAttention.apply(query, key, value, scale)


class _CausalAttention(torch.autograd.Function):
    """Inside, a head of keys is a batch entry: queries [n, g, T, d], keys and values [n, T, d], n = b * h / g."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        queries = _grouped(query * scale, keys)
        output = torch.empty_like(queries)
        kept = []
        for start, end in _blocks(keys):
            scores = torch.bmm(_rows(queries, start, end), keys[:, :end].transpose(1, 2))
            _split(scores, queries)[..., start:] += _future(end - start, scores)
            probabilities = torch.softmax(scores, dim=-1)
            output[:, :, start:end] = _split(torch.bmm(probabilities, values[:, :end]), queries)
            if any(ctx.needs_input_grad[:3]):
                kept.append(probabilities)
        ctx.save_for_backward(queries, keys, values, output, *kept)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return output.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, output, *kept = ctx.saved_tensors
        gradients = _grouped(gradient, keys)
        inner = (gradients * output).sum(-1, keepdim=True)
        of_queries, of_keys, of_values = map(torch.empty_like, (queries, keys, values))
        # From the last block on, because it alone sees every key: the others add to what it writes.
        for (start, end), probabilities in reversed(list(zip(_blocks(keys), kept, strict=True))):
            upstream = _rows(gradients, start, end)
            of_scores = torch.bmm(upstream, values[:, :end].transpose(1, 2))
            of_scores.sub_(_rows(inner, start, end)).mul_(probabilities)
            of_queries[:, :, start:end] = _split(torch.bmm(of_scores, keys[:, :end]), queries)
            beta = 0 if end == keys.shape[1] else 1
            of_values[:, :end].baddbmm_(probabilities.transpose(1, 2), upstream, beta=beta)
            of_keys[:, :end].baddbmm_(of_scores.transpose(1, 2), _rows(queries, start, end), beta=beta)
        query_shape, key_shape, value_shape = ctx.shapes
        of_queries *= ctx.scale
        return of_queries.view(query_shape), of_keys.view(key_shape), of_values.view(value_shape), None


def _blocks(keys: Tensor) -> list[tuple[int, int]]:
    length = keys.shape[1]
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _grouped(heads: Tensor, keys: Tensor) -> Tensor:
    """[b, h, T, d] -> [n, g, T, d]."""
    return heads.reshape(keys.shape[0], -1, *heads.shape[2:])


def _rows(grouped: Tensor, start: int, end: int) -> Tensor:
    """[n, g, T, d] -> [n, g * (end - start), d]."""
    return grouped[:, :, start:end].reshape(grouped.shape[0], -1, grouped.shape[-1])


def _split(rows: Tensor, grouped: Tensor) -> Tensor:
    """[n, g * t, any] -> [n, g, t, any], a view."""
    return rows.view(*grouped.shape[:2], -1, rows.shape[-1])


def _future(size: int, like: Tensor) -> Tensor:
    """[size, size]: minus infinity above the diagonal, zero elsewhere."""
    return like.new_full((size, size), -torch.inf).triu_(1)
