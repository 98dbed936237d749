"""Runs over many partitions of target and strategy: what fills a rectangle is one run.

Dagster's automation asks for a backfill, which becomes a run for each key of the smaller dimension. What does little
more than start (a selection takes seconds, a process that loads Dagster, torch and a model as many) is better one run
than many.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import dagster as dg

from prism_assets.compat import with_run_requests
from prism_assets.identity import join_key
from prism_assets.project import Project
from prism_assets.tables import ASSETS

RANGE_START, RANGE_END = "dagster/asset_partition_range_start", "dagster/asset_partition_range_end"


class AutomationSensor(dg.AutomationConditionSensorDefinition):
    """Dagster's sensor of automation conditions, which asks for all partitions of `joined` in one run."""

    def __init__(self, project: Project, joined: dg.AssetKey, **named: Any) -> None:
        # From the code location's process: the daemon's own evaluation knows no condition of ours.
        super().__init__(use_user_code_server=True, **named)
        self._project, self._joined = project, joined

    def evaluate_tick(self, context: dg.SensorEvaluationContext) -> Any:
        """As Dagster does, with fewer requests."""
        tick = super().evaluate_tick(context)
        return with_run_requests(tick, joined_requests(self._project, tick.run_requests or [], self._joined))


def joined_requests(project: Project, requests: Sequence[dg.RunRequest], asset: dg.AssetKey) -> list[dg.RunRequest]:
    """The requests; the part of a backfill that is `asset`, by target and strategy, is replaced by as few runs as cover
    it. Where the backfill makes what the asset is made from too it stays as it is, for the sake of their order."""
    names = [one.name for one in ASSETS]
    before = set(project.keys(names[: names.index(asset.path[-1])]))
    joined: list[dg.RunRequest] = []
    for request in requests:
        subset = request.asset_graph_subset
        if subset is None or asset not in subset.asset_keys or before & subset.asset_keys:
            joined.append(request)
            continue
        keys = set(subset.partitions_subsets_by_asset_key[asset].get_partition_keys())
        ranges = range_tags(project, keys)
        joined += [dg.RunRequest(asset_selection=[asset], tags={**request.tags, **tags}) for tags in ranges]
        if rest := subset.asset_keys - {asset}:
            joined.append(dg.RunRequest.for_asset_graph_subset(subset.filter_asset_keys(rest), request.tags))
    return joined


def range_tags(project: Project, keys: Collection[str]) -> list[dict[str, str]]:
    """Tags of runs that make the partitions `<strategy>|<target>`: as few as consecutive strategies have the same
    consecutive targets."""
    targets, strategies = list(project.settings.targets), list(project.settings.strategies)
    wanted = {one: tuple(target for target in targets if join_key(target, one) in keys) for one in strategies}
    return [
        {RANGE_START: join_key(part[0], group[0]), RANGE_END: join_key(part[-1], group[-1])}
        for group in _consecutive(strategies, wanted)
        for part in _runs(wanted[group[0]], targets)
    ]


def _consecutive(strategies: Sequence[str], wanted: Mapping[str, tuple[str, ...]]) -> Iterator[list[str]]:
    """Strategies that follow each other and want the same, which is something."""
    group: list[str] = []
    for one in strategies:
        if group and wanted[one] != wanted[group[0]]:
            yield group
            group = []
        if wanted[one]:
            group.append(one)
    if group:
        yield group


def _runs(some: Sequence[str], of: Sequence[str]) -> Iterator[list[str]]:
    """The parts of `some` without a gap among `of`."""
    part = [some[0]]
    for before, after in pairwise(some):
        if of.index(after) != of.index(before) + 1:
            yield part
            part = []
        part.append(after)
    yield part
