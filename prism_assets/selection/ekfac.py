"""EK-FAC of LoRA's factors: curvature that is diagonal in the eigenbases of Kronecker factors.

Each adapted layer has two parameter matrices, A [r, d_in] and B [d_out, r]. The gradient of an example by one of them
is G = Σ_t s_t a_tᵀ over its tokens, a_t what the matrix multiplies and s_t the gradient of its output. With the
eigenvectors U of Σ s_t s_tᵀ and V of Σ a_t a_tᵀ, both over the tokens of the warm-up sample, and Λ_jk the mean over its
examples of (Uᵀ G V)²_jk,

    (H + λ_l I)⁻¹ T = U ((Uᵀ T V) / (Λ + λ_l)) Vᵀ        λ_l = damping · mean(Λ)

for each matrix l. *Source:* George et al. 2018, "Fast Approximate Natural Gradient Descent in a Kronecker-factored
Eigenbasis", arXiv 1806.03884; for influence on language models Grosse et al. 2023, arXiv 2308.03296. Gradients are
those of the sample's own completions (the empirical Fisher), not of answers that the model draws.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.errors import TooLittleMemory

if TYPE_CHECKING:
    import torch

# Among which the damping is chosen, in shares of the mean of Λ.
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_FLOAT_BYTES = 4

# What gives the gradients of a sample anew each time it is called, batch by batch: positions in the sample, and
# parameter name -> [b, p, q].
Gradients = Callable[[], Iterable[tuple[list[int], "Mapping[str, torch.Tensor]"]]]


class EkFac(NamedTuple):
    """Curvature of every parameter matrix [p, q] by name."""

    bases: "dict[str, tuple[torch.Tensor, torch.Tensor]]"  # U [p, p] and V [q, q]
    halves: "tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]"  # Λ [p, q] of the even and of the odd examples

    def values(self, name: str) -> "torch.Tensor":
        """Λ [p, q] of the whole sample, whose halves count alike."""
        return (self.halves[0][name] + self.halves[1][name]) / 2


def require_memory(shapes: Mapping[str, Sequence[int]], free: float) -> None:
    """Raises TooLittleMemory where eigenvectors of these parameters' factors would not fit into `free` bytes."""
    needed = _FLOAT_BYTES * sum(side**2 for shape in shapes.values() for side in shape)
    if needed > free:
        raise TooLittleMemory(
            f"curvature.kind ekfac: the eigenvectors of {len(shapes)} parameter matrices take {needed / 2**30:.1f} GiB "
            f"and {max(free, 0) / 2**30:.1f} GiB are left. Raise execution.memory, adapt fewer modules "
            "(lora.target_modules, lora.layers), or set curvature.kind to datainf or fisher, without such matrices."
        )


def ekfac(factors: "dict[str, tuple[torch.Tensor, torch.Tensor]]", gradients: Gradients) -> EkFac:
    """EK-FAC from the second moments of output gradients [p, p] and inputs [q, q] of each parameter, and the gradients
    of the same examples. `factors` is emptied on the way, so that no matrix is there beside its eigenvectors.

    A sample of one example counts as both halves. Raises ValueError for a sample without an example.
    """
    import torch

    bases = {}
    for name in list(factors):
        left, right = factors.pop(name)
        bases[name] = (torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
    sums: list[dict[str, Any]] = [{}, {}]
    counts = [0, 0]
    for positions, batch in gradients():
        parity = torch.tensor(positions) % 2
        for half in (0, 1):
            counts[half] += int((parity == half).sum())
        for name, (left, right) in bases.items():
            squares = (left.T @ batch[name].to(left) @ right).square()
            for half in (0, 1):
                part = squares[(parity == half).to(squares.device)].sum(0)
                sums[half][name] = sums[half][name] + part if name in sums[half] else part
    if not sum(counts):
        raise ValueError("EK-FAC needs at least one example")
    if not counts[1]:
        sums[1], counts[1] = sums[0], counts[0]
    even, odd = ({name: part / count for name, part in half.items()} for half, count in zip(sums, counts, strict=True))
    return EkFac(bases, (even, odd))


def chosen_damping(curvature: EkFac, dampings: Sequence[float] = DAMPINGS) -> float:
    """The damping, of some, under which one half of the sample foretells the other half's gradients best.

    The coordinates of a gradient in the eigenbases are taken as Gaussian with variances Λ_A + λ_l; the one with the
    largest likelihood of half B, added up over both folds and all matrices, is taken: no labels, no held-out records
    and no target enter. Choosing a shrinkage of a covariance by cross-validated likelihood is Friedman 1989
    ("Regularized Discriminant Analysis"); its use here is our own.
    """

    def surprise(damping: float) -> float:
        total = 0.0
        for own, other in (curvature.halves, curvature.halves[::-1]):
            for name, values in own.items():
                mean = float(values.double().mean())
                if mean > 0:
                    variances = values.double() + damping * mean
                    total += float((variances.log() + other[name].double() / variances).sum())
        return total

    return min(dampings, key=surprise)


def inverse(vector: "Mapping[str, torch.Tensor]", curvature: EkFac, damping: float) -> "dict[str, torch.Tensor]":
    """(H + λ_l I)⁻¹ of each parameter's part of the vector.

    A matrix without a gradient in the whole sample has no curvature, and t has hardly anything there: it is left out.
    """
    import torch

    found = {}
    for name, part in vector.items():
        left, right = curvature.bases[name]
        values = curvature.values(name)
        mean = float(values.mean())
        if mean <= 0:
            found[name] = torch.zeros_like(part)
            continue
        coordinates = (left.T @ part.to(left) @ right) / (values + damping * mean)
        found[name] = (left @ coordinates @ right.T).to(part)
    return found
