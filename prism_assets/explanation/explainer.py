"""`prism explain`: reads what the lake holds of a candidate and says why it ranks where it does.

Nothing is computed again: scores come from the stored index, directions and target sketches. The exception is the
exact score, a gradient of the one candidate per checkpoint, which shows the error of the sketch.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prism_assets.errors import CannotExplain, LakeError, ModelError
from prism_assets.explanation.places import Place, Places, places_of
from prism_assets.explanation.target_side import direction_of, target_side
from prism_assets.features.blocks import vectors_of
from prism_assets.features.gradient_pass import GradientPass
from prism_assets.identity import feature_versions, join_key
from prism_assets.resources.lake import Artifact
from prism_assets.selection.direction_artifacts import load_query
from prism_assets.selection.exact_scores import known_scores
from prism_assets.selection.pool import Pool, indexed_pool
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import numpy as np

    from prism_assets.explanation.parts import Contributions, Earlier, Explanation, Neighbour, StrategyRank
    from prism_assets.selection.exact_scores import ExactScorer


class Explainer:
    """Explains candidates for one target and strategy; what they share is read once.

    A context manager: the model that the exact score needs stays adapted until it ends, so open one at a time.
    `exact` None computes the exact score where the model can be loaded; True requires it (ModelError says why it cannot
    be), False leaves it out.
    """

    def __init__(self, stage: Stage, *, target: str, strategy: str = "prism", exact: bool | None = None) -> None:
        self.stage, self.target, self.strategy, self.exact = stage, target, strategy, exact
        self._pass: GradientPass | None = None
        self._scorer: ExactScorer | None = None
        self.version, self._no_model = self._current_version()
        self.pool = indexed_pool(stage, self.version, stage.settings.targets[target].mixture)
        self.places = Places(self.pool)
        self.side = target_side(stage, target, strategy, self.version)

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

        from prism_assets.explanation.parts import Explanation, TargetPart
        from prism_assets.selection.direction import row_factors

        place, notes = self.places.find(example)
        if place.shard not in self.pool.shards:
            raise CannotExplain(
                f"{place.id}: shard {place.shard} is not in the index of version {self.version} yet: run `prism run`."
            )
        stored = self._stored_row(place)
        if stored["refused"] is not None:
            raise CannotExplain(
                f"{place.id} (shard {place.shard}, row {place.row}) has no score: its gradient was refused because "
                f"{stored['refused']}."
            )
        position = self.pool.position(place.shard, place.row)
        mixture = self.stage.settings.targets[self.target].mixture
        if position is None and mixture is not None:
            raise CannotExplain(f"{place.id} is not of the mixture {mixture!r} that {self.target} removes rows from.")
        assert position is not None, place  # it counts, is indexed and was not refused
        record = self._record(place.shard, place.row)
        scale = self.stage.settings.selection.row_scale
        factors = row_factors(scale, np.array([stored["norm"]]), np.array([record["completion_tokens"]]))
        parts = self._contributions(stored, factors[0])
        score = float(self.pool.influence(self.side.query, remember=False)[position])
        exact, why_not = self._exact_score(place)
        total = float(parts.values.sum())
        order = np.argsort(-parts.values, kind="stable")
        texts = self.side.targets.select(["id", "prompt", "completion"]).to_pylist()
        # A correction is no sum over targets: what it changes is a row of its own.
        corrected = "curvature" in self.side.direction.header["settings"]
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
            reranked=_is_reranked(self._selection(self.strategy)),
            ranks=list(self._ranks(place, position)),
            neighbours=self._neighbours(position, stored, neighbours),
            earlier=list(self._earlier(place.id)),
            notes=notes,
        )

    def _current_version(self) -> tuple[str, str]:
        """Today's feature version, and why the model cannot be used (empty where it can)."""
        try:
            return self.stage.feature_version, ""
        except ModelError as error:
            known = [one.name for one in feature_versions(self.stage.lake)]
            if self.exact or not known:
                raise
            return known[0], f"the model cannot be loaded: {error}"

    # -- the candidate -----------------------------------------------------------------------------------------

    def _stored_row(self, place: Place) -> dict[str, Any]:
        """The stored features of one row, from the one block that holds it; `vector` as float16 [C, K]."""
        lake = self.stage.lake
        reference = self.pool.segments[self.pool.shards.index(place.shard)]
        features = lake.get("candidate_features", reference.features)
        first = 0
        for block in lake.read_table(features, ["block", "rows"]).to_pylist() if features else ():
            if place.row < first + block["rows"]:
                artifact = lake.get("feature_blocks", block["block"])
                if artifact is None:
                    raise LakeError(f"Feature block {block['block']} of {place.shard} is missing: run `prism run`.")
                row = lake.read_table(artifact).slice(place.row - first, 1)
                content = row.drop_columns(["vector"]).to_pylist()[0]
                return {**content, "vector": vectors_of(row)[0].reshape(len(content["norm"]), -1)}
            first += block["rows"]
        raise LakeError(f"The features of {place.shard} end before row {place.row}: run `prism run`.")

    def _record(self, shard: str, row: int) -> dict[str, Any]:
        """What the candidate's file says."""
        columns = ["line", "source", "prompt", "completion", "completion_tokens"]
        return self.pool.candidates(shard, columns).slice(row, 1).to_pylist()[0]

    def _contributions(self, stored: dict[str, Any], factors: "np.ndarray") -> "Contributions":
        """`factors` [C]: what the candidate's unit rows are multiplied with."""
        from prism_assets.explanation.parts import target_contributions

        row, side = stored["vector"] * factors[:, None], self.side
        column = side.targets["sketch"].combine_chunks()
        sketches = column.flatten().to_numpy(zero_copy_only=False).reshape(len(side.targets), *row.shape)
        return target_contributions(sketches, side.weights, row, list(side.norms), side.rates)

    def _exact_score(self, place: Place) -> tuple[float | None, str]:
        """Σ_k η̄_k <t_k, Γ_ik> / (‖t_k‖ ‖Γ_ik‖), scaled as the score is, or None and why not."""
        if self.exact is False:
            return None, "it was not asked for"
        if self._no_model:
            return None, self._no_model
        try:
            return self._without_sketch(place), ""
        except ModelError as error:
            if self.exact:
                raise
            return None, f"the model cannot be loaded: {error}"

    def _without_sketch(self, place: Place) -> float:
        from prism_assets.corpus.token_tables import from_table
        from prism_assets.selection.exact_scores import ExactScorer

        if self._scorer is None:
            self._pass = GradientPass(self.stage)
            self._scorer = ExactScorer(self._pass, self.side.vectors)
        tokens = self.pool.candidates(place.shard, ["input_ids", "loss_mask"]).slice(place.row, 1)
        return float(self._scorer.of(from_table(tokens))[0])

    # -- ranks and neighbours ----------------------------------------------------------------------------------

    def _selection(self, strategy: str) -> Artifact | None:
        """What a strategy took from the top of its ranking: the selected rows, or those that were removed."""
        removes = self.stage.settings.targets[self.target].use == "remove"
        return self.stage.lake.head("removed" if removes else "selection", join_key(self.target, strategy))

    def _ranks(self, place: Place, position: int) -> "Iterator[StrategyRank]":
        from prism_assets.explanation.parts import StrategyRank
        from prism_assets.selection.strategies import STRATEGIES

        for name, strategy in STRATEGIES.items():
            if strategy.whole_pool:
                continue
            selection = self._selection(name)
            chosen = self._chosen(selection, place.id)
            selected = None if selection is None else chosen is not None
            if strategy.needs_direction:
                direction = direction_of(self.stage, self.target, name, self.version)
                if direction is None:
                    continue
                known = self._exact_scores(selection, direction)
                if known is not None:
                    yield StrategyRank(name, *_rank_among(self.pool, known, position), selected, "exact")
                elif chosen and _is_reranked(selection):
                    yield StrategyRank(name, chosen["rank"], self.pool.size, chosen["score"], selected, "exact")
                else:
                    yield StrategyRank(name, *_rank(self.pool, direction, position), selected, "sketch")
            elif name == "random":
                yield StrategyRank(name, *self._random_rank(place.id), None, selected)
            elif selection is not None:
                # The order of a set of rows says nothing beyond what it selects.
                rank, score = (chosen["rank"], chosen["score"]) if chosen else (None, None)
                yield StrategyRank(name, rank, selection.notes["pool_rows"], score, selected)

    def _exact_scores(self, selection: Artifact | None, direction: Artifact) -> "np.ndarray | None":
        """Exact scores of all rows, where the selection was ranked by them and they are known without the model."""
        everywhere = selection is not None and selection.header["settings"].get("rerank") == "all"
        return known_scores(self.pool, direction) if everywhere else None

    def _chosen(self, selection: Artifact | None, name: str) -> dict[str, Any] | None:
        """Rank and score of a candidate in a selection; None where it is not among the selected."""
        rows = self.stage.lake.read_table(selection, ["id", "rank", "score"]).to_pylist() if selection else []
        return next((row for row in rows if row["id"] == name), None)

    def _random_rank(self, name: str) -> tuple[int, int]:
        """The rank in the order of `random`, over canonical rows: it does not know of refused gradients."""
        import numpy as np

        from prism_assets.explanation.parts import rank_of
        from prism_assets.selection.strategies.plain import keyed_hash

        names = [place.id for place in self.places.all if place.excluded is None]
        keys = keyed_hash(names, self.stage.settings.selection.seed)
        return rank_of(keys[names.index(name)], name, keys, np.array(names, dtype=object)), len(names)

    def _neighbours(self, position: int, stored: dict[str, Any], wanted: int) -> "list[Neighbour]":
        import numpy as np

        from prism_assets.explanation.parts import Neighbour

        row = stored["vector"]
        positions, scores = self.pool.top(row.reshape(-1).astype(np.float32), wanted + 1)
        best = np.argsort(-scores, kind="stable")
        found = []
        for at, score in zip(positions[best].tolist(), scores[best].tolist(), strict=True):
            if at == position:
                continue
            ((shard, other),) = self.pool.places(np.array([at]))
            record = self._record(shard, other)
            texts = {name: record[name] for name in ("source", "prompt", "completion")}
            found.append(Neighbour(score / len(row), self.pool.ids[at], shard, other, **texts))
        return found[:wanted]

    def _earlier(self, name: str) -> "Iterator[Earlier]":
        """The candidate's place in each other feature version of the lake, the latest first."""
        from prism_assets.explanation.parts import Earlier

        for one in feature_versions(self.stage.lake):
            if one.name == self.version or self.stage.lake.head("candidate_index", None, one.name) is None:
                continue
            used = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(one.used))
            direction = direction_of(self.stage, self.target, self.strategy, one.name)
            if direction is None:
                yield Earlier(one.name, used, None, 0, None, f"no {self.strategy} direction of {self.target} then")
                continue
            pool = indexed_pool(self.stage, one.name, self.stage.settings.targets[self.target].mixture)
            place = next((p for p in places_of(pool) if p.id == name and p.excluded is None), None)
            if place is None or place.shard not in pool.shards:
                yield Earlier(one.name, used, None, pool.size, None, "not in the pool then")
                continue
            position = pool.position(place.shard, place.row)
            if position is None:
                yield Earlier(one.name, used, None, pool.size, None, "its gradient was refused then")
            else:
                yield Earlier(one.name, used, *_rank(pool, direction, position), "")


def _is_reranked(selection: Artifact | None) -> bool:
    """Whether a selection was ranked by exact scores."""
    return selection is not None and bool(selection.header["settings"].get("rerank"))


def _rank(pool: Pool, direction: Artifact, position: int) -> tuple[int, int, float]:
    """Rank, number of ranked rows and score of one row of a pool for a direction, as a selection ranks."""
    scores = pool.influence(load_query(pool.lake, direction), remember=False)
    return _rank_among(pool, scores, position)


def _rank_among(pool: Pool, scores: "np.ndarray", position: int) -> tuple[int, int, float]:
    """Rank, number of ranked rows and score of one row, by the scores [n] of all."""
    import numpy as np

    from prism_assets.explanation.parts import rank_of

    rank = rank_of(scores[position], pool.ids[position], scores, np.array(pool.ids, dtype=object))
    return rank, pool.size, float(scores[position])
