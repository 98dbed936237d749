"""Versions under which results are kept side by side, scopes of heads, and keys of partitions.

A version is a hash of exactly what its results depend on, so equal versions mean comparable numbers. Keys are the names
of partitions, in Dagster and in the lake.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.resources.lake.recipe import Artifact, digest
from prism_assets.settings import Settings
from prism_assets.tables import table_named, tables

if TYPE_CHECKING:
    from prism_assets.resources.lake import Lake
    from prism_assets.resources.model import ModelIdentity

_VERSION_LENGTH = 12

ENGINES = LAKE, MODEL, INDEX = "lake", "language_model", "vector_store"  # names of what every asset works with


# -- versions -----------------------------------------------------------------------------------------------------


def corpus_version(settings: Settings, model: "ModelIdentity") -> str:
    """What tokens depend on beside the records: tokenizer and template. Heads of the corpus are kept under it."""
    return digest([_stage("candidates"), model.tokenizer, settings.tokenization.model_dump()])[:_VERSION_LENGTH]


def lora_identity(settings: Settings) -> dict[str, Any]:
    """What the LoRA parameters depend on; with a starting adapter its own configuration counts, not `lora:`."""
    return {"adapter": True} if settings.model.adapter else settings.lora.model_dump()


def warmup_scope(settings: Settings, model: "ModelIdentity", dtype: str, optimizer_state: str | None = None) -> str:
    """What the pinned warm-up belongs to: model, tokens, LoRA and warm-up settings with their generation, the content
    of an optimiser state where moments are taken from one; no pool."""
    return digest(
        [
            _stage("warmup_sample"),
            _stage("warmup_checkpoints"),
            model.fingerprint,
            corpus_version(settings, model),
            lora_identity(settings),
            settings.warmup.model_dump(exclude={"optimizer_state"}),
            dtype,
            *([optimizer_state] if optimizer_state else []),
        ]
    )[:_VERSION_LENGTH]


def feature_identity(settings: Settings, model: "ModelIdentity", dtype: str, warmup: Artifact) -> dict[str, Any]:
    """What a candidate's feature row depends on beside its tokens."""
    return {
        "engine": _stage("candidate_features"),
        "model": model.fingerprint,
        "warmup": warmup.content_hash,
        "lora": lora_identity(settings),
        "dtype": dtype,
        **settings.features.model_dump(exclude={"token_budget"}),
    }


def feature_version(settings: Settings, model: "ModelIdentity", dtype: str, warmup: Artifact) -> str:
    """The version under which features, index and directions live side by side with those of other versions."""
    identity = feature_identity(settings, model, dtype, warmup)
    return digest([corpus_version(settings, model), identity])[:_VERSION_LENGTH]


def hidden_state_identity(model: "ModelIdentity", dtype: str) -> dict[str, Any]:
    """What hidden states depend on beside the tokens: the model where fine-tuning starts. A fresh LoRA is zero, so
    `lora:` is no part of it."""
    return {"version": _stage("hidden_states"), "model": model.fingerprint, "dtype": dtype}


def _stage(table: str) -> int:
    found = table_named(table)
    assert found is not None, table
    return found.version


class FeatureVersion(NamedTuple):
    """A feature version that has heads in the lake."""

    name: str
    used: float  # when a run last pointed one of its heads, seconds since the epoch


def feature_versions(lake: "Lake") -> list[FeatureVersion]:
    """The feature versions in the lake, the one used last first."""
    used: dict[str, float] = {}
    for table in tables():
        if table.scope == "features" and not table.heads_follow:
            for head in lake.heads(table.name):
                name = version_of_scope(head["scope"])
                used[name] = max(used.get(name, 0.0), head["time"])
    return sorted((FeatureVersion(*item) for item in used.items()), key=lambda one: (-one.used, one.name))


# -- scopes -------------------------------------------------------------------------------------------------------


def within(version: str, part: str | None) -> str:
    """The scope of heads that are kept under a version and a part of it (a direction: its strategy)."""
    return f"{version}/{part}" if part else version


def version_of_scope(scope: str) -> str:
    """The version that a scope is, or begins with."""
    return scope.partition("/")[0]


# -- keys ---------------------------------------------------------------------------------------------------------


def shard_name(key: str) -> str:
    """The file name part of a shard key `<name>-<content hash>`."""
    return key.rpartition("-")[0] or key


def join_key(target: str, strategy: str) -> str:
    """The partition key of a target and a strategy. Dagster joins the dimensions in order of their names."""
    return f"{strategy}|{target}"


def split_key(key: str) -> tuple[str, str]:
    """Target and strategy of a partition key."""
    strategy, _, target = key.partition("|")
    return target, strategy


def base_key(target: str) -> str:
    """The head of what is measured of the model where fine-tuning starts."""
    return join_key(target, "base")


def seed_partition(key: str, seed: int) -> str:
    """The head of one seed of a target and strategy."""
    return f"{key}/seed-{seed}"


def split_name(target: str, split: int) -> str:
    """The name of a target in a split of an experiment. Split 0 is the target itself, so that what `prism run` made is
    found."""
    return target if split == 0 else f"{target}/split-{split}"


def target_of_split(name: str) -> str:
    """The target of a `split_name`."""
    return name.partition("/split-")[0]


def trial_partition(target: str, strategy: str, split: int, seed: int) -> str:
    """The head of one trial of an experiment."""
    return seed_partition(join_key(f"{target}/split-{split}", strategy), seed)


def target_of_trial(partition: str) -> str:
    """The target of a trial's head."""
    return split_key(partition)[0].partition("/split-")[0]
