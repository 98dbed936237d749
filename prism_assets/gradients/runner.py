"""Runs an engine's batches so that they fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

from prism_assets.errors import TooLittleMemory
from prism_assets.gradients.batching import Tokenized, default_token_budget, plan_batches, tokens_read
from prism_assets.gradients.memory import (
    TRIMMED_BYTES,
    Activations,
    MemoryLimit,
    halves,
    is_out_of_memory,
    release_memory,
    trim_heap,
)

Result = TypeVar("Result")
Run = Callable[[list[int], bool], Result]  # (positions of a batch's examples, whether to recompute activations)


class Need(NamedTuple):
    """Bytes that gradient passes take beside model and results."""

    planned: float  # of the largest batch, run as it is planned
    least: float  # of the longest example alone, with everything recomputed that may be


class BatchRunner:
    """Plans batches under a token budget, and halves or recomputes those that need more memory than there is.

    recompute: always (True), never (False), or (None) for an example that is alone in its batch and either has more
    tokens than the budget, so that no pass keeps more than a batch of the budget does, or would not fit otherwise.
    `measure` says what a pass keeps; it is asked once. What ran out of memory in spite of the plan is
    remembered, and later batches keep to the size that fitted.
    """

    def __init__(
        self,
        memory: MemoryLimit,
        token_budget: int | None,
        recompute: bool | None,
        measure: Callable[[], Activations],
    ) -> None:
        self.memory, self.device = memory, memory.device
        self.token_budget = default_token_budget(self.device) if token_budget is None else int(token_budget)
        if self.token_budget < 1:
            raise ValueError(f"token_budget must be positive, not {token_budget}")
        self.recompute = recompute
        self._measure = measure
        self._fits_tokens: int | None = None  # padded tokens of a batch of several examples
        self._fits_kept: int | None = None  # tokens of an example that keeps its activations

    def run(self, examples: Sequence[Tokenized], run_batch: Run[Result], backward: bool) -> Iterator[Result]:
        """What `run_batch` gives, batch by batch. Raises MemoryError, naming the example, for one that does not fit."""
        pending = list(reversed(plan_batches([tokens_read(example) for example in examples], self.token_budget)))
        while pending:
            positions = pending.pop()
            width = tokens_read(examples[positions[0]])
            recompute = self._recomputes(positions, width) if backward else False
            if recompute is None or (len(positions) > 1 and _exceeds(len(positions) * width, self._fits_tokens)):
                pending += halves(positions)
                continue
            try:
                result = run_batch(positions, recompute)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                result = None
            if result is not None:
                if backward and self.device.type == "cpu":
                    self._trim(len(positions), width, recompute)
                yield result
                continue
            release_memory(self.device)
            if len(positions) > 1:
                self._fits_tokens = len(positions) * width // 2
                pending += halves(positions)
            elif backward and not recompute and self.recompute is None and self._activations.layers:
                self._fits_kept = width - 1
                pending.append(positions)
            else:
                raise self._too_long(positions[0], width)

    def need(self, lengths: Sequence[int]) -> Need:
        """What gradient passes over examples of these lengths (`tokens_read`) take. Between the two figures batches
        are halved and activations recomputed as memory asks for it."""
        batches = [(len(batch), lengths[batch[0]]) for batch in plan_batches(lengths, self.token_budget)]
        keeps = self._activations
        planned = (keeps.needed(count, width, self._is_planned_recomputed(count, width)) for count, width in batches)
        least = keeps.needed(1, max(lengths, default=1), self.recompute is not False)
        return Need(max(planned, default=least), least)

    @cached_property
    def _activations(self) -> Activations:
        return self._measure()

    def _recomputes(self, positions: list[int], width: int) -> bool | None:
        """Whether a batch must recompute its activations to fit; None for a batch that must be halved."""
        count = len(positions)
        free_to_choose = self.recompute is None and self._activations.layers > 0
        recompute = self._is_planned_recomputed(count, width) or (
            free_to_choose and count == 1 and _exceeds(width, self._fits_kept)
        )
        if self.memory.fits(self._activations.needed(count, width, recompute)):
            return recompute
        if count > 1:
            return None
        needed = self._activations.needed(1, width, recompute=recompute or free_to_choose)
        if free_to_choose and self.memory.fits(needed):
            return True
        raise self._too_long(positions[0], width, needed)

    def _trim(self, count: int, width: int, recompute: bool) -> None:
        if self._activations.needed(count, width, recompute) > TRIMMED_BYTES:
            trim_heap()

    def _is_planned_recomputed(self, count: int, width: int) -> bool:
        """Whether a batch recomputes its activations even where memory would do."""
        if self.recompute is None:
            return self._activations.layers > 0 and count == 1 and width > self.token_budget
        return self.recompute

    def _too_long(self, position: int, width: int, needed: float | None = None) -> TooLittleMemory:
        free = max(self.memory.free(), 0)
        figures = f": it needs about {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are left" if needed else ""
        return TooLittleMemory(
            f"example {position} alone ({width} tokens) does not fit the memory of {self.device}{figures}. Raise "
            "execution.memory, lower tokenization.max_length, or load the model in bfloat16 (model.dtype)"
        )


def _exceeds(tokens: int, limit: int | None) -> bool:
    return limit is not None and tokens > limit
