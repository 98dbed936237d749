"""What is measured at a warm-up checkpoint: weights after random steps, gains of growing steps, what candidates do.

Every function leaves the model's parameters as it found them. What is compared is measured in float32 also for a
half-precision model: the changes that single steps make would drown in its rounding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prism_assets.selection.direction import TargetSet, Vector, inner, norm, target_vector
from prism_assets.selection.preference import PreferenceWeights, TargetKind, preference_weights
from prism_assets.stats.ranks import flipped_share, spearman

if TYPE_CHECKING:
    import torch

    from prism_assets.gradients.engine import GradientEngine
    from prism_assets.gradients.preconditioner import Preconditioner

# Steps of growing size, in multiples of the probe step.
STEP_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)

OnProgress = Callable[[int], None]  # called with the number of units done


class Objectives(NamedTuple):
    """What directions raise: the objective of each, under the parameters that the model has at the moment."""

    prism: float  # J, what the PRISM direction raises
    uniform: float  # the mean preference score of the targets, what the uniform direction raises
    held_out: float  # mean log-probability of the held-out examples

    def change(self, before: "Objectives") -> "Objectives":
        """These values minus earlier ones."""
        return Objectives(*(after - then for after, then in zip(self, before, strict=True)))


class Probe(NamedTuple):
    """Targets and held-out records under the parameters that the engine has at the moment."""

    engine: "GradientEngine"
    targets: TargetSet
    kind: TargetKind
    temperature: float
    held_out: TargetSet
    tokens: np.ndarray | float = (
        1.0  # [m] what makes preference scores of mean log-probabilities: 1, or supervised tokens
    )

    def weights(self) -> PreferenceWeights:
        """Weights and objective of the targets now."""
        with self.engine.single_precision():
            return self._preference(self._scores())

    def look(self) -> tuple[Objectives, np.ndarray]:
        """What the model makes of targets and held-out examples now, and the targets' weights [m]."""
        with self.engine.single_precision():
            scores = self._scores()
            wanted = self.held_out.examples[: self.held_out.size]
            held_out = float(np.mean(self.engine.mean_log_probs(wanted)))
        preference = self._preference(scores)
        return Objectives(preference.objective, float(scores.mean()), held_out), preference.weights

    def gradient(self) -> Vector:
        """∇J, unsketched."""
        with self.engine.single_precision():
            now = self._preference(self._scores())
            raw = target_vector(self.engine, self.targets, now.weights * self.tokens)
        return {name: tensor * np.exp(now.log_z) for name, tensor in raw.items()}

    def held_out_gradient(self) -> Vector:
        """The gradient of the mean held-out score: of pairs the mean margin, else the mean log-probability."""
        with self.engine.single_precision():
            return target_vector(self.engine, self.held_out, np.full(self.held_out.size, 1 / self.held_out.size))

    def _scores(self) -> np.ndarray:
        return self.targets.scores(self.engine.mean_log_probs(self.targets.examples)) * self.tokens

    def _preference(self, scores: np.ndarray) -> PreferenceWeights:
        return preference_weights(scores, self.kind, self.temperature)


# -- preferences under random steps ------------------------------------------------------------------------------


class Stability(NamedTuple):
    """The weights after R random steps against those before."""

    rank_correlations: list[float | None]  # [R] Spearman
    flipped: list[float | None]  # [R] share of target pairs in the opposite order


def random_directions(
    shapes: Mapping[str, tuple[int, ...]], number: int, seed: int
) -> "Iterator[dict[str, torch.Tensor]]":
    """`number` directions drawn uniformly from the unit sphere of all parameters (normalised Gaussians), on the CPU."""
    import torch

    for position in range(number):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        length = norm(drawn)
        yield {name: tensor / length for name, tensor in drawn.items()}


def weight_stability(probe: Probe, directions: Iterable[Vector], length: float) -> Stability:
    """Recompute the targets' weights at θ + length · direction, for each unit direction."""
    before = probe.weights().weights
    correlations, flipped = [], []
    for direction in directions:
        with probe.engine.step(direction, length):
            after = probe.weights().weights
        correlations.append(spearman(before, after))
        flipped.append(flipped_share(before, after))
    return Stability(correlations, flipped)


