"""Curvature on the target side: t becomes (H + λI)⁻¹ t, for a form of H that the warm-up sample gives.

The published score has the inverse and leaves H and λ open (arXiv 2605.21422 cites DataInf for it). Applied to the
target vector alone it changes no stored row and no index: H belongs to the feature version, so an arrival changes
nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.errors import SettingsError
from prism_assets.features.blocks import feature_table, is_usable, vectors_of
from prism_assets.features.gradient_pass import GradientPass
from prism_assets.resources.lake import Artifact, Rows
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np
    import torch

# Of the mean squared entry of a layer's gradients, as the authors of DataInf take it in their experiments.
DATAINF_DAMPING = 0.1
# Among which the damping of the empirical Fisher is chosen, in shares of its trace; infinity is no correction.
FISHER_DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))


class Corrected(NamedTuple):
    """A target vector after the correction, up to a factor, and the damping that was used (None: there is none)."""

    vector: "dict[str, torch.Tensor]"
    damping: float | None


def reads_sample(stage: Stage) -> bool:
    """Whether the correction needs gradients of the warm-up sample."""
    return stage.settings.curvature.kind in ("fisher", "datainf", "ekfac")


def sample_features(work: GradientPass) -> Artifact | None:
    """Features of the warm-up sample's rows at each checkpoint. They belong to the feature version, so an arrival
    changes nothing. None where the correction needs none."""
    stage = work.stage
    if not reads_sample(stage):
        return None
    sample = stage.shown("warmup_sample")
    recipe = stage.recipe("warmup_sample_features", stage.feature_identity, {"sample": sample, "warmup": stage.warmup})
    return stage.show(stage.make(recipe, lambda: _sample_rows(work, sample)).artifact)


def _sample_rows(work: GradientPass, sample: Artifact) -> Rows:
    from prism_assets.corpus.token_tables import from_table

    rows = work.stage.lake.read_table(sample)
    examples = from_table(rows)
    with work.stage.progress("gradients of the warm-up sample", len(examples) * len(work.checkpoints)) as progress:
        passes = work.candidate_rows(examples, progress.update)
    return Rows(feature_table(rows["id"].to_pylist(), passes), compression="none")


def correct(
    work: GradientPass, position: int, vectors: "list[dict[str, torch.Tensor]]", sample: Artifact | None
) -> list[Corrected]:
    """The vectors of a checkpoint, corrected as the settings ask; `sample` are its features where they are needed.

    Raises SettingsError where the sample has no usable gradient, TooLittleMemory where EK-FAC's matrices do not fit.
    """
    kind, damping = work.stage.settings.curvature.kind, work.stage.settings.curvature.damping
    if kind == "none":
        return [Corrected(vector, None) for vector in vectors]
    if kind == "adam":
        diagonal = work.preconditioner(work.checkpoints[position], "adam").diagonal
        return [
            Corrected({name: tensor * diagonal(name) for name, tensor in vector.items()}, None) for vector in vectors
        ]
    assert sample is not None
    usable = _usable(work.stage, sample)
    wanted = None if damping == "auto" else damping
    if kind == "datainf":
        return _datainf(work, position, vectors, usable, DATAINF_DAMPING if wanted is None else wanted)
    if kind == "ekfac":
        return _ekfac(work, position, vectors, sample, usable, wanted)
    return _fisher(work, position, vectors, sample, usable, wanted)


def _usable(stage: Stage, sample: Artifact) -> "np.ndarray":
    """Positions of the sample's rows with a usable gradient."""
    import numpy as np

    table = stage.lake.read_table(sample, ["refused"])
    usable = np.flatnonzero(is_usable(table))
    if not len(usable):
        raise SettingsError(
            f"curvature.kind: the warm-up sample has {table.num_rows} rows and none with a usable gradient "
            f"(the first is refused because {table['refused'][0].as_py()}), so there is no curvature to correct by. "
            "Set it to none, or raise warmup.share."
        )
    return usable


def _sample_examples(stage: Stage, usable: "np.ndarray") -> list[Any]:
    from prism_assets.corpus.token_tables import from_table

    return from_table(stage.lake.read_table(stage.shown("warmup_sample")).take(usable))


# -- the empirical Fisher -----------------------------------------------------------------------------------------


def _fisher(
    work: GradientPass,
    position: int,
    vectors: "list[dict[str, torch.Tensor]]",
    sample: Artifact,
    usable: "np.ndarray",
    damping: float | None,
) -> list[Corrected]:
    """(F + λI)⁻¹ t of each t up to a factor, unsketched, F the second moment of the sample's unit rows: t minus a
    weighted sum of these, by one pass over them. The coefficients are found in the sketch, the rows that they multiply
    are exact."""
    import numpy as np

    from prism_assets.selection.direction import curvature_coefficients

    checkpoint = work.checkpoints[position]
    engine = work.at(checkpoint)
    kept = work.stage.lake.read_table(sample).take(usable)
    rows = vectors_of(kept).reshape(len(usable), len(work.checkpoints), -1)[:, position].astype(np.float64)
    norms = np.array([one[position] for one in kept["norm"].to_pylist()])
    projection, dampings, coefficients = work.projection(engine), [], []
    for vector in vectors:
        sketched = projection.sketch_vector(vector).cpu().numpy().astype(np.float64)
        dampings.append(chosen_damping(rows, sketched) if damping is None else damping)
        # Without bound nothing is taken away.
        found = np.zeros(len(rows))
        if np.isfinite(dampings[-1]):
            found = curvature_coefficients(rows, rows @ sketched, dampings[-1]) / norms
        coefficients.append(found)
    # Σ_i a_i g_i / ‖D g_i‖
    explained = engine.weighted_gradients(_sample_examples(work.stage, usable), np.stack(coefficients))
    diagonal = work.preconditioner(checkpoint).diagonal
    return [
        Corrected({name: tensor - diagonal(name) * part[name] for name, tensor in vector.items()}, lam)
        for vector, part, lam in zip(vectors, explained, dampings, strict=True)
    ]


