"""How many records of a target or held-out file are used, and which `tokenization.max_length` would keep more of them.

A record that is a duplicate of another is no loss, and is not counted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.corpus.files import DUPLICATE_OF, read_examples
from prism_assets.corpus.limits import Limits
from prism_assets.corpus.template import Untokenizable

if TYPE_CHECKING:
    from prism_assets.corpus.encoder import Encoder
    from prism_assets.corpus.records import Kind

MOST = 0.9  # the share of records that `keeps_most` is about


class TargetFit(NamedTuple):
    """The records of one file under a tokenizer and a `max_length`."""

    given: int  # records, duplicates left out
    used: int  # those that are not rejected
    # The smallest max_length that keeps every record that length alone rejects, and the one that keeps 90% of those
    # given; None where too many are rejected for something else.
    keeps_all: int | None
    keeps_most: int | None
    first: str  # line and reason of the first rejected record; empty where none is

    @property
    def rejected(self) -> int:
        """Records that are not used."""
        return self.given - self.used

    def too_few(self, max_rejected: float) -> bool:
        """Whether more than this share is rejected."""
        return self.rejected > max_rejected * self.given

    def lost(self, max_length: int, context: int | None = None) -> str:
        """How many records are not used, why, and what `max_length` keeps them; empty where all are used."""
        if not self.rejected:
            return ""
        words = f"{self.given} given, {self.used} used; the first that is not: {self.first}"
        advice = self.advice(max_length, context)
        return f"{words}. {advice}" if advice else words

    def advice(self, max_length: int, context: int | None = None) -> str:
        """What `max_length` keeps more records; empty where none does. `context`: tokens that the model can read."""
        # Where one length is both, it keeps all.
        lengths = {self.keeps_most: f"{MOST:.0%} of the records", self.keeps_all: "every record that is too long"}
        found = [(length, what) for length, what in lengths.items() if length is not None and length > max_length]
        if not found:
            return ""
        words = " and ".join(f"{length:,} keeps {what}" for length, what in found)
        beyond = context is not None and any(length > context for length, _ in found)
        limit = f" (the model reads {context:,} tokens at most)" if beyond else ""
        return f"tokenization.max_length {words}{limit}"


def target_fit(
    path: Path,
    kind: "Kind",
    encoder: "Encoder",
    *,
    mixed: bool = False,
    limits: Limits = Limits(),
    columns: Mapping[str, str] | None = None,
) -> TargetFit:
    """Read and tokenise a file. Raises UnreadableFile and, unless it may be `mixed`, MixedTargets."""
    examples, rejects = read_examples(path, kind, mixed=mixed, limits=limits, columns=columns)
    needed: list[int] = []
    lost = [(one.line, one.reason) for one in rejects if not _is_duplicate(one.reason)]
    for example in examples:
        try:
            needed.append(encoder.least_length(example.messages, example.rejected))
        except Untokenizable as error:
            lost.append((example.line, error.reason))
            continue
        if needed[-1] > encoder.max_length:
            reason = f"needs {needed[-1]:,} tokens and max_length is {encoder.max_length:,}"
            lost.append((example.line, reason))
    given = len(examples) + sum(not _is_duplicate(one.reason) for one in rejects)
    used = sum(length <= encoder.max_length for length in needed)
    first = "line {}: {}".format(*min(lost)) if lost else ""
    return TargetFit(given, used, max(needed, default=None), _length_for(needed, math.ceil(MOST * given)), first)


def _length_for(needed: Sequence[int], records: int) -> int | None:
    """The smallest length that is enough for so many records."""
    return sorted(needed)[records - 1] if 0 < records <= len(needed) else None


def given_records(accepted: int, rejects: Iterable[dict[str, Any]]) -> int:
    """The records of a file, duplicates left out, from its table of rejects."""
    return accepted + sum(not _is_duplicate(one["reason"]) for one in rejects)


def _is_duplicate(reason: str) -> bool:
    return reason.startswith(DUPLICATE_OF)
