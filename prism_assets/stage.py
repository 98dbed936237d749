"""The Stage: one asset at work. It carries what every stage needs, and the versions derived from it once.

artifact, computed = stage.make(recipe, lambda: Rows(table))
stage.show(artifact, partition)
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets import identity
from prism_assets.progress import Progress, Stopwatch, progress, uncounted
from prism_assets.resources.lake import Artifact, Content, Folder, Lake, Recipe
from prism_assets.resources.model.optimizer_place import content_hash
from prism_assets.tables import table_named

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from prism_assets.resources.index import VectorStore
    from prism_assets.resources.model import LanguageModel, ModelIdentity
    from prism_assets.settings import Settings


class Made(NamedTuple):
    """An artefact, and how many were made for it now (0: it was found)."""

    artifact: Artifact
    computed: int


_CORPUS, _LORA = {"tokenization"}, {"model", "lora"}
_WARMUP = _CORPUS | _LORA | {"warmup"}
# Which sections of the settings each of the kept properties is derived from, beside the engines.
DERIVED_FROM: dict[str, set[str]] = {
    "model_identity": set(),
    "dtype": set(),
    "corpus_version": _CORPUS,
    "lora_identity": _LORA,
    "warmup_scope": _WARMUP,
    "optimizer_state": {"warmup"},
    "warmup": _WARMUP,
    "feature_identity": _WARMUP | {"features"},
    "feature_version": _WARMUP | {"features"},
}


@dataclass(frozen=True)
class Stage:
    """Settings and engines of a project, and the run and log that work is reported to.

    Versions are derived once and kept: a Stage lives as long as one step, one command.
    """

    settings: "Settings"
    lake: Lake
    model: "LanguageModel"
    index: "VectorStore"
    run_id: str = ""
    log: Any = field(default_factory=lambda: logging.getLogger("prism_assets"))

    def with_settings(self, **sections: Any) -> "Stage":
        """The same stage under other settings, a section by name; what was derived from the others stays known."""
        other = replace(self, settings=self.settings.model_copy(update=sections))
        known = {name: value for name, value in vars(self).items() if name in DERIVED_FROM}
        vars(other).update({name: value for name, value in known.items() if not DERIVED_FROM[name] & sections.keys()})
        return other

    # -- versions ----------------------------------------------------------------------------------------------

    @cached_property
    def model_identity(self) -> "ModelIdentity":
        """Hashes of the model's weights, tokenizer and starting adapter. Raises ModelError."""
        return self.model.identify()

    @cached_property
    def dtype(self) -> str:
        """The type of the base weights, and how they are quantised. Raises ModelError."""
        parts = (self.model.dtype_name(), self.model_identity.quantized)
        return " ".join(part for part in parts if part)

    @cached_property
    def corpus_version(self) -> str:
        """The version of tokens: tokenizer and tokenisation settings. Raises ModelError."""
        return identity.corpus_version(self.settings, self.model_identity)

    @cached_property
    def lora_identity(self) -> dict[str, Any]:
        """The settings that LoRA parameters depend on; with a starting adapter only that there is one."""
        return identity.lora_identity(self.settings)

    @cached_property
    def warmup_scope(self) -> str:
        """The scope of the pinned warm-up: model, tokens, LoRA and warm-up settings, dtype."""
        return identity.warmup_scope(self.settings, self.model_identity, self.dtype, self.optimizer_state)

    @cached_property
    def optimizer_state(self) -> str | None:
        """The hash of the optimiser state that Adam's moments are taken from; None: the warm-up makes them. Raises
        UnreadableFile where none is found."""
        path = self.settings.warmup.optimizer_state
        return None if path is None else content_hash(path, self.lake.cache_file("model-files.json"))

    @cached_property
    def warmup(self) -> Artifact:
        """The warm-up's checkpoints. Raises NotMadeYet."""
        return self.shown("warmup_checkpoints")

    @cached_property
    def feature_identity(self) -> dict[str, Any]:
        """The settings and hashes that a feature row depends on beside its tokens. Raises NotMadeYet."""
        return identity.feature_identity(self.settings, self.model_identity, self.dtype, self.warmup)

    @cached_property
    def feature_version(self) -> str:
        """Today's feature version. Raises NotMadeYet before there is a warm-up."""
        return identity.feature_version(self.settings, self.model_identity, self.dtype, self.warmup)

    def version_of(self, table: str) -> str | None:
        """The version that artefacts of a table are made under today; None for a table that has none."""
        entry = table_named(table)
        scope = entry.scope if entry else "none"
        return {
            "none": lambda: None,
            "corpus": lambda: self.corpus_version,
            "warmup": lambda: self.warmup_scope,
            "features": lambda: self.feature_version,
        }[scope]()

    # -- what the lake shows -----------------------------------------------------------------------------------

    def shown(self, table: str, partition: str | None = None, part: str | None = None) -> Artifact:
        """The artefact that a partition shows under today's version (of a direction: for the strategy `part`).

        Raises NotMadeYet where there is none, with the asset to materialise first.
        """
        return self.lake.require(table, partition, self._scope(table, part))

    def shown_or_none(self, table: str, partition: str | None = None, part: str | None = None) -> Artifact | None:
        """As `shown`; None where there is none."""
        return self.lake.head(table, partition, self._scope(table, part))

    def show(self, artifact: Artifact, partition: str | None = None, part: str | None = None) -> Artifact:
        """Make an artefact what a partition shows under today's version."""
        return self.lake.point(artifact, partition, self._scope(artifact.table, part), self.run_id)

    def retire(self, table: str, partition: str | None = None) -> None:
        """Let a partition show nothing under today's version."""
        self.lake.retire(table, partition, self._scope(table, None))

    def _scope(self, table: str, part: str | None) -> str:
        return identity.within(self.version_of(table) or "", part)

    # -- making ------------------------------------------------------------------------------------------------

    def recipe(
        self,
        table: str,
        settings: Mapping[str, Any] | None = None,
        inputs: Mapping[str, "Artifact | Sequence[Artifact] | str"] | None = None,
        *,
        partition: str | None = None,
        version: str | None = None,
        lineage: Mapping[str, "Artifact | Sequence[Artifact] | str"] | None = None,
    ) -> Recipe:
        """What an artefact of a table of the registry is made from, under the table's stage version and today's
        version."""
        entry = table_named(table)
        if entry is None:
            raise KeyError(f"the registry (prism_assets/tables.py) has no table {table!r}")
        made_under = version if version is not None else self.version_of(table)
        return Recipe(table, entry.version, settings or {}, inputs or {}, lineage or {}, partition, made_under)

    def make(
        self,
        recipe: Recipe,
        compute: Callable[[], Content],
        lineage: "Callable[[], Mapping[str, Artifact | Sequence[Artifact] | str]] | None" = None,
    ) -> Made:
        """Find the artefact of a recipe, or compute and publish it, with what that cost in its notes.

        `lineage` is asked after the work: what the work turned out to read, beside what defines it.
        """
        found = self.lake.find(recipe)
        if found is not None:
            return Made(found, 0)
        stopwatch = Stopwatch()
        content = compute()
        if isinstance(content, Folder):
            # Its work is done while it is written.
            content = replace(content, write=_timed(content.write, stopwatch))
        else:
            content = replace(content, notes={**content.notes, "cost": stopwatch.cost()})
        if lineage is not None:
            recipe = replace(recipe, lineage={**recipe.lineage, **lineage()})
        return Made(self.lake.publish(recipe, content, run_id=self.run_id), 1)

    def progress(self, what: str, total: int | None, unit: str = "rows") -> AbstractContextManager[Progress]:
        """Progress over long work, on the terminal and in the run's log."""
        return progress(self.log, what, total, unit)

    # -- the model ---------------------------------------------------------------------------------------------

    @contextmanager
    def adapted(self, *, seed: int = 0, state: "Mapping[str, torch.Tensor] | None" = None) -> "Iterator[PeftModel]":
        """The base model with the adapter that the settings describe, at `state` where one is given. Loading is not
        counted as cost."""
        options = dict(self.settings.lora)
        with ExitStack() as stack:
            with uncounted():
                peft_model = stack.enter_context(self.model.adapted(**options, seed=seed, state=state))
            yield peft_model


def _timed(
    write: Callable[[Path], Mapping[str, Any] | None], stopwatch: Stopwatch
) -> Callable[[Path], Mapping[str, Any]]:
    def timed(folder: Path) -> Mapping[str, Any]:
        return {**(write(folder) or {}), "cost": stopwatch.cost()}

    return timed
