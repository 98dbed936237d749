"""What the assets are partitioned by: shards of candidates, targets, and target × strategy."""

from typing import TYPE_CHECKING

import dagster as dg

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prism_assets.settings import Settings

# A shard is a file of the inbox; its key is <name>-<content hash>, so a shard never changes.
shards = dg.DynamicPartitionsDefinition(name="shard")


def targets_of(settings: "Settings") -> dg.StaticPartitionsDefinition:
    """One partition per target of `prism.yaml`."""
    return dg.StaticPartitionsDefinition(list(settings.targets))


def target_strategies_of(settings: "Settings") -> dg.MultiPartitionsDefinition:
    """One partition per target and strategy. Dagster orders the dimensions by name: `strategy` first."""
    return dg.MultiPartitionsDefinition(
        {"target": targets_of(settings), "strategy": dg.StaticPartitionsDefinition(list(settings.strategies))}
    )


def reconcile_shards(instance: dg.DagsterInstance, live: "Iterable[str]") -> tuple[list[str], list[str]]:
    """Make the instance's shards those that are live; returns the keys added and the keys removed."""
    live = list(dict.fromkeys(live))
    known = set(instance.get_dynamic_partitions(shards.name))
    added = sorted(set(live) - known)
    removed = sorted(known - set(live))
    try:
        instance.add_dynamic_partitions(shards.name, added)
    except Exception:
        # Another process may have added some of them since we looked; Dagster's storage then refuses all.
        for key in added:
            _add_unless_there(instance, key)
    for key in removed:
        instance.delete_dynamic_partition(shards.name, key)
    return added, removed


def _add_unless_there(instance: dg.DagsterInstance, key: str) -> None:
    try:
        instance.add_dynamic_partitions(shards.name, [key])
    except Exception:
        if not instance.has_dynamic_partition(shards.name, key):
            raise
