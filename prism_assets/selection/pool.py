"""A door: the live pool as strategies see it, read from the lake column by column when it is asked for."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import dagster as dg

from prism_assets.corpus.assets import shard_name
from prism_assets.features.assets import IndexedShard, indexed_shards, read_blocks, segment_part
from prism_assets.selection.strategies.base import TargetScores, Texts
from resources.lake import Artifact, Lake
from resources.vector_store import VectorStore

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.representations import Representations

# Columns of a selection that are those of its candidates.
COPIED = ("id", "record_id", "source", "prompt", "completion", "messages", "completion_tokens", "input_ids", "loss_mask")


class LivePool:
    """The canonical live rows that can be ranked, in order of shard key and row. Implements `strategies.base.Pool`.

    With `index`, only rows of indexed shards whose gradient was not refused are ranked. What stands behind it is needed
    by the methods that read it.
    Raises dagster.Failure where no row can be ranked, or something that the index lists is not in the lake.
    """

    def __init__(
        self,
        lake: Lake,
        manifest: Artifact,
        *,
        seed: int = 0,
        wanted: int = 0,
        store: VectorStore | None = None,
        index: Artifact | None = None,
        targets: Artifact | None = None,
        target_features: Artifact | None = None,
        direction_query: "Callable[[], np.ndarray] | None" = None,
        target_scores: Callable[[], "tuple[TargetScores, np.ndarray]"] | None = None,
        learning_rates: Sequence[float] = (),
        representations: "Representations | None" = None,
    ) -> None:
        import numpy as np

        self.lake, self.manifest, self.store = lake, manifest, store
        self.seed, self.wanted = seed, wanted
        self._targets, self._target_features = targets, target_features
        self._direction_query = direction_query
        self._target_scores, self._rates, self._representations = target_scores, learning_rates, representations
        columns = lake.read_table(manifest, ["shard", "candidates_fingerprint"]).to_pydict()
        self.fingerprints = dict(zip(columns["shard"], columns["candidates_fingerprint"], strict=True))
        canonical = _canonical_rows(lake, manifest)
        self.segments: list[IndexedShard] = []
        self.refused = 0
        if index is None:
            self.shards, self.allowed = list(canonical), list(canonical.values())
        else:
            self.segments = [one for one in indexed_shards(lake, index) if one.shard in canonical]
            self.shards = [one.shard for one in self.segments]
            usable = [usable_rows(lake, one) for one in self.segments]
            self.allowed = [canonical[one] & mask for one, mask in zip(self.shards, usable, strict=True)]
            self.refused = sum(
                int((canonical[one] & ~mask).sum()) for one, mask in zip(self.shards, usable, strict=True)
            )
        self.size = int(sum(mask.sum() for mask in self.allowed))
        if not self.size:
            raise dg.Failure(
                "No candidate of the live pool can be ranked"
                + ("." if index is None else ": none has usable features.")
            )
        self._shard_of = np.repeat(np.arange(len(self.shards)), [mask.sum() for mask in self.allowed])
        self._row_of = np.concatenate([np.flatnonzero(mask) for mask in self.allowed])

    # -- what strategies may look at ---------------------------------------------------------------------------

    @cached_property
    def ids(self) -> list[str]:
        return self._column("id")["id"].to_pylist()

    @cached_property
    def completion_tokens(self) -> "np.ndarray":
        return self._column("completion_tokens")["completion_tokens"].to_numpy()

    def texts(self) -> Texts:
        table = self._column("prompt", "completion")
        return Texts(table["prompt"].to_pylist(), table["completion"].to_pylist())

    def target_texts(self) -> Texts:
        table = self.lake.read_table(self._targets, ["prompt", "completion"])
        return Texts(table["prompt"].to_pylist(), table["completion"].to_pylist())

    def mean_log_probs(self) -> "np.ndarray":
        import numpy as np

        parts = []
        for one, mask in zip(self.segments, self.allowed, strict=True):
            stored = read_blocks(self.lake, self.lake.get("candidate_features", one.features), ["mean_log_prob"])
            parts.append(np.array([values[-1] for values in stored["mean_log_prob"].to_pylist()])[mask])
        return np.concatenate(parts)

    def direction_scores(self) -> "np.ndarray":
        return self.scores(self._direction_query())

    def vectors(self, positions: "np.ndarray") -> "np.ndarray":
        """Stored gradient features of the rows at these positions, float32 [k, C·K], read from the index row by row.

        Checkpoint k's block is scaled by √(η̄_k/Ση̄), so that an inner product of two rows is their mean cosine over
        checkpoints, weighted as influences are, up to the error of the sketch.
        """
        import numpy as np

        from prism_assets.selection.direction import relative_rates

        shards, rows = self._shard_of[positions], self._row_of[positions]
        present = np.unique(shards)
        index = self.store.open([segment_part(self.lake, self.segments[shard]) for shard in present])
        found = np.empty((len(positions), index.dim), np.float32)
        for part, shard in enumerate(present):
            found[shards == shard] = index.vectors(part, rows[shards == shard])
        scale = np.sqrt(relative_rates(self._rates)).astype(np.float32)
        return (found.reshape(len(found), len(scale), -1) * scale[:, None]).reshape(found.shape)

    def influences(self) -> "np.ndarray":
        """Mean cosine of each row with the raw gradient of each usable target, float32 [n, m'] (checkpoints weighted by
        learning rate), from the sketches."""
        import numpy as np

        from prism_assets.selection.direction import query_vector

        scores, usable = self._target_scores()
        sketches = self.lake.read_table(self._target_features, ["sketch"])["sketch"].combine_chunks()
        checkpoints = len(scores.norms)
        flat = sketches.flatten().to_numpy().reshape(len(sketches), checkpoints, -1)[usable]
        queries = np.stack(
            [query_vector(list(flat[j]), scores.norms[:, j], self._rates) for j in range(len(flat))]
        )
        return np.stack([self.scores(query) for query in queries], axis=1)

    def target_scores(self) -> TargetScores:
        return self._target_scores()[0]

    def target_groups(self) -> list[str]:
        _, usable = self._target_scores()
        return [one or "" for one in self.lake.read_table(self._targets, ["group"])["group"].take(usable).to_pylist()]

    def similarities(self) -> "np.ndarray":
        """Cosine of the hidden states of each row with those of each target, float32 [n, m], block by block: a row's do
        not depend on what else is in the pool."""
        import numpy as np

        states = self._representations
        candidates = [self.lake.get("candidates", self.fingerprints[shard]) for shard in self.shards]
        *blocks, targets = states.of([*candidates, self._targets])
        towards = np.concatenate([states.read(block) for block in targets]).T
        parts = [
            np.concatenate([states.read(block) @ towards for block in its])[mask]
            for its, mask in zip(blocks, self.allowed, strict=True)
            if its
        ]
        return np.concatenate(parts)

    # -- what the doors read -----------------------------------------------------------------------------------

    def scores(self, query: "np.ndarray") -> "np.ndarray":
        """Inner products of a query with every row's stored features, float32 [n].

        A score that was computed once is remembered: it depends on the row and the query alone, so a shard that arrives
        costs the scan of its own segment and no other.
        """
        import numpy as np

        found = self.shard_scores(query)
        return np.concatenate([found[one.shard][mask] for one, mask in zip(self.segments, self.allowed, strict=True)])

    def top(self, query: "np.ndarray", k: int) -> "tuple[np.ndarray, np.ndarray]":
        """Positions and scores of the k rows of highest inner product, and of all that tie with the k-th, as the index
        answers them (on a GPU where the store is on one). Bit for bit those of `scores`; nothing is remembered."""
        import numpy as np

        index = self.store.open([segment_part(self.lake, one) for one in self.segments])
        found = index.top_k(query, k, self.allowed, with_ties=True)
        place = [np.cumsum(mask) - 1 for mask in self.allowed]  # of each row among the shard's ranked ones
        start = np.cumsum([0, *(mask.sum() for mask in self.allowed)])
        positions = [start[segment] + place[segment][row] for segment, row in zip(found.segment, found.row, strict=True)]
        order = np.argsort(positions)
        return np.array(positions, dtype=np.int64)[order], found.scores[order]

    def shard_scores(self, query: "np.ndarray") -> "dict[str, np.ndarray]":
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
        for position, computed in zip(new, self.store.open(parts).scores(query) if parts else [], strict=True):
            scores[position] = computed
            self.lake.remember(names[position], computed.tobytes())
        return {one.shard: scored for one, scored in zip(self.segments, scores, strict=True)}

    def places(self, positions: "np.ndarray") -> list[tuple[str, int]]:
        """Shard and row of positions of the pool."""
        return [(self.shards[s], int(r)) for s, r in zip(self._shard_of[positions], self._row_of[positions], strict=True)]

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

    def _column(self, *names: str) -> "pa.Table":
        import pyarrow as pa

        return pa.concat_tables(
            [self.candidates(shard, names).filter(mask) for shard, mask in zip(self.shards, self.allowed, strict=True)]
        )

    def candidates(self, shard: str, columns: Sequence[str]) -> "pa.Table":
        """All rows of a shard, also those that do not count."""
        return self.lake.read_table(self.lake.get("candidates", self.fingerprints[shard]), list(columns))


def _canonical_rows(lake: Lake, manifest: Artifact) -> "dict[str, np.ndarray]":
    """Per shard the mask [n] of rows that count."""
    import numpy as np

    masks = {}
    for row in lake.read_table(manifest).to_pylist():
        masks[row["shard"]] = mask = np.ones(row["rows"], dtype=bool)
        mask[row["excluded_rows"]] = False
    return masks


def usable_rows(lake: Lake, segment: IndexedShard) -> "np.ndarray":
    """The mask [n] of the rows of an index segment whose gradient was not refused."""
    import numpy as np

    features = lake.get("candidate_features", segment.features)
    if features is None:
        raise dg.Failure(
            f"Shard {segment.shard} lost its features: materialise candidate_features[{segment.shard}] and "
            "candidate_index again."
        )
    if not features.notes["refused"]:
        return np.ones(segment.rows, dtype=bool)
    return np.array([reason is None for reason in read_blocks(lake, features, ["refused"])["refused"].to_pylist()])


def learning_rates(warmup: Artifact) -> list[float]:
    """The mean learning rate of each checkpoint of a warm-up."""
    entries: list[dict[str, Any]] = json.loads((warmup.path / "checkpoints.json").read_text())
    return [one["mean_learning_rate"] for one in entries]
