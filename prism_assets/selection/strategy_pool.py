"""The pool as strategies see it: candidates and targets, read when a strategy asks for them."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from prism_assets.reference.checkpoints import learning_rates
from prism_assets.resources.lake import Artifact
from prism_assets.selection.direction_artifacts import load_query
from prism_assets.selection.pool import Pool
from prism_assets.selection.strategies.base import TargetScores, Texts
from prism_assets.selection.target_scores import scores_of

if TYPE_CHECKING:
    import numpy as np

    from prism_assets.selection.representations import Representations
    from prism_assets.stage import Stage


class StrategyPool(Pool):
    """Implements `strategies.base.PoolView` over the inputs of a selection, by name.

    Inputs: `pool`, and where a strategy reads them `index`, `targets`, `target_features`, `direction` and `warmup`.
    """

    def __init__(
        self,
        stage: "Stage",
        inputs: Mapping[str, Artifact],
        wanted: int = 0,
        representations: "Representations | None" = None,
        source: str | None = None,
    ) -> None:
        super().__init__(stage, inputs["pool"], inputs.get("index"), source)
        self.inputs, self.wanted = inputs, wanted
        self.seed = stage.settings.selection.seed
        self._representations = representations

    @cached_property
    def completion_tokens(self) -> "np.ndarray":
        """Supervised tokens of each ranked row, int32 [n]."""
        return self.column("completion_tokens")["completion_tokens"].to_numpy()

    def texts(self) -> Texts:
        """Prompts and completions of the ranked rows [n]."""
        table = self.column("prompt", "completion")
        return Texts(table["prompt"].to_pylist(), table["completion"].to_pylist())

    def target_texts(self) -> Texts:
        """Prompts and completions of the target examples [m]; of pairs the wanted completions."""
        table = self.lake.read_table(self.inputs["targets"], ["prompt", "completion"])
        return Texts(table["prompt"].to_pylist(), table["completion"].to_pylist())

    def mean_log_probs(self) -> "np.ndarray":
        """Mean log-probability of each ranked row at the last checkpoint, float64 [n], nats per token."""
        import numpy as np

        return np.array([values[-1] for values in self.stored("mean_log_prob")])

    def direction_scores(self) -> "np.ndarray":
        """Influence of each ranked row by PRISM's direction, float32 [n]."""
        return self.influence(load_query(self.lake, self.inputs["direction"]))

    def vectors(self, positions: "np.ndarray") -> "np.ndarray":
        """Stored gradient features of the rows at these positions, float32 [k, C·K].

        Checkpoint k's block is scaled by √(η̄_k/Ση̄), so that an inner product of two rows is their mean cosine over
        checkpoints, weighted as influences are, up to the error of the sketch.
        """
        import numpy as np

        from prism_assets.selection.direction import relative_rates

        found = self.stored_vectors(positions)
        scale = np.sqrt(relative_rates(self._rates)).astype(np.float32)
        return (found.reshape(len(found), len(scale), -1) * scale[:, None]).reshape(found.shape)

    def influences(self) -> "np.ndarray":
        """Mean cosine of each row with the raw gradient of each usable target, float32 [n, m'] (checkpoints weighted by
        learning rate), from the sketches."""
        import numpy as np

        from prism_assets.selection.direction import query_vector

        scores, usable = self._scores
        sketches = self.lake.read_table(self.inputs["target_features"], ["sketch"])["sketch"].combine_chunks()
        checkpoints = len(scores.norms)
        flat = sketches.flatten().to_numpy().reshape(len(sketches), checkpoints, -1)[usable]
        queries = np.stack([query_vector(list(flat[j]), scores.norms[:, j], self._rates) for j in range(len(flat))])
        return np.stack([self.scores(query) for query in queries], axis=1)

    def target_scores(self) -> TargetScores:
        """Scores and gradient norms [C, m'] of the usable target examples."""
        return self._scores[0]

    def target_groups(self) -> list[str]:
        """The subtask of each usable target example [m']; empty where it has none."""
        _, usable = self._scores
        groups = self.lake.read_table(self.inputs["targets"], ["group"])["group"].take(usable)
        return [one or "" for one in groups.to_pylist()]

    def similarities(self) -> "np.ndarray":
        """Cosine of the hidden states of each row with those of each target, float32 [n, m], block by block: a row's do
        not depend on what else is in the pool."""
        import numpy as np

        states = self._representations
        assert states is not None, "a ranking by hidden states is given `Representations`"
        candidates = [self.candidates_of(shard) for shard in self.shards]
        *blocks, targets = states.of([*candidates, self.inputs["targets"]])
        towards = np.concatenate([states.read(block) for block in targets]).T
        parts = [
            np.concatenate([states.read(block) @ towards for block in its])[mask]
            for its, mask in zip(blocks, self.allowed, strict=True)
            if its
        ]
        return np.concatenate(parts)

    @cached_property
    def _scores(self) -> "tuple[TargetScores, np.ndarray]":
        return target_scores_of(self.stage, self.inputs)

    @cached_property
    def _rates(self) -> list[float]:
        return learning_rates(self.lake.local(self.inputs["warmup"]))


def target_scores_of(stage: "Stage", inputs: Mapping[str, Artifact]) -> "tuple[TargetScores, np.ndarray]":
    """What a weighting may look at, and the positions of the usable targets, from a selection's inputs."""
    features, targets = (stage.lake.read_table(inputs[name]) for name in ("target_features", "targets"))
    return scores_of(stage.settings, features, targets)
