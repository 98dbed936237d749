"""`prism explain`: reads what the lake holds of a candidate and hands it to `selection.explain`.

Nothing is computed again: scores come from the stored index, directions and target sketches. The exception is the
exact score, a gradient of the one candidate per checkpoint, which shows what the sketch cost.
"""

import difflib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.features.assets import (
    GradientPass,
    IndexedShard,
    feature_version,
    indexed_shards,
    read_blocks,
    segment_part,
    vectors_of,
)
from prism_assets.housekeeping import feature_versions
from prism_assets.reference.assets import warmup_scope
from prism_assets.selection.assets import direction_scope, join_key, load_direction
from prism_assets.selection.pool import learning_rates
from prism_assets.selection.target_direction import as_made, scores_of, tokens_counted
from prism_assets.settings import Settings
from resources.lake import Artifact, Lake, LakeError
from resources.language_model import LanguageModel, ModelError
from resources.vector_store import VectorStore

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from prism_assets.selection.explain import Contributions, Earlier, Explanation, Neighbour, Rank
    from prism_assets.selection.rerank import ExactScores
    from resources.vector_store import SegmentedIndex

SHORTEST_PREFIX = 4
# Above so many ids, near matches are looked for among those that begin alike.
_COMPARED = 20_000


class CannotExplain(Exception):
    """The candidate is unknown, ambiguous or has no score; the message says why."""


class Place(NamedTuple):
    """A row of the live pool."""

    shard: str
    row: int
    id: str
    record_id: str | None
    excluded: str | None  # duplicate or contamination


@dataclass(frozen=True)
class IndexState:
    """The index of one feature version with the pool it was reconciled with, opened but not read."""

    version: str
    pool: Artifact
    shards: list[IndexedShard]  # rows of candidate_index that are in the pool
    found: "SegmentedIndex"
    usable: "list[np.ndarray]"  # per shard, bool [n]: canonical and not refused
    ids: "list[np.ndarray]"  # per shard, [n]

    def position(self, shard: str) -> int | None:
        """Where a shard stands among `shards`."""
        return next((i for i, one in enumerate(self.shards) if one.shard == shard), None)

    @property
    def ranked(self) -> int:
        """How many rows are ranked."""
        return int(sum(mask.sum() for mask in self.usable))


def open_index(lake: Lake, store: VectorStore, version: str) -> IndexState:
    """The index of a feature version. Raises LakeError where it, or something it lists, is not in the lake."""
    import numpy as np

    index = lake.require("candidate_index", None, version)
    pool = lake.get("live_pool", index.notes["pool"])
    if pool is None:
        raise LakeError(f"The manifest of index {index.fingerprint} is not in the lake any more: run `prism run`.")
    excluded = {row["shard"]: row["excluded_rows"] for row in lake.read_table(pool).to_pylist()}
    shards = [one for one in indexed_shards(lake, index) if one.shard in excluded]
    parts, usable, ids = [], [], []
    for one in shards:
        features = lake.get("candidate_features", one.features)
        if features is None:
            raise LakeError(f"Shard {one.shard} lost its features: run `prism run`.")
        columns = read_blocks(lake, features, ["id", "refused"])
        mask = np.array([reason is None for reason in columns["refused"].to_pylist()], dtype=bool)
        mask[excluded[one.shard]] = False
        parts.append(segment_part(lake, one))
        usable.append(mask)
        ids.append(np.array(columns["id"].to_pylist(), dtype=object))
    return IndexState(version, pool, shards, store.open(parts), usable, ids)