def chosen_damping(rows: "np.ndarray", target: "np.ndarray", dampings: Sequence[float] = FISHER_DAMPINGS) -> float:
    """The damping, of some, whose inverse of the second moment of one half of the rows serves the other half best.

    rows: [N, K]; target: [K]. x = (F_A + λI)⁻¹ t minimises the quadratic model ½ s² xᵀF_B x − s tᵀx of the other half,
    at the best length s, the better the larger (tᵀx)²/(xᵀF_B x) is. Two folds, the rows in turn; their logarithms are
    added, so no labels and no held-out records are asked. Two-fold cross-validation of a ridge parameter is textbook;
    its use here is our own. Infinity (no correction) where there are fewer than two rows.
    """
    import numpy as np

    from prism_assets.selection.direction import curvature_coefficients

    if len(rows) < 2:
        return float("inf")
    halves = rows[::2], rows[1::2]

    def quality(damping: float) -> float:
        total = 0.0
        for own, other in (halves, halves[::-1]):
            found = target
            if np.isfinite(damping):
                found = target - own.T @ curvature_coefficients(own, own @ target, damping)
            curved = float(np.mean((other @ found) ** 2))
            rise = float(target @ found)
            total += 2 * np.log(max(rise, 1e-300)) - np.log(max(curved, 1e-300))
        return total

    return max(dampings, key=quality)


# -- DataInf ------------------------------------------------------------------------------------------------------


def _datainf(
    work: GradientPass,
    position: int,
    vectors: "list[dict[str, torch.Tensor]]",
    usable: "np.ndarray",
    damping: float,
) -> list[Corrected]:
    """DataInf's closed form, parameter tensor by tensor, over the sample's rows as they are (not of unit length)."""
    checkpoint = work.checkpoints[position]
    engine = work.at(checkpoint)
    diagonal = work.preconditioner(checkpoint).diagonal
    examples = _sample_examples(work.stage, usable)

    def gradients() -> "Any":
        for _, batch in engine.per_example_gradients(examples):
            yield {name: tensor * diagonal(name) for name, tensor in batch.items()}

    return [Corrected(one, damping) for one in datainf_inverse(vectors, gradients, len(examples), damping)]


def datainf_inverse(
    vectors: "Sequence[Mapping[str, torch.Tensor]]",
    gradients: "Callable[[], Any]",
    number: int,
    damping: float,
) -> "list[dict[str, torch.Tensor]]":
    """(1/n) Σ_i (g_il g_ilᵀ + λ_l I)⁻¹ t_l of each t and layer l (here: each parameter tensor), by the formula of
    Sherman and Morrison: (1/λ_l) (t_l − (1/n) Σ_i g_il ⟨g_il, t_l⟩ / (λ_l + ‖g_il‖²)), λ_l = damping · mean squared
    entry of the g_il.

    `gradients()` gives the n gradients anew each time, in batches: parameter name -> [b, *shape]. Two rounds: norms,
    then the sums. *Source:* Kwon, Wu, Wu and Zou 2024, "DataInf", arXiv 2310.00902, equation 5.
    """
    import torch

    shapes = {name: tensor.shape for name, tensor in vectors[0].items()}
    squares = dict.fromkeys(shapes, 0.0)
    for batch in gradients():
        for name in shapes:
            squares[name] += float(batch[name].double().square().sum())
    lambdas = {name: damping * total / (number * shapes[name].numel()) for name, total in squares.items()}
    sums = [{name: torch.zeros_like(tensor) for name, tensor in vector.items()} for vector in vectors]
    for batch in gradients():
        for name in shapes:
            flat = batch[name].flatten(1)
            lengths = (lambdas[name] + flat.square().sum(1)).clamp_min(1e-300)
            for vector, total in zip(vectors, sums, strict=True):
                coefficients = flat @ vector[name].to(flat).flatten() / lengths
                total[name] += (coefficients @ flat).view(shapes[name]).to(total[name])
    # A layer without a gradient in the whole sample has no curvature, and t has hardly anything there: it is left out.
    return [
        {
            name: (tensor - total[name] / number) / lambdas[name] if lambdas[name] > 0 else torch.zeros_like(tensor)
            for name, tensor in vector.items()
        }
        for vector, total in zip(vectors, sums, strict=True)
    ]


# -- EK-FAC -------------------------------------------------------------------------------------------------------


def _ekfac(
    work: GradientPass,
    position: int,
    vectors: "list[dict[str, torch.Tensor]]",
    sample: Artifact,
    usable: "np.ndarray",
    damping: float | None,
) -> list[Corrected]:
    """EK-FAC's inverse, parameter matrix by parameter matrix, over the sample's rows as they are."""
    from prism_assets.gradients.memory import MemoryLimit
    from prism_assets.selection import ekfac

    stage, engine = work.stage, work.at(work.checkpoints[position])

    def make() -> ekfac.EkFac:
        limit = MemoryLimit(engine.device, stage.settings.execution.memory_limit)
        ekfac.require_memory(engine.parameter_shapes, limit.free())
        examples = _sample_examples(stage, usable)
        factors = engine.kronecker_factors(examples)
        return ekfac.ekfac(factors, lambda: engine.per_example_gradients(examples))

    # Two passes over the sample, which the groups of a target and the next target share.
    curvature = work.remember(("ekfac", position, sample.fingerprint), make)
    lam = ekfac.chosen_damping(curvature) if damping is None else damping
    return [Corrected(ekfac.inverse(vector, curvature, lam), lam) for vector in vectors]