# -- steps of growing size ---------------------------------------------------------------------------------------


class Slopes(NamedTuple):
    """What first order predicts by."""

    objective: Vector  # ∇J
    held_out: Vector  # of the mean held-out score (`Probe.held_out_gradient`)


def growing_steps(probe: Probe, along: Vector, slopes: Slopes, sizes: Sequence[float]) -> list[dict[str, float]]:
    """Predicted and measured changes after steps along one direction.

    One entry a size: `size`; `predicted` and `measured`, of J; `held_out_predicted` and `held_out_measured`, of the
    mean held-out score (of pairs the margin, else the log-probability); `held_out`, measured, of the held-out mean
    log-probability.
    """

    def look() -> tuple[float, float, float]:
        log_probs = probe.engine.mean_log_probs(probe.held_out.examples)
        scores = probe.held_out.scores(log_probs)
        return probe.weights().objective, float(scores.mean()), float(log_probs[: probe.held_out.size].mean())

    length = norm(along)
    unit = {name: tensor / length for name, tensor in along.items()}
    slope, held_out_slope = (inner(one, unit) for one in slopes)
    steps = []
    with probe.engine.single_precision():
        before = look()
        for size in sizes:
            with probe.engine.step(unit, size):
                objective, score, log_prob = (now - then for now, then in zip(look(), before, strict=True))
            predictions = {"predicted": size * slope, "held_out_predicted": size * held_out_slope}
            measured = {"measured": objective, "held_out_measured": score, "held_out": log_prob}
            steps.append({"size": size, **predictions, **measured})
    return steps


# -- single candidates -------------------------------------------------------------------------------------------


class CandidateEffect(NamedTuple):
    """One step along one candidate's preconditioned gradient Γ."""

    cosines: dict[str, float]  # strategy -> exact cosine of Γ with its direction
    change: Objectives
    flipped: float | None  # share of target pairs whose weights change their order


def single_candidate_steps(
    probe: Probe,
    examples: Sequence[Any],
    preconditioner: "Preconditioner",
    directions: Mapping[str, Vector],
    length: float,
    progress: OnProgress = lambda done: None,
) -> list[CandidateEffect]:
    """What the step θ + length · Γ_i/‖Γ_i‖ on each candidate alone does, beside its exact score at this checkpoint.

    `directions` holds t of each strategy. A candidate whose gradient vanishes raises ValueError: such rows are refused
    when features are made and have no score to compare.
    """
    preconditioner.check(probe.engine.parameter_shapes)
    before, weights = probe.look()
    lengths = {name: norm(vector) for name, vector in directions.items()}
    effects = []
    for position, example in enumerate(examples):
        gradient = probe.engine.weighted_gradient([example], [1.0]).gradient
        step = {name: preconditioner.apply(name, value[None])[0] for name, value in gradient.items()}
        size = norm(step)
        if not (np.isfinite(size) and size > 0):
            raise ValueError(
                f"candidate {position} has a preconditioned gradient of norm {size}: no step can follow it"
            )
        own = {name: {key: value.to(step[key].device) for key, value in t.items()} for name, t in directions.items()}
        cosines = {name: inner(vector, step) / (lengths[name] * size) for name, vector in own.items()}
        with probe.engine.step(step, length / size):
            after, weights_after = probe.look()
        effects.append(CandidateEffect(cosines, after.change(before), flipped_share(weights, weights_after)))
        progress(position + 1)
    return effects


# -- subsets -----------------------------------------------------------------------------------------------------


def subset_outcomes(
    probe: Probe,
    examples: Sequence[Any],
    masks: np.ndarray,
    train: Callable[[Sequence[Any]], None],
    restore: Callable[[], object],
    progress: OnProgress = lambda done: None,
) -> list[Objectives]:
    """What training on each subset (masks bool [M, n] over the examples) changes, always from the same parameters.

    `train(examples)` trains the engine's model in place; `restore()` brings its parameters back.
    """
    restore()
    before, _ = probe.look()
    changes = []
    for position, mask in enumerate(masks):
        try:
            train([examples[row] for row in np.flatnonzero(mask).tolist()])
            changes.append(probe.look()[0].change(before))
        finally:
            restore()
        progress(position + 1)
    return changes
