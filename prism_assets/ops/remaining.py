"""What of a run is still to be done, in tokens by kind of pass, and in what it stores. What the lake has costs nothing.

Where a stage depends on one that is still to be done, its work is unknown and all of it counts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from prism_assets.errors import LakeError, SettingsError
from prism_assets.identity import base_key, join_key
from prism_assets.ops.figures import Pool, Targets
from prism_assets.resources.lake import Artifact
from prism_assets.selection.direction_artifacts import COMPARED
from prism_assets.stage import Stage

if TYPE_CHECKING:
    import pyarrow as pa

    from prism_assets.selection.strategies import Strategy


@dataclass(frozen=True)
class Work:
    """What a stage has to do. Tokens by kind of pass (`rates.Rates`), rows and parameters by what is stored."""

    stage: str
    rows: float  # rows, records or trainings that it is about
    gradient: float = 0.0
    training: float = 0.0
    forward: float = 0.0
    generated: float = 0.0  # new tokens
    steps: float = 0.0  # optimiser steps
    tokenised: float = 0.0  # rows
    blocks: float = 0.0  # rows of features stored
    segments: float = 0.0  # rows of features stored in the index
    parameters: float = 0.0  # times the adapter's parameters, float32
    texts: float = 0.0  # rows stored with text and tokens
    lines: float = 0.0  # rows stored as JSON Lines
    states: float = 0.0  # rows of hidden states stored
    reports: float = 0.0  # pages written

    def __bool__(self) -> bool:
        return self.rows > 0


def _tokens_in(table: "pa.Table") -> int:
    return sum(len(chunk.flatten()) for chunk in table["input_ids"].chunks)


@dataclass(frozen=True)
class Remaining:
    """The work of a run for some of the targets."""

    stage: Stage
    pool: Pool
    targets: Mapping[str, Targets]

    def __iter__(self) -> Iterator[Work]:
        """The stages that have something to do, in their order."""
        makers = (
            *(self._candidates, self._warmup, self._candidate_features, self._anchors, self._target_features),
            *(self._directions, self._selections, self._adapters, self._evaluations),
        )
        return (work for make in makers if (work := make()))

    # -- features ----------------------------------------------------------------------------------------------

    def _candidates(self) -> Work:
        rows = self.pool.pending_rows
        return Work("candidates", rows, tokenised=rows, texts=rows)

    @cached_property
    def _warmed_up(self) -> bool:
        return self.stage.shown_or_none("warmup_checkpoints") is not None

    @property
    def _checkpoints(self) -> int:
        return self.stage.settings.warmup.checkpoints

    @cached_property
    def _sample(self) -> tuple[float, float]:
        """Rows and tokens of the warm-up's sample."""
        sample = self.stage.shown_or_none("warmup_sample")
        if sample is not None:
            return sample.notes["rows"], _tokens_in(self.stage.lake.read_table(sample, ["input_ids"]))
        warmup, most = self.stage.settings.warmup, self.pool.canonical_rows
        rows = min(most, max(warmup.min_rows, math.ceil(warmup.share * most)))
        return rows, rows * self.pool.tokens_a_row

    def _warmup(self) -> Work:
        if self._warmed_up:
            return Work("warm-up", 0)
        from prism_assets.sft.trainer import Training

        warmup = self.stage.settings.warmup
        rows, tokens = self._sample
        if warmup.optimizer_state is not None:
            texts = rows if self.stage.shown_or_none("warmup_sample") is None else 0
            return Work("warm-up", rows, parameters=3, texts=texts)
        training = Training(epochs=warmup.epochs, batch_size=warmup.batch_size)
        stored = rows if self.stage.shown_or_none("warmup_sample") is None else 0
        return Work(
            "warm-up",
            rows,
            training=tokens * warmup.epochs,
            steps=training.number_of_steps(math.ceil(rows)),
            parameters=3 * self._checkpoints,
            texts=stored,
        )

    def _candidate_features(self) -> Work:
        from prism_assets.corpus.candidates import inbox_files
        from prism_assets.features.candidate_features import missing_blocks, pending_features

        stage, pool = self.stage, self.pool
        if not self._warmed_up:
            return self._features(pool.rows, pool.tokens, pool.rows)
        keys = [key for key in inbox_files(stage, 0) if key not in set(pool.pending)]
        rows, tokens = pool.pending_rows, pool.pending_tokens
        for key in pending_features(stage, keys):
            for block in missing_blocks(stage, key):
                rows += block.num_rows
                tokens += _tokens_in(block)
        return self._features(rows, tokens, self._unindexed(keys))

    def _features(self, rows: float, tokens: float, unindexed: float) -> Work:
        return Work("candidate_features", rows, gradient=tokens * self._checkpoints, blocks=rows, segments=unindexed)

    def _unindexed(self, keys: Sequence[str]) -> float:
        """Rows of shards without a segment in the index."""
        stage = self.stage
        index = stage.shown_or_none("candidate_index")
        indexed = set(stage.lake.read_table(index, ["shard"])["shard"].to_pylist()) if index else set()
        missing = [stage.shown("candidates", key).notes["rows"] for key in keys if key not in indexed]
        return self.pool.pending_rows + sum(missing)

    # -- targets -----------------------------------------------------------------------------------------------

    def _anchored(self, name: str) -> Artifact | None:
        from prism_assets.features.anchor_artifacts import anchors_recipe

        examples = self.targets[name].examples.artifact
        if not self._warmed_up or examples is None:
            return None
        return self.stage.lake.find(anchors_recipe(self.stage, examples, name))

    def _feature_artifact(self, name: str) -> Artifact | None:
        from prism_assets.features.target_features import target_features_recipe

        anchored = self._anchored(name)
        return None if anchored is None else self.stage.lake.find(target_features_recipe(self.stage, anchored, name))

    def _is_made_pairs(self, name: str) -> bool:
        """Whether the target's plain examples get an anchor."""
        from prism_assets.features.anchor_artifacts import MADE

        return self.stage.settings.targets[name].anchors in MADE and not self.targets[name].examples.pairs

    def _target_tokens(self, name: str) -> float:
        """Tokens of the target examples as directions use them; an anchor that is not made yet counts as long as the
        wanted answer."""
        examples = self.targets[name].examples
        return examples.tokens * (2 if self._is_made_pairs(name) else 1)

    def _anchors(self) -> Work:
        generated = [
            self.targets[name].examples
            for name in self.targets
            if self.stage.settings.targets[name].anchors == "generated" and self._anchored(name) is None
        ]
        answers = sum(int(one.loss_mask.sum()) for file in generated for one in file.examples)
        prompts = sum(file.tokens for file in generated) - answers
        return Work("target_anchors", sum(file.size for file in generated), forward=prompts, generated=answers)

    def _target_features(self) -> Work:
        pending = [name for name in self.targets if self._feature_artifact(name) is None]
        pairs = {name for name in pending if self._is_made_pairs(name) or self.targets[name].examples.pairs}
        tokens = {name: self._target_tokens(name) for name in pending}
        size = sum(self.targets[name].examples.size for name in pending)
        return Work(
            "target_features",
            size,
            gradient=sum(tokens[name] for name in pending if name not in pairs) * self._checkpoints,
            training=sum(tokens[name] for name in pairs) * self._checkpoints,  # a pair's gradient is a weighted one
            forward=sum(tokens.values()),
            blocks=2 * size,  # float32
        )

    @cached_property
    def _wanted(self) -> "list[Strategy]":
        """The strategies of which every target has a direction."""
        from prism_assets.selection.strategies import STRATEGIES

        asked = {*self.stage.settings.strategies, *COMPARED}
        return [one for one in STRATEGIES.values() if one.needs_direction and one.name in asked]

    @cached_property
    def _missing_directions(self) -> dict[str, set[str]]:
        """The strategies whose directions are to be made, by target; an empty set where only the probe is to be made,
        no entry where nothing is."""
        found = {name: self._missing_of(name) for name in self.targets}
        return {name: missing for name, missing in found.items() if missing is not None}

    def _missing_of(self, name: str) -> set[str] | None:
        from prism_assets.selection.direction_artifacts import expected_direction, shown_inputs
        from prism_assets.selection.target_direction import weights_recipe
        from prism_assets.selection.target_scores import scores_of

        stage, everything = self.stage, {one.name for one in self._wanted}
        features, held_out = self._feature_artifact(name), self.targets[name].held_out.artifact
        if features is None:
            return everything
        try:
            inputs = shown_inputs(stage, name)
            if inputs.features.fingerprint != features.fingerprint:
                return everything
            found = {one.name: stage.lake.find(expected_direction(stage, name, one)) for one in self._wanted}
            directions = {strategy: one for strategy, one in found.items() if one is not None}
            if len(directions) < len(found) or held_out is None:
                return everything - set(directions)
            tables = (stage.lake.read_table(one) for one in (inputs.features, inputs.targets))
            temperature = scores_of(stage.settings, *tables)[0].temperature
            recipe = weights_recipe(stage, inputs._replace(eval_examples=held_out), directions, temperature)
            return None if stage.lake.find(recipe) is not None else set()
        except (LakeError, SettingsError):  # something that they are made from is not there, or the run will say more
            return everything

    def _directions(self) -> Work:
        from prism_assets.selection.curvature import reads_sample

        missing, checkpoints = self._missing_directions, self._checkpoints
        corrected = reads_sample(self.stage)
        rows, tokens = self._sample
        has_sample = self._warmed_up and self.stage.shown_or_none("warmup_sample_features") is not None
        curvature = tokens * checkpoints if corrected and missing and not has_sample else 0.0
        half = str(self.stage.model.torch_dtype()) in ("torch.float16", "torch.bfloat16")
        training = forward = 0.0
        for name, strategies in missing.items():
            count = len(strategies)
            m, held_out = self._target_tokens(name), self.targets[name].held_out.wanted_tokens
            # One pass a checkpoint makes all directions; corrected, ∇J is no longer one of them.
            passes = checkpoints if count else 0
            training += m * (passes + (1 if corrected else 0)) + (tokens * passes if corrected else 0)
            # The probe: held-out records before the steps and after each of two, target examples after them. In half
            # precision these before them, too.
            forward += (3 if half else 2) * m + 3 * held_out
        return Work(
            "target_direction",
            len(missing),
            gradient=curvature,
            training=training,
            forward=forward,
            parameters=sum(map(len, missing.values())) * checkpoints,
            blocks=rows if curvature else 0,
        )

    # -- selection, fine-tuning, evaluation ------------------------------------------------------------------------

    @cached_property
    def _pending_selections(self) -> "list[tuple[str, Strategy]]":
        from prism_assets.ops.stale import why_outdated
        from prism_assets.selection.strategies import STRATEGIES

        new_features = bool(self._candidate_features())
        # The pool holds the records of all targets back, so that a new one may change every ranking.
        new_pool = self.pool.pending or any(file.artifact is None for both in self.targets.values() for file in both)
        found = []
        for name in self.targets:
            new_targets = self._feature_artifact(name) is None
            for strategy in (STRATEGIES[one] for one in self.stage.settings.strategies):
                waits = new_pool or (new_features and strategy.needs_features)
                waits = waits or (new_targets and "target_features" in strategy.reads)
                waits = waits or self._direction_of(strategy) in self._missing_directions.get(name, set())
                if waits or why_outdated(self.stage, name, strategy):
                    found.append((name, strategy))
        return found

    @staticmethod
    def _direction_of(strategy: "Strategy") -> str | None:
        """The strategy whose direction this one ranks by."""
        if strategy.needs_direction:
            return strategy.name
        return "prism" if "direction" in strategy.reads else None

    def _budget(self, name: str, strategy: "Strategy") -> float:
        """Rows that a strategy selects for a target, or removes; of a budget in tokens those of mean length."""
        # Of a mixture by source the rows are not counted: it may be all.
        budget, most = self.stage.settings.budget_of(name), self.pool.canonical_rows
        if strategy.whole_pool:
            return most
        mean = self.pool.completion_tokens / self.pool.rows
        wanted = {"rows": budget.amount, "share": max(1, round(budget.amount * most)), "tokens": budget.amount / mean}
        return min(wanted[budget.kind], most)

    def _trained_rows(self, name: str, strategy: "Strategy") -> float:
        """Rows that are fine-tuned on: those that are selected, or left."""
        if self.stage.settings.targets[name].use == "keep":
            return self._budget(name, strategy)
        removed = 0 if strategy.whole_pool else self._budget(name, strategy)
        return max(1, self.pool.canonical_rows - removed)

    def _selections(self) -> Work:
        pending = self._pending_selections
        rows = sum(self._trained_rows(name, strategy) for name, strategy in pending)
        reranked = self._rescored(pending)
        tokens = self.pool.tokens_a_row
        states = self._hidden_states({name for name, one in pending if "hidden_states" in one.reads})
        return Work(
            "selection",
            len(pending),
            gradient=reranked * tokens * self._checkpoints,
            forward=states * tokens,
            texts=rows,
            lines=rows,
            states=states,
        )

    def _rescored(self, pending: "Sequence[tuple[str, Strategy]]") -> float:
        """Rows that these selections score again by a gradient pass: of shortlists, or all whose features came before
        the direction."""
        rerank = self.stage.settings.selection.rerank
        directed = [(name, strategy) for name, strategy in pending if strategy.needs_direction]
        if rerank != "all":
            return sum(min(rerank * self._budget(*one), self.pool.canonical_rows) for one in directed)
        if not self._warmed_up:
            return 0  # directions come first
        from prism_assets.corpus.candidates import inbox_files
        from prism_assets.features.exact_products import missing_products

        stage = self.stage
        keys = [key for key in inbox_files(stage, 0) if key not in set(self.pool.pending)]
        features = [one for key in keys if (one := stage.shown_or_none("candidate_features", key)) is not None]
        lacking = [0.0]  # one pass makes the products of all directions
        for name, strategy in directed:
            direction = stage.shown_or_none("target_directions", name, strategy.name)
            if direction is None or strategy.name in self._missing_directions.get(name, ()):
                lacking.append(sum(one.notes["rows"] for one in features))
            else:
                lacking.append(missing_products(stage, direction, features))
        return max(lacking)

    def _hidden_states(self, targets: set[str]) -> float:
        """Rows whose hidden states are to be computed for these targets."""
        if not targets:
            return 0.0
        from prism_assets.corpus.candidates import inbox_files
        from prism_assets.selection.representations import Representations

        stage, pending = self.stage, set(self.pool.pending)
        keys = [key for key in inbox_files(stage, 0) if key not in pending]
        files = [self.targets[name].examples for name in targets]
        tables = [*(stage.shown("candidates", key) for key in keys), *(one.artifact for one in files if one.artifact)]
        unread = self.pool.pending_rows + sum(one.size for one in files if one.artifact is None)
        return unread + Representations(stage).missing_rows(tables)

    def _adapter(self, name: str, strategy: "Strategy", seed: int) -> Artifact | None:
        from prism_assets.training.adapter import adapter_recipe

        if (name, strategy) in self._pending_selections:
            return None
        key = join_key(name, strategy.name)
        selection = self.stage.shown("selection", key)
        return self.stage.lake.find(adapter_recipe(self.stage, key, selection, seed))

    @cached_property
    def _found_adapters(self) -> "dict[tuple[str, str, int], Artifact | None]":
        from prism_assets.selection.strategies import STRATEGIES

        return {
            (name, strategy, seed): self._adapter(name, STRATEGIES[strategy], seed)
            for name in self.targets
            for strategy in self.stage.settings.strategies
            for seed in self.stage.settings.seeds
        }

    def _adapters(self) -> Work:
        from prism_assets.selection.strategies import STRATEGIES
        from prism_assets.sft.trainer import Training

        training = Training(**self.stage.settings.training.model_dump())
        tokens = steps = count = 0.0
        for (name, strategy, _), found in self._found_adapters.items():
            if found is not None:
                continue
            rows = max(1, round(self._trained_rows(name, STRATEGIES[strategy])))
            a_row = self.pool.tokens_a_row
            if (name, STRATEGIES[strategy]) not in self._pending_selections:
                selection = self.stage.shown("selection", join_key(name, strategy))
                rows = selection.notes["rows"]
                a_row = _tokens_in(self.stage.lake.read_table(selection, ["input_ids"])) / rows
            its_steps = training.number_of_steps(rows)
            batch = training.batch_size * training.gradient_accumulation
            trained = rows * training.epochs if training.steps is None else its_steps * min(batch, rows)
            tokens, steps, count = tokens + trained * a_row, steps + its_steps, count + 1
        return Work("adapter", count, training=tokens, steps=steps, parameters=count)

    def _evaluations(self) -> Work:
        from prism_assets.evaluation.scores import scores_recipe

        count = forward = generated = 0.0
        again: set[str] = set()  # the targets whose report follows
        for name, files in self.targets.items():
            records, key = files.held_out.artifact, base_key(name)
            evaluated: list[tuple[str, Artifact | None, bool]] = [(key, None, True)]
            evaluated += [
                (join_key(target, strategy), found, found is not None)
                for (target, strategy, _), found in self._found_adapters.items()
                if target == name
            ]
            for one, adapter, known in evaluated:
                if known and records and self.stage.lake.find(scores_recipe(self.stage, records, adapter, one)):
                    continue
                count += 1
                again.add(name)
                forward += files.held_out.tokens + sum(map(len, files.held_out.prompts))
                generated += len(files.held_out.prompts) * self.stage.settings.evaluation.max_new_tokens
        return Work("evaluation", count, forward=forward, generated=generated, reports=len(again))
