"""When automation makes an asset again."""

import dagster as dg

from prism_assets.compat import any_deps_changed
from prism_assets.project import Project
from prism_assets.tables import Asset, Needs

C = dg.AutomationCondition

# `since(newly_requested)` keeps a change that comes while the asset is being made; `eager` would lose it. A request is
# seen as new on the tick after it, and in `since` a reset beats a trigger of the same tick: without `& ~trigger` a
# change between the request and the next tick would be lost.
_TRIGGER = any_deps_changed() | C.code_version_changed()
_CHANGED = _TRIGGER.since(C.newly_requested() & ~_TRIGGER)
# Not `on_missing`: that ignores what was missing when the daemon first looked. What failed waits for its inputs to
# change, or for a manual run.
_MISSING = C.missing() & ~C.execution_failed()

_WHEN_MISSING = (
    (_MISSING | C.code_version_changed().since(C.newly_requested())) & ~C.in_progress() & ~C.any_deps_missing()
)
_FOLLOW = (_MISSING | _CHANGED) & ~C.any_deps_missing() & ~C.any_deps_in_progress() & ~C.in_progress()
# Under steady arrival some shard is always in progress: what reads all shards must not wait for a quiet moment.
_FOLLOW_ARRIVALS = (_MISSING | _CHANGED) & ~C.in_progress()


class NotFullPool(dg.AutomationCondition):
    """True for every partition but those of the strategy `full`: training on the whole pool is started manually."""

    @property
    def name(self) -> str:
        """The name that the UI shows."""
        return "not_full_pool"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        """The candidate partitions without those of `full`."""
        keys = context.candidate_subset.expensively_compute_partition_keys()
        allowed = {key for key in keys if not key.startswith("full|")}
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection_with_partition_keys(allowed))


def condition_of(project: Project, asset: Asset) -> dg.AutomationCondition | None:
    """The condition of an asset; None for one that is started manually only."""
    usual: dict[str | None, dg.AutomationCondition | None] = {
        "when_missing": _WHEN_MISSING,
        "follow": _FOLLOW,
        "follow_arrivals": _FOLLOW_ARRIVALS,
        None: None,
    }
    condition = usual[asset.condition]
    if condition is None:
        return None
    if asset.needs is not None:
        condition = condition & _there(project, asset.needs)
    if asset.partitions == "target_strategy":
        condition = condition & NotFullPool()
    return condition


def _there(project: Project, needs: Needs) -> dg.AutomationCondition:
    """Those that follow arrivals are not held back by inputs in progress, only by what they cannot do without."""
    if needs.asset is None:
        return ~C.any_deps_missing()
    there = ~C.missing() | C.will_be_requested() if needs.asked_for else ~C.missing()
    return C.any_deps_match(there).allow(dg.AssetSelection.assets(project.key(needs.asset)))
