"""Shards as partitions of a Dagster instance, kept equal to the files of the inbox."""

from collections.abc import Iterable

import dagster as dg

from prism_assets.project import Project


def reconcile_shards(
    project: Project, instance: dg.DagsterInstance, live: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Make the instance's shards those that are live; returns the keys added and the keys removed."""
    name = project.shards.name
    assert name is not None
    live = list(dict.fromkeys(live))
    known = set(instance.get_dynamic_partitions(name))
    added = sorted(set(live) - known)
    removed = sorted(known - set(live))
    try:
        instance.add_dynamic_partitions(name, added)
    except Exception:
        # Another process may have added some of them since we looked; Dagster's storage then refuses all.
        for key in added:
            _add_unless_there(instance, name, key)
    for key in removed:
        instance.delete_dynamic_partition(name, key)
    return added, removed


def _add_unless_there(instance: dg.DagsterInstance, name: str, key: str) -> None:
    try:
        instance.add_dynamic_partitions(name, [key])
    except Exception:
        if not instance.has_dynamic_partition(name, key):
            raise