class Explainer:
    """Explains candidates for one target and strategy; what they share is read once.

    A context manager: the model that the exact score needs stays adapted until it ends, so open one at a time.
    `exact` None computes the exact score where the model can be loaded; True insists on it (ModelError says why it cannot
    be), False leaves it out.
    """

    def __init__(
        self,
        settings: Settings,
        lake: Lake,
        model: LanguageModel,
        store: VectorStore,
        *,
        target: str,
        strategy: str = "prism",
        exact: bool | None = None,
    ) -> None:
        self.settings, self.lake, self.model, self.store = settings, lake, model, store
        self.target, self.strategy, self.exact = target, strategy, exact
        self._pass: GradientPass | None = None
        self._scorer: ExactScores | None = None
        self.version, self._no_model = self._current_version()
        self.index = open_index(lake, store, self.version)
        self.places = list(_places(lake, self.index.pool))
        self.direction = self._direction(strategy)
        self.table, self.target_weights, self.rates = self._target_side()

    def __enter__(self) -> "Explainer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pass is not None:
            self._pass.close()

    def explain(self, example: str, neighbours: int = 5) -> "Explanation":
        """Everything about one candidate, named by id (4 digits or more of it) or record id.

        Raises CannotExplain for one that is unknown, ambiguous, excluded or refused.
        """
        import numpy as np

        from prism_assets.selection.explain import Explanation, TargetPart

        place, notes = self._find(example)
        position = self.index.position(place.shard)
        if position is None:
            raise CannotExplain(
                f"{place.id}: shard {place.shard} is not in the index of version {self.version} yet: run `prism run`."
            )
        stored = self._stored_row(place)
        if stored["refused"] is not None:
            raise CannotExplain(
                f"{place.id} (shard {place.shard}, row {place.row}) has no score: its gradient was refused because "
                f"{stored['refused']}."
            )
        parts = self._contributions(stored)
        query, vectors = load_direction(self.lake, self.direction)
        scores = self.index.found.scores(query)
        score = float(scores[position][place.row])
        exact, why_not = self._exact_score(place, vectors)
        record = self._record(self.index.pool, place)
        total = float(parts.values.sum())
        order = np.argsort(-parts.values, kind="stable")
        texts = self.table.select(["id", "prompt", "completion"]).to_pylist()
        # A correction is no sum over targets: what it changes is a row of its own.
        corrected = "fisher_damping" in self.direction.header["settings"]
        return Explanation(
            target=self.target,
            strategy=self.strategy,
            version=self.version,
            id=place.id,
            record_id=place.record_id,
            shard=place.shard,
            row=place.row,
            line=record["line"],
            source=record["source"],
            prompt=record["prompt"],
            completion=record["completion"],
            mean_log_prob=stored["mean_log_prob"][-1],
            gradient_norm=stored["gradient_norm"][-1],
            score=score,
            exact_score=exact,
            why_not_exact=why_not,
            parts=[
                TargetPart(
                    **texts[j],
                    weight=float(parts.weights[j]),
                    influence=float(parts.influences[j]),
                    contribution=float(parts.values[j]),
                )
                for j in order
            ],
            curvature=score - total if corrected else None,
            sketch_error=None if exact is None else exact - (score if corrected else total),
            rounding=0.0 if corrected else score - total,
            reranked=_is_reranked(self.lake.head("selection", join_key(self.target, self.strategy))),
            ranks=list(self._ranks(place, position)),
            neighbours=self._neighbours(place, position, stored, neighbours),
            earlier=list(self._earlier(place.id)),
            notes=notes,
        )

    # -- the target's side -------------------------------------------------------------------------------------

    def _current_version(self) -> tuple[str, str]:
        """Today's feature version, and why the model cannot be used (empty where it can)."""
        try:
            return feature_version(self.settings, self.lake, self.model), ""
        except ModelError as error:
            known = [one.name for one in feature_versions(self.lake)]
            if self.exact or not known:
                raise
            return known[0], f"the model cannot be loaded: {error}"

    def _direction(self, strategy: str) -> Artifact:
        from prism_assets.selection.strategies import STRATEGIES

        if strategy not in STRATEGIES or not STRATEGIES[strategy].needs_direction:
            known = ", ".join(name for name, one in STRATEGIES.items() if one.needs_direction)
            raise CannotExplain(f"{strategy} gives no scores to explain; these do: {known}.")
        found = self.lake.head("target_directions", self.target, direction_scope(self.version, strategy))
        if found is None:
            raise LakeError(
                f"The lake has no {strategy} direction of {self.target} in version {self.version}: name {strategy} "
                "under `strategies` in prism.yaml and run `prism run`."
            )
        return found

    def _target_side(self) -> "tuple[pa.Table, np.ndarray, list[float]]":
        """The usable targets with their sketches [m rows], their weights [C, m], and learning rates [C]."""
        from prism_assets.selection.strategies import STRATEGIES

        inputs = self.direction.header["inputs"]
        targets = self.lake.read_table(self._input(inputs["targets"]))
        table = self.lake.read_table(self._input(inputs["features"]))
        for name in ("prompt", "completion"):
            table = table.append_column(name, targets[name])
        settings = as_made(self.settings, self._weights_artifact())  # whatever they say today
        scores, usable = scores_of(settings, table, targets)
        counted = tokens_counted(settings, targets.take(usable), scores.kind == "pairs")
        weights = STRATEGIES[self.strategy].weigh(scores) * counted
        return table.take(usable), weights, learning_rates(self._input(inputs["warmup"]))

    def _weights_artifact(self) -> Artifact:
        """The target weights that were published with the direction: they know the temperature."""
        found = self.lake.require("target_weights", self.target, self.version)
        reference = found.header["inputs"].get(self.strategy, {})
        if reference.get("content_hash") != self.direction.content_hash:
            raise LakeError(f"The weights of {self.target} belong to another direction: run `prism run`.")
        return found

    def _input(self, reference: dict[str, Any]) -> Artifact:
        found = self.lake.get(reference["table"], reference["fingerprint"])
        if found is None:
            raise LakeError(
                f"{reference['table']} {reference['fingerprint']}, which the direction of {self.target} was made from, "
                "is not in the lake any more: run `prism run`."
            )
        return found

    # -- the candidate's side ----------------------------------------------------------------------------------

    def _find(self, example: str) -> tuple[Place, list[str]]:
        """The row that counts, and what to say about its copies."""
        places = [place for place in self.places if _matches(place, example)]
        exact = [place for place in places if example in (place.id, place.record_id)]
        places = exact or places
        names = sorted({place.id for place in places})
        if not names:
            raise CannotExplain(self._unknown(example))
        if len(names) > 1:
            shown = {place.id: place for place in reversed(places)}
            listed = "\n".join(f"  {p.id}  shard {p.shard}, row {p.row}, id {p.record_id}" for p in shown.values())
            raise CannotExplain(f"{example} may be any of these {len(names)}; name one by its id:\n{listed}")
        copies = [place for place in self.places if place.id == names[0]]
        counted = [place for place in copies if place.excluded is None]
        if not counted:
            raise CannotExplain(self._contaminated(copies[0]))
        others = [one for one in copies if one is not counted[0]]
        said = [f"The same example also stands in {one.shard}, row {one.row}; it counts once, here." for one in others]
        return counted[0], said

    def _contaminated(self, place: Place) -> str:
        held_back = []
        pool_inputs = self.index.pool.header["inputs"].get("held_back", [])
        for reference in pool_inputs:
            artifact = self.lake.get(reference["table"], reference["fingerprint"])
            rows = self.lake.read_table(artifact, ["conversation_id", "line"]).to_pylist() if artifact else []
            kind = "target" if reference["table"] == "targets" else "held-out"
            held_back += [
                f"{kind} record of {artifact.partition} (line {row['line']})"
                for row in rows
                if row["conversation_id"] == place.id
            ]
        return (
            f"{place.id} (shard {place.shard}, row {place.row}) is in no ranking: it equals the "
            f"{' and the '.join(held_back) or 'a target or held-out record'}, so selecting it would be contamination."
        )

    def _unknown(self, example: str) -> str:
        live = {row["shard"] for row in self.lake.read_table(self.index.pool, ["shard"]).to_pylist()}
        for head in self.lake.heads("candidates"):
            artifact = self.lake.get("candidates", head["fingerprint"])
            if artifact is None or head["scope"] != self.index.pool.header["version"] or head["partition"] in live:
                continue
            if any(_matches(place, example) for place in _places_of(self.lake, artifact, head["partition"], {})):
                return (
                    f"{example} stands in shard {head['partition']}, which is not in the live pool: its file left the "
                    "inbox (then it is retired), or is new (then run `prism run`)."
                )
        if len(example) < SHORTEST_PREFIX:
            return f"{example!r} is too short for the beginning of an id: give at least {SHORTEST_PREFIX} digits."
        names: list[str] = []
        for place in self.places:
            names += [place.id, *([place.record_id] if place.record_id else [])]
        if len(names) > _COMPARED:
            names = [name for name in names if name[:2] == example[:2]][:_COMPARED]
        near = difflib.get_close_matches(example, names, n=3, cutoff=0.4)
        advice = f" Near it: {', '.join(near)}." if near else ""
        return f"The live pool has no candidate with the id or record id {example!r}.{advice}"

    def _stored_row(self, place: Place) -> dict[str, Any]:
        """The stored features of one row, from the one block that holds it; `vector` as float16 [C, K]."""
        reference = self.index.shards[self.index.position(place.shard)]
        features = self.lake.get("candidate_features", reference.features)
        first = 0
        for block in self.lake.read_table(features, ["block", "rows"]).to_pylist():
            if place.row < first + block["rows"]:
                artifact = self.lake.get("feature_blocks", block["block"])
                if artifact is None:
                    raise LakeError(f"Feature block {block['block']} of {place.shard} is missing: run `prism run`.")
                row = self.lake.read_table(artifact).slice(place.row - first, 1)
                content = row.drop_columns(["vector"]).to_pylist()[0]
                return {**content, "vector": vectors_of(row)[0].reshape(len(content["norm"]), -1)}
            first += block["rows"]
        raise LakeError(f"The features of {place.shard} end before row {place.row}: run `prism run`.")

    def _record(self, pool: Artifact, place: Place) -> dict[str, Any]:
        return self._rows_of(pool, place.shard, [place.row])[0]

    def _rows_of(self, pool: Artifact, shard: str, rows: list[int]) -> list[dict[str, Any]]:
        columns = ["line", "source", "prompt", "completion"]
        return self.lake.read_table(_candidates(self.lake, pool)[shard], columns).take(rows).to_pylist()

    # -- the parts ---------------------------------------------------------------------------------------------

    def _contributions(self, stored: dict[str, Any]) -> "Contributions":
        import numpy as np

        from prism_assets.selection.explain import target_contributions

        row = stored["vector"]
        column = self.table["sketch"].combine_chunks()
        sketches = column.flatten().to_numpy(zero_copy_only=False).reshape(len(self.table), *row.shape)
        norms = self.lake.read_tensors(self.direction)["norms"].numpy()
        return target_contributions(sketches, self.target_weights, row, np.asarray(norms), self.rates)

    def _exact_score(self, place: Place, vectors: list[dict[str, Any]]) -> tuple[float | None, str]:
        """Σ_k η̄_k <t_k, Γ_ik> / (‖t_k‖ ‖Γ_ik‖), or None and why not."""
        if self.exact is False:
            return None, "it was not asked for"
        if self._no_model:
            return None, self._no_model
        try:
            return self._without_sketch(place, vectors), ""
        except ModelError as error:
            if self.exact:
                raise
            return None, f"the model cannot be loaded: {error}"

    def _without_sketch(self, place: Place, vectors: list[dict[str, Any]]) -> float:
        from prism_assets.corpus.tokenization import from_table
        from prism_assets.selection.rerank import ExactScores

        if self._scorer is None:
            warmup = self.lake.require("warmup_checkpoints", None, warmup_scope(self.settings, self.model))
            self._pass = GradientPass(self.settings, self.model, warmup)
            self._scorer = ExactScores(self._pass, vectors)
        tokens = self.lake.read_table(_candidates(self.lake, self.index.pool)[place.shard], ["input_ids", "loss_mask"])
        return float(self._scorer.of(from_table(tokens.slice(place.row, 1)))[0])

    # -- ranks and neighbours ----------------------------------------------------------------------------------

    def _ranks(self, place: Place, position: int) -> "Iterator[Rank]":
        from prism_assets.selection.explain import Rank
        from prism_assets.selection.strategies import STRATEGIES

        for name, strategy in STRATEGIES.items():
            if strategy.whole_pool:
                continue
            selection = self.lake.head("selection", join_key(self.target, name))
            chosen = self._chosen(selection, place.id)
            selected = None if selection is None else chosen is not None
            if strategy.needs_direction:
                direction = self.lake.head("target_directions", self.target, direction_scope(self.version, name))
                if direction is None:
                    continue
                if chosen and _is_reranked(selection):
                    yield Rank(name, chosen["rank"], self.index.ranked, chosen["score"], selected, "exact")
                else:
                    yield Rank(name, *_rank(self.lake, self.index, direction, position, place.row), selected, "sketch")
            elif name == "random":
                yield Rank(name, *self._random_rank(place.id), None, selected)
            elif selection is not None:
                # The order of a set of rows says nothing beyond what it selects.
                rank, score = (chosen["rank"], chosen["score"]) if chosen else (None, None)
                yield Rank(name, rank, selection.notes["pool_rows"], score, selected)

    def _chosen(self, selection: Artifact | None, name: str) -> dict[str, Any] | None:
        """Rank and score of a candidate in a selection; None where it is not among the selected."""
        rows = self.lake.read_table(selection, ["id", "rank", "score"]).to_pylist() if selection else []
        return next((row for row in rows if row["id"] == name), None)

    def _random_rank(self, name: str) -> tuple[int, int]:
        """The rank in the order of `random`, over canonical rows: it does not know of refused gradients."""
        import numpy as np

        from prism_assets.selection.explain import rank_of
        from prism_assets.selection.strategies.plain import keyed_hash

        names = [place.id for place in self.places if place.excluded is None]
        keys = keyed_hash(names, self.settings.selection.seed)
        return rank_of(keys[names.index(name)], name, keys, np.array(names, dtype=object)), len(names)

    def _neighbours(self, place: Place, position: int, stored: dict[str, Any], wanted: int) -> "list[Neighbour]":
        import numpy as np

        from prism_assets.selection.explain import Neighbour

        row = stored["vector"]
        top = self.index.found.top_k(row.reshape(-1).astype(np.float32), wanted + 1, self.index.usable)
        found = []
        for score, segment, other in zip(top.scores.tolist(), top.segment.tolist(), top.row.tolist(), strict=True):
            if (segment, other) == (position, place.row):
                continue
            shard = self.index.shards[segment].shard
            record = self._rows_of(self.index.pool, shard, [other])[0]
            texts = {name: record[name] for name in ("source", "prompt", "completion")}
            found.append(Neighbour(score / len(row), self.index.ids[segment][other], shard, other, **texts))
        return found[:wanted]

    def _earlier(self, name: str) -> "Iterator[Earlier]":
        """The candidate's place in each other feature version of the lake, the latest first."""
        from prism_assets.selection.explain import Earlier

        for one in feature_versions(self.lake):
            if one.name == self.version or self.lake.head("candidate_index", None, one.name) is None:
                continue
            used = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(one.used))
            direction = self.lake.head("target_directions", self.target, direction_scope(one.name, self.strategy))
            if direction is None:
                yield Earlier(one.name, used, None, 0, None, f"no {self.strategy} direction of {self.target} then")
                continue
            index = open_index(self.lake, self.store, one.name)
            place = next((p for p in _places(self.lake, index.pool) if p.id == name and p.excluded is None), None)
            position = index.position(place.shard) if place else None
            if place is None or position is None:
                yield Earlier(one.name, used, None, index.ranked, None, "not in the pool then")
            elif not index.usable[position][place.row]:
                yield Earlier(one.name, used, None, index.ranked, None, "its gradient was refused then")
            else:
                rank, of, score = _rank(self.lake, index, direction, position, place.row)
                yield Earlier(one.name, used, rank, of, score, "")


