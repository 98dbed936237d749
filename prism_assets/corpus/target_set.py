"""Target examples as tokenised examples with signs: plain completions, or pairs of a wanted and an unwanted one."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


class TargetSet(NamedTuple):
    """The m examples of one target with signs: a pair is its wanted completion minus its unwanted one."""

    examples: list  # TokenizedExample [m] or [2m]: all wanted, then all unwanted
    size: int  # m
    pairs: bool

    def expand(self, weights: np.ndarray) -> np.ndarray:
        """Coefficients of the tokenised examples [m or 2m] for weights of the target examples [m]."""
        return np.concatenate([weights, -weights]) if self.pairs else weights

    def scores(self, mean_log_probs: np.ndarray) -> np.ndarray:
        """Preference scores [m] from the mean log-probabilities of the tokenised examples [m or 2m]."""
        if not self.pairs:
            return mean_log_probs
        return mean_log_probs[: self.size] - mean_log_probs[self.size :]

    def target(self, position: int) -> "TargetSet":
        """The set that holds one target example."""
        rows = [position, self.size + position] if self.pairs else [position]
        return TargetSet([self.examples[row] for row in rows], 1, self.pairs)


def target_set(targets: "pa.Table") -> TargetSet:
    """The tokenised target examples of a table, plain or pairs."""
    from prism_assets.corpus.token_tables import from_table, rejected_from_table

    examples = from_table(targets)
    pairs = targets["rejected"].null_count < targets.num_rows
    if pairs:
        examples = [*examples, *rejected_from_table(targets)]
    return TargetSet(examples, targets.num_rows, pairs)
