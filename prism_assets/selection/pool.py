"""The pool of one state of the index: its rows, read from the lake column by column when they are asked for.

Selections, explanations and trust use this one view.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from prism_assets.errors import LakeError, StageError, UnsuitableSetting
from prism_assets.features.blocks import is_usable, read_blocks
from prism_assets.features.index_parts import IndexedShard, indexed_shards, segment_part
from prism_assets.identity import shard_name
from prism_assets.resources.lake import Artifact

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.resources.index import SegmentedIndex
    from prism_assets.resources.lake import Lake
    from prism_assets.stage import Stage

# Columns of a selection that are those of its candidates.
COPIED = (
    "id",
    "record_id",
    "source",
    "prompt",
    "completion",
    "messages",
    "completion_tokens",
    "input_ids",
    "loss_mask",
)


class Pool:
    """The canonical live rows that can be ranked, in order of shard key and row.

    With `index`, only rows of indexed shards whose gradient was not refused are ranked; without, all canonical rows.
    With `source`, only rows of that source. `canonical` is the number of rows that count, ranked or not.
    Raises UnsuitableSetting where no row has the source, StageError where no row can be ranked, LakeError where
    something that the index lists is not in the lake.
    """

    def __init__(
        self, stage: "Stage", manifest: Artifact, index: Artifact | None = None, source: str | None = None
    ) -> None:
        import numpy as np

        self.stage, self.lake, self.manifest = stage, stage.lake, manifest
        listed = self.lake.read_table(manifest).to_pylist()
        self.fingerprints = {row["shard"]: row["candidates_fingerprint"] for row in listed}
        canonical = {row["shard"]: _canonical(row) for row in listed}
        if source is not None:
            canonical = self._of_source(canonical, source)
        self.canonical = int(sum(mask.sum() for mask in canonical.values()))
        self.segments: list[IndexedShard] = []
        self.refused = 0
        if index is None:
            self.shards, self.allowed = list(canonical), list(canonical.values())
        else:
            self.segments = [one for one in indexed_shards(self.lake, index) if one.shard in canonical]
            self.shards = [one.shard for one in self.segments]
            usable = [usable_rows(self.lake, one) for one in self.segments]
            self.allowed = [canonical[one] & mask for one, mask in zip(self.shards, usable, strict=True)]
            self.refused = sum(
                int((canonical[one] & ~mask).sum()) for one, mask in zip(self.shards, usable, strict=True)
            )
        self.size = int(sum(mask.sum() for mask in self.allowed))
        if not self.size:
            raise StageError(
                "No candidate of the live pool can be ranked"
                + ("." if index is None else ": none has usable features (see the check gradients_usable).")
            )
        self._shard_of = np.repeat(np.arange(len(self.shards)), [mask.sum() for mask in self.allowed])
        self._row_of = np.concatenate([np.flatnonzero(mask) for mask in self.allowed])

    def _of_source(self, canonical: "dict[str, np.ndarray]", source: str) -> "dict[str, np.ndarray]":
        """The masks of the rows that count, cut to those of a source; a row that names none has its file's name."""
        import numpy as np

        found = {}
        for shard, mask in canonical.items():
            named = self.candidates(shard, ["source"])["source"].to_pylist()
            found[shard] = mask & np.array([(one or shard_name(shard)) == source for one in named], dtype=bool)
        if not any(mask.any() for mask in found.values()):
            known = ", ".join(sorted(self.manifest.notes["sources"]))
            raise UnsuitableSetting(f"no candidate that counts has the source {source!r} (mixture); there are {known}")
        return found

    # -- rows --------------------------------------------------------------------------------------------------

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the ranked rows [n]."""
        return self.column("id")["id"].to_pylist()

    def places(self, positions: "np.ndarray") -> list[tuple[str, int]]:
        """Shard and row of positions of the pool."""
        return [
            (self.shards[s], int(r)) for s, r in zip(self._shard_of[positions], self._row_of[positions], strict=True)
        ]

    def position(self, shard: str, row: int) -> int | None:
        """The position of a row of a shard; None where it is not ranked."""
        found = int(self.positions([shard], [row])[0])
        return None if found < 0 else found

    def positions(self, shards: Sequence[str], rows: Sequence[int]) -> "np.ndarray":
        """The position of each row, named by shard and row, int64 [k]; -1 where it is not ranked."""
        import numpy as np

        number = {shard: at for at, shard in enumerate(self.shards)}
        asked: dict[str, list[int]] = {}
        for at, shard in enumerate(shards):
            asked.setdefault(shard, []).append(at)
        found, wanted = np.full(len(rows), -1, np.int64), np.asarray(rows, np.int64)
        for shard in asked.keys() & number.keys():
            its = np.array(asked[shard])
            ranked = np.flatnonzero(self.allowed[number[shard]])
            first = np.searchsorted(self._shard_of, number[shard])
            place = np.searchsorted(ranked, wanted[its])
            known = np.isin(wanted[its], ranked)
            found[its[known]] = first + place[known]
        return found

    def rows_at(self, positions: "np.ndarray", columns: Sequence[str] = COPIED) -> "pa.Table":
        """The candidates at these positions, in this order, with `shard` and `row`; only their shards are read.

        A row that names no source has its file's.
        """
        import numpy as np
        import pyarrow as pa

        places = self.places(positions)
        by_shard: dict[str, list[int]] = {}
        for at, (shard, _) in enumerate(places):
            by_shard.setdefault(shard, []).append(at)
        parts, order = [], []
        for shard, its in by_shard.items():
            parts.append(self.candidates(shard, columns).take([places[at][1] for at in its]))
            order += its
        table = pa.concat_tables(parts).take(np.argsort(order))
        shards = [shard for shard, _ in places]
        if "source" in columns:
            named = [one or shard_name(shard) for one, shard in zip(table["source"].to_pylist(), shards, strict=True)]
            table = table.set_column(table.column_names.index("source"), "source", pa.array(named, pa.string()))
        table = table.append_column("shard", pa.array(shards, pa.string()))
        return table.append_column("row", pa.array([row for _, row in places], pa.int64()))

    def column(self, *names: str) -> "pa.Table":
        """Columns of all ranked rows."""
        import pyarrow as pa

        return pa.concat_tables(
            [self.candidates(shard, names).filter(mask) for shard, mask in zip(self.shards, self.allowed, strict=True)]
        )

    def candidates(self, shard: str, columns: Sequence[str]) -> "pa.Table":
        """All rows of a shard, also those that do not count."""
        return self.lake.read_table(self.candidates_of(shard), list(columns))

    def candidates_of(self, shard: str) -> Artifact:
        """The artefact of a shard's rows, also of one that is not indexed. Raises LakeError where it is gone."""
        found = self.lake.get("candidates", self.fingerprints[shard])
        if found is None:
            raise LakeError(f"The rows of shard {shard} are not in the lake any more: run `prism run`.")
        return found

    # -- the index ---------------------------------------------------------------------------------------------

    @cached_property
    def opened(self) -> "SegmentedIndex":
        """The segments of all indexed shards, memory-mapped."""
        return self.stage.index.open([segment_part(self.lake, one) for one in self.segments])

    def scores(self, query: "np.ndarray", remember: bool = True) -> "np.ndarray":
        """Inner products of a query with every row's stored features, float32 [n].

        A score that was computed once is remembered: it depends on the row and the query alone, so a shard that arrives
        costs the scan of its own segment and no other. `remember` False reads and writes nothing but the index.
        """
        import numpy as np

        if remember:
            found = self.shard_scores(query)
        else:
            found = dict(zip(self.shards, self.opened.scores(query), strict=True))
        return np.concatenate([found[one.shard][mask] for one, mask in zip(self.segments, self.allowed, strict=True)])

    def influence(self, query: "np.ndarray", remember: bool = True) -> "np.ndarray":
        """The influence of every row along a query, float32 [n]: inner products with stored unit rows, each multiplied
        with what `selection.row_scale` makes of its length. No row is computed again."""
        import numpy as np

        from prism_assets.selection.direction import row_factors

        scale = self.stage.settings.selection.row_scale
        if scale == "unit":
            return self.scores(query, remember)
        tokens = self.column("completion_tokens")["completion_tokens"].to_numpy()
        factors = row_factors(scale, np.array(self.stored("norm")), tokens)
        found = np.zeros(self.size)
        for checkpoint, factor in enumerate(factors.T):
            block = np.zeros((factors.shape[1], len(query) // factors.shape[1]), np.float32)
            block[checkpoint] = query.reshape(block.shape)[checkpoint]
            found += factor * self.scores(block.reshape(-1), remember)
        return found.astype(np.float32)

    def stored(self, name: str) -> list[list[float]]:
        """A column of the stored features of all ranked rows: a number for each checkpoint."""
        found = []
        for segment, mask in zip(self.segments, self.allowed, strict=True):
            features = self.lake.get("candidate_features", segment.features)
            assert features is not None, segment  # the pool was opened with it
            values = read_blocks(self.lake, features, [name])[name].to_pylist()
            found += [one for one, ranked in zip(values, mask, strict=True) if ranked]
        return found

    def shard_scores(self, query: "np.ndarray") -> "Mapping[str, np.ndarray]":
        """Inner products of a query with every row of every indexed shard, float32 [rows of the shard]."""
        import numpy as np

        asked = f"scores/{hashlib.sha256(query.astype(np.float32).tobytes()).hexdigest()[:32]}"
        names = [f"{asked}/{one.features}" for one in self.segments]
        remembered = [self.lake.recall(name) for name in names]
        scores = [
            np.frombuffer(data, np.float32) if data is not None and len(data) == 4 * one.rows else None
            for one, data in zip(self.segments, remembered, strict=True)
        ]
        new = [position for position, one in enumerate(scores) if one is None]
        parts = [segment_part(self.lake, self.segments[position]) for position in new]
        for position, computed in zip(new, self.stage.index.open(parts).scores(query) if parts else [], strict=True):
            scores[position] = computed
            self.lake.remember(names[position], computed.tobytes())
        return {one.shard: scored for one, scored in zip(self.segments, scores, strict=True) if scored is not None}

    def top(self, query: "np.ndarray", k: int) -> "tuple[np.ndarray, np.ndarray]":
        """Positions, ascending, and scores of the k rows of highest inner product, and of all that tie with the k-th,
        as the index finds them (on a GPU where the store is on one). Bit for bit those of `scores`; nothing is
        remembered.
        """
        import numpy as np

        found = self.opened.top_k(query, k, self.allowed, with_ties=True)
        place = [np.cumsum(mask) - 1 for mask in self.allowed]  # of each row among the shard's ranked ones
        start = np.cumsum([0, *(mask.sum() for mask in self.allowed)])
        positions = [
            start[segment] + place[segment][row] for segment, row in zip(found.segment, found.row, strict=True)
        ]
        order = np.argsort(positions)
        return np.array(positions, dtype=np.int64)[order], found.scores[order]

    def stored_vectors(self, positions: "np.ndarray") -> "np.ndarray":
        """Stored gradient features of the rows at these positions, float32 [k, C·K], read from the index row by row."""
        import numpy as np

        shards, rows = self._shard_of[positions], self._row_of[positions]
        present = np.unique(shards)
        index = self.stage.index.open([segment_part(self.lake, self.segments[shard]) for shard in present])
        assert index.dim is not None
        found = np.empty((len(positions), index.dim), np.float32)
        for part, shard in enumerate(present):
            found[shards == shard] = index.vectors(part, rows[shards == shard])
        return found


def indexed_pool(stage: "Stage", version: str | None = None, source: str | None = None) -> Pool:
    """The pool that the index of a feature version (default: today's) was reconciled with, or its rows of a source.

    Raises LakeError where the version has no index, or something of it is not in the lake any more.
    """
    index = stage.lake.require("candidate_index", None, version or stage.feature_version)
    manifest = stage.lake.get("live_pool", index.notes["pool"])
    if manifest is None:
        raise LakeError(f"The manifest of index {index.fingerprint} is not in the lake any more: run `prism run`.")
    return Pool(stage, manifest, index, source)


def usable_rows(lake: "Lake", segment: IndexedShard) -> "np.ndarray":
    """The mask [n] of an index segment's rows whose gradient was not refused. Raises LakeError for lost features."""
    import numpy as np

    features = lake.get("candidate_features", segment.features)
    if features is None:
        raise LakeError(
            f"Shard {segment.shard} lost its features: materialise candidate_features[{segment.shard}] and "
            "candidate_index again, or run `prism run`."
        )
    if not features.notes["refused"]:
        return np.ones(segment.rows, dtype=bool)
    return is_usable(read_blocks(lake, features, ["refused"]))


def _canonical(row: Mapping) -> "np.ndarray":
    """The mask [n] of the rows of a manifest's shard that count."""
    import numpy as np

    mask = np.ones(row["rows"], dtype=bool)
    mask[row["excluded_rows"]] = False
    return mask