def _is_reranked(selection: Artifact | None) -> bool:
    """Whether a selection was ranked by exact scores."""
    return selection is not None and bool(selection.header["settings"].get("rerank"))


def _rank(
    lake: Lake, index: IndexState, direction: Artifact, position: int, row: int
) -> tuple[int, int, float]:
    """Rank, number of ranked rows and score of one row of the index for a direction, as a selection ranks."""
    import numpy as np

    from prism_assets.selection.explain import rank_of

    query, _ = load_direction(lake, direction)
    scores = index.found.scores(query)
    own = scores[position][row]
    usable = np.concatenate([one[mask] for one, mask in zip(scores, index.usable, strict=True)])
    names = np.concatenate([one[mask] for one, mask in zip(index.ids, index.usable, strict=True)])
    return rank_of(own, index.ids[position][row], usable, names), len(usable), float(own)


def _candidates(lake: Lake, pool: Artifact) -> dict[str, Artifact]:
    """The candidates of each shard of a pool. Raises LakeError for one that is gone."""
    found = {}
    for row in lake.read_table(pool, ["shard", "candidates_fingerprint"]).to_pylist():
        artifact = lake.get("candidates", row["candidates_fingerprint"])
        if artifact is None:
            raise LakeError(f"The rows of shard {row['shard']} are not in the lake any more: run `prism run`.")
        found[row["shard"]] = artifact
    return found


def _places(lake: Lake, pool: Artifact) -> Iterator[Place]:
    """Every row of a pool."""
    reasons = {
        row["shard"]: dict(zip(row["excluded_rows"], row["excluded_reasons"], strict=True))
        for row in lake.read_table(pool).to_pylist()
    }
    for shard, artifact in _candidates(lake, pool).items():
        yield from _places_of(lake, artifact, shard, reasons[shard])


def _places_of(lake: Lake, candidates: Artifact, shard: str, reasons: dict[int, str]) -> Iterator[Place]:
    rows = lake.read_table(candidates, ["id", "record_id"]).to_pylist()
    for position, row in enumerate(rows):
        yield Place(shard, position, row["id"], row["record_id"], reasons.get(position))


def _matches(place: Place, example: str) -> bool:
    if example in (place.id, place.record_id):
        return True
    return len(example) >= SHORTEST_PREFIX and place.id.startswith(example.lower())
