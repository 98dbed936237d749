"""When automation makes an asset again."""

import dagster as dg

from prism_assets.compat import any_deps_changed
from prism_assets.project import Project
from prism_assets.tables import Asset, Needs

C = dg.AutomationCondition


class PartitionMadeInOneRun(dg.AutomationCondition):
    """True for the partitions of an input whose latest run makes the asset too.

    Dagster's `executed_with_root_target` says so of the input's last partition alone: of many that were made in one run
    all the others would be asked for again.
    """

    @property
    def name(self) -> str:
        """The name that the UI shows."""
        return "partition_made_in_one_run"

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        """The candidate partitions of the input whose latest run selects the asset."""
        candidates, asset = context.candidate_subset, context.root_context.key
        if context.partitions_def is None:
            return dg.AutomationResult(context, context.get_empty_subset())
        instance = context.asset_graph_view.instance
        made_both: dict[str, bool] = {}  # by run

        def together(key: str) -> bool:
            of_key = dg.AssetRecordsFilter(context.key, asset_partitions=[key])
            records = instance.fetch_materializations(of_key, limit=1).records
            run_id = records[0].run_id if records else ""
            if run_id not in made_both:
                run = instance.get_run_by_id(run_id) if run_id else None
                made_both[run_id] = run is not None and asset in (run.asset_selection or ())
            return made_both[run_id]

        keys = {key for key in candidates.expensively_compute_partition_keys() if together(key)}
        return dg.AutomationResult(context, candidates.compute_intersection_with_partition_keys(keys))


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


def _kept(trigger: dg.AutomationCondition) -> dg.AutomationCondition:
    """A change that stays true until the asset is asked for.

    `since(newly_requested)` keeps one that comes while the asset is being made; `eager` would lose it. A request is
    seen as new on the tick after it, and in `since` a reset beats a trigger of the same tick: without `& ~trigger` a
    change between the request and the next tick would be lost.
    """
    return trigger.since(C.newly_requested() & ~trigger)


_MADE_TOGETHER = PartitionMadeInOneRun()
_CHANGED = _kept(any_deps_changed(unless=_MADE_TOGETHER) | C.code_version_changed())
# Not `on_missing`: that ignores what was missing when the daemon first looked. What failed waits for its inputs to
# change, or for a manual run.
_MISSING = C.missing() & ~C.execution_failed()

_WHEN_MISSING = (
    (_MISSING | C.code_version_changed().since(C.newly_requested())) & ~C.in_progress() & ~C.any_deps_missing()
)
_FOLLOW = (_MISSING | _CHANGED) & ~C.any_deps_missing() & ~C.any_deps_in_progress() & ~C.in_progress()
# All selections of an arrival are made before any of them is trained on, and one that was made again with the same
# content asks for no training.
_SELECTION_CHANGED = _kept(any_deps_changed(unless=_MADE_TOGETHER, or_requested=False) | C.code_version_changed())
_FOLLOW_SELECTIONS = (
    (_MISSING | _SELECTION_CHANGED)
    & ~C.any_deps_missing()
    & ~C.any_deps_in_progress()
    & ~C.any_deps_match(C.will_be_requested())
    & ~C.in_progress()
)
# Under steady arrival some shard is always in progress: what reads all shards must not wait for a quiet moment.
_FOLLOW_ARRIVALS = (_MISSING | _CHANGED) & ~C.in_progress()


def condition_of(project: Project, asset: Asset) -> dg.AutomationCondition | None:
    """The condition of an asset; None for one that is started manually only."""
    usual: dict[str | None, dg.AutomationCondition | None] = {
        "when_missing": _WHEN_MISSING,
        "follow": _FOLLOW,
        "follow_arrivals": _FOLLOW_ARRIVALS,
        "follow_selections": _FOLLOW_SELECTIONS,
        "follow_evaluations": _follow_evaluations(project),
        None: None,
    }
    condition = usual[asset.condition]
    if condition is None or (asset.fine_tunes and project.settings.train != "on_arrival"):
        return None
    if asset.needs is not None:
        condition = condition & _there(project, asset.needs)
    if asset.partitions == "target_strategy":
        condition = condition & NotFullPool()
    return condition


def _follow_evaluations(project: Project) -> dg.AutomationCondition:
    """A report compares what was evaluated: a selection that nothing was trained on yet changes none of it."""
    trigger = (
        any_deps_changed(unless=_MADE_TOGETHER, only=dg.AssetSelection.assets(project.key("evaluation")))
        | C.code_version_changed()
    )
    return (_MISSING | _kept(trigger)) & ~C.any_deps_missing() & ~C.any_deps_in_progress() & ~C.in_progress()


def _there(project: Project, needs: Needs) -> dg.AutomationCondition:
    """Those that follow arrivals are not held back by inputs in progress, only by what they cannot do without."""
    if needs.asset is None:
        return ~C.any_deps_missing()
    there = ~C.missing() | C.will_be_requested() if needs.asked_for else ~C.missing()
    return C.any_deps_match(there).allow(dg.AssetSelection.assets(project.key(needs.asset)))
