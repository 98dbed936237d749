"""Splits: redraws of a target's records, so that a comparison does not rest on one draw of targets and held-out
records.

Split 0 is the two files as they are. Every other split is a function of the records and its own number alone.
"""

import hashlib
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

# How records are redrawn.
#   apart     each file by itself: as many records as it has, drawn with replacement (the bootstrap, Efron 1979). What a
#             target file is made of, and what is held out, stay what they are: a noisy target file stays noisy.
#   together  the records of both files are pooled and split again, without replacement: as many as the target
#             file has become targets, the others are held out. Only for two files of one kind.
Redraw = Literal["apart", "together"]


class SplitRecords(NamedTuple):
    """Tokenised records, rows as in the corpus's tables of targets."""

    targets: "pa.Table"
    held_out: "pa.Table"


def redraw(targets: "pa.Table", held_out: "pa.Table", split: int, how: Redraw) -> SplitRecords:
    """Split number `split` of m targets and h held-out records; 0 is these.

    apart: m and h rows, some of them more than once. together: m rows and the rest; a record of both files is
    taken once, as the held-out one, which has the answers. Raises ValueError where that would leave nothing held out,
    or would mix plain records and pairs.
    """
    if split == 0:
        return SplitRecords(targets, held_out)
    if how == "apart":
        return SplitRecords(
            _with_replacement(targets, f"{split}/targets"), _with_replacement(held_out, f"{split}/held out")
        )
    return _split_again(targets, held_out, split)


def _with_replacement(table: "pa.Table", key: str) -> "pa.Table":
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    return table.take(np.sort(np.random.default_rng(seed).integers(table.num_rows, size=table.num_rows)))


def _split_again(targets: "pa.Table", held_out: "pa.Table", split: int) -> SplitRecords:
    import pyarrow as pa

    if len({table["rejected"].null_count < table.num_rows for table in (targets, held_out)}) > 1:
        raise ValueError("one file holds plain records and the other pairs: set experiment.redraw to apart")
    known = set(held_out["conversation_id"].to_pylist())
    only_targets = [at for at, one in enumerate(targets["conversation_id"].to_pylist()) if one not in known]
    records = pa.concat_tables([targets.take(pa.array(only_targets, pa.int64())), held_out])
    if records.num_rows <= targets.num_rows:
        raise ValueError(
            f"{records.num_rows} different records are too few for {targets.num_rows} targets and some held-out "
            "records: add held-out records (eval), or set experiment.redraw to apart"
        )
    # A keyed hash of the record, so that one record more or less changes the place of few others.
    keys = [hashlib.sha256(f"{split}:{one}".encode()).digest() for one in records["id"].to_pylist()]
    order = sorted(range(records.num_rows), key=keys.__getitem__)
    chosen, rest = sorted(order[: targets.num_rows]), sorted(order[targets.num_rows :])
    return SplitRecords(records.take(chosen), records.take(rest))
