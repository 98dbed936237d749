"""Which example and token each row of a layer's inputs belongs to: shown by runs of the model, not read off shapes.

Most layers see a batch as [b, T, features]. Some see [b * T, features] or an axis more, [b, T, k, features] or
[b, k, T, features]: shared experts, OPT's MLP, latent attention. Their rows go by example, and a reshape gives every
example its own. A layer that takes tokens before examples, [T * b, features], or those that a router chose, can have
the same shape; the reshape would then give examples each other's gradients without anybody noticing.

So a small batch is run several times: as it is, with one example replaced, and with all tokens from a position on
replaced. In a causal model a row of token t of example e changes in a run exactly where a token up to t of example e
was replaced. No two tokens of the batch change in the same runs, so the pattern says which token a row carries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SMALL, LARGER = (2, 3), (3, 5)  # examples, tokens; layers that see no [b, T] are tried in both


class RowOrder(NamedTuple):
    """How rows lie in a layer's inputs. Those of an example always stand together, in the batch's order."""

    rows_per_token: int | None = 1  # k; None where their number is not a multiple of the tokens
    by_token: bool = True  # [b, T, k]; else the tokens of an example lie otherwise, as in [b, k, T]
    first_axis: bool = True  # the first axis of the inputs is the examples; else it is also over tokens


class Runs(NamedTuple):
    """The batches to run: `ids` int64 [b, T] each, and which tokens of each were replaced, bool [b, T]."""

    shape: tuple[int, int]
    ids: list[Tensor]
    replaced: list[Tensor]

    @classmethod
    def of(cls, shape: tuple[int, int], ordinary: Sequence[int], device: torch.device) -> Runs:
        """Runs of b examples of T tokens; `ordinary` are the ids to draw from, more than one."""
        examples, tokens = shape
        count = len(ordinary)
        places = torch.arange(examples * tokens)
        shift = examples * tokens if (examples * tokens) % count else 1
        original, other = (torch.tensor(ordinary)[(places + by) % count].view(shape) for by in (0, shift))
        replaced = [torch.zeros(shape, dtype=torch.bool)]
        for example in range(1, examples):
            replaced.append(torch.zeros(shape, dtype=torch.bool))
            replaced[-1][example] = True
        for start in range(1, tokens):
            replaced.append(torch.zeros(shape, dtype=torch.bool))
            replaced[-1][:, start:] = True
        return cls(shape, [torch.where(where, other, original).to(device) for where in replaced], replaced)

    def expected(self) -> Tensor:
        """What a causal model's rows do: bool [runs - 1, b, T], whether token t of example e changes."""
        return torch.stack([where.cumsum(1) > 0 for where in self.replaced[1:]])


def ordinary_ids(config: Mapping[str, Any], vocabulary: int) -> list[int]:
    """Up to 64 token ids from within the vocabulary that the configuration names nowhere (as an image's, say)."""
    special = set(_special_ids(config))
    start = vocabulary // 4
    found = [(start + index) % vocabulary for index in range(vocabulary)]
    ordinary = [index for index in found if index not in special]
    return (ordinary if len(ordinary) > 1 else found)[:64]


def changes(seen: Sequence[Tensor]) -> Tensor:
    """How much each row differs from the first run: [runs - 1, rows], as a share of its norm, float64.

    seen: the inputs of one layer in every run, [..., features], of one shape.
    """
    first, *others = (values.flatten(0, -2).double() for values in seen)
    norms = first.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.stack([(values - first).norm(dim=-1) / norms for values in others])


def tolerance(dtype: torch.dtype) -> float:
    """Rows that differ by no more of their norm may be equal but for rounding."""
    return max(1e-4, 4 * torch.finfo(dtype).eps)


def order_of(seen: Sequence[Tensor], runs: Runs) -> RowOrder | None:
    """How the rows of a layer's inputs lie, None where they do not go by example.

    seen: the layer's inputs in every run. Of inputs [b, ...] no row may change with another example. Of any other shape
    every row must change in exactly the runs in which its token would.
    """
    shapes = {tuple(values.shape) for values in seen}
    if len(shapes) != 1 or not seen[0].numel():
        return None  # data decide what the layer sees
    (shape,) = shapes
    examples, tokens = runs.shape
    rows = seen[0].numel() // shape[-1]
    difference = changes(seen).cpu()
    allowed = tolerance(seen[0].dtype)
    if len(shape) > 1 and shape[0] == examples:
        others = ~torch.stack([where.any(1) for where in runs.replaced[1:]])  # [runs - 1, b]
        if not bool((difference.view(-1, examples, rows // examples)[others] <= allowed).all()):
            return None
        if shape[1] == tokens:
            return RowOrder(rows // (examples * tokens))
        return RowOrder(None, by_token=False)
    if rows % (examples * tokens):
        return None
    per_token = rows // (examples * tokens)
    expected = runs.expected()
    by_token = expected[..., None].expand(*expected.shape, per_token)
    for order, changing in ((True, by_token), (False, by_token.transpose(2, 3))):
        moved, still = (difference[where.reshape(difference.shape)] for where in (changing, ~changing))
        most = float(still.max())
        if most <= allowed and float(moved.min()) > 4 * most:
            return RowOrder(per_token, order, first_axis=False)
    return None


def common_order(orders: Set[RowOrder]) -> RowOrder | None:
    """What holds of all uses of a layer, None where that is nothing."""
    if len(orders) == 1:
        return next(iter(orders))
    if all(order.first_axis for order in orders):
        return RowOrder(None, by_token=False)
    return None


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Within the context every call of the modules leaves its inputs under the module's name."""
    calls: dict[str, list[Tensor]] = {name: [] for name in modules}

    def recorder(name: str):
        return lambda _, inputs: calls[name].append(inputs[0].detach().clone())

    hooks = [module.register_forward_pre_hook(recorder(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _special_ids(config: Any) -> Iterator[int]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _special_ids(value)
        elif str(key).endswith(("token_id", "token_ids", "token_index")):
            for one in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(one, int):
                    yield one
