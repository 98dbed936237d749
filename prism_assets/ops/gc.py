"""`prism gc`: what no head, no chain of a head and no kept feature version needs, listed and then removed."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from prism_assets.catalog.lineage import all_references
from prism_assets.errors import DamagedArtifact, LakeError, ModelError
from prism_assets.identity import feature_versions, version_of_scope
from prism_assets.resources.lake import Artifact, Lake, upkeep
from prism_assets.tables import table_named, tables

if TYPE_CHECKING:
    import dagster as dg

    from prism_assets.stage import Stage

DEFAULT_MIN_AGE = 3600.0
DEFAULT_KEEP = 1


class Removal(NamedTuple):
    """An artefact that goes, with what lies beside it; or a leftover (table None)."""

    table: str | None
    fingerprint: str | None
    keys: tuple[str, ...]  # of the store; `upkeep.path_of` says where it lies
    bytes: int
    partition: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Plan:
    """What `collect` would remove, and what it keeps for now."""

    kept_versions: Sequence[str]  # the current one first
    dropped_versions: Sequence[str]
    heads: Sequence[Mapping[str, Any]]  # heads that go
    artifacts: Sequence[Removal]
    leftovers: Sequence[Removal]  # drafts of killed runs, damaged files, what is remembered of artefacts that are gone
    spared_for_age: int  # artefacts that nothing needs but that are too young to go
    spared_since: float  # what was made from then on stays, seconds since the epoch

    @property
    def bytes(self) -> int:
        """Bytes of all that goes."""
        return sum(one.bytes for one in (*self.artifacts, *self.leftovers))

    def by_table(self) -> dict[str, tuple[int, int]]:
        """Number and bytes of what goes, per table; what is no artefact counts as `leftovers`."""
        totals: dict[str, tuple[int, int]] = {}
        for one in (*self.artifacts, *self.leftovers):
            count, size = totals.get(one.table or "leftovers", (0, 0))
            totals[one.table or "leftovers"] = (count + 1, size + one.bytes)
        return dict(sorted(totals.items()))


class _Wanted(NamedTuple):
    """What decides what is kept."""

    known_versions: Collection[str]  # all feature versions in the lake
    versions: Sequence[str]  # those that are kept, the current one first
    scopes: Collection[str]  # of corpus and warm-up; empty: all
    inbox_shards: Collection[str] | None  # None: every shard counts as live
    running_since: float | None


def plan(
    lake: Lake,
    *,
    current_version: str | None = None,
    current_scopes: Collection[str] = (),
    inbox_shards: Collection[str] | None = None,
    keep: int = DEFAULT_KEEP,
    min_age: float = DEFAULT_MIN_AGE,
    running_since: float | None = None,
    now: float | None = None,
) -> Plan:
    """Find what is not needed. Reads headers and small tables; changes nothing.

    Needed is what a kept head shows, every artefact younger than `min_age` seconds or than the start of the oldest
    run in progress, and what these were made from, also where only rows name it. What an artefact merely looked at
    (an adapter: the selection that found its rows) is kept itself; what that was made from is not. All heads are
    kept but these, once they have not moved for `min_age`:

    - of feature versions other than the current one and the `keep` used last beside it; without `current_version`
      the one used last counts as current;
    - of scopes of the corpus and the warm-up that nothing needed was made from, other than `current_scopes`;
    - of retired shards: those in neither `inbox_shards` nor a live pool nor the index of a version that stays.

    Further kept are, for each older version that stays, the last selection of each target and strategy; the finished
    blocks of a shard that is not finished in the current version; and, while a run is in progress, every artefact of
    a table whose heads moved since it began, for the run may work from what they showed before.
    Raises DamagedArtifact where a kept head shows a file that cannot be read: what that needs is not known.
    """
    now = time.time() if now is None else now
    since = now - min_age if running_since is None else min(now - min_age, running_since)
    artifacts = {(one.table, one.fingerprint): one for one in lake.artifacts()}
    heads = lake.heads()
    known = [one.name for one in feature_versions(lake)]
    versions = _kept_versions(known, current_version, keep)
    wanted = _Wanted(known, versions, current_scopes, inbox_shards, running_since)
    kept, needed = _needed(lake, artifacts, heads, wanted, since)
    _, needed_at_any_age = _needed(lake, artifacts, heads, wanted._replace(running_since=None), float("inf"))
    kept_heads = {_head_id(head) for head in kept}
    return Plan(
        kept_versions=versions,
        dropped_versions=[name for name in known if not any(version_of_scope(head["scope"]) == name for head in kept)],
        heads=[head for head in heads if _head_id(head) not in kept_heads],
        artifacts=[_removal(lake, one) for key, one in artifacts.items() if key not in needed],
        leftovers=[
            Removal(None, None, (key,), upkeep.size_of(lake, key))
            for key in upkeep.leftovers(lake, now - min_age, {fingerprint for _, fingerprint in needed})
        ],
        spared_for_age=len(needed - needed_at_any_age),
        spared_since=since,
    )


_Key = tuple[str, str]  # table and fingerprint


def _kept_versions(known: Sequence[str], current: str | None, keep: int) -> list[str]:
    older = [name for name in known if name != current]
    if current is None:
        return older[: keep + 1]
    return [current, *older[:keep]]


def _needed(
    lake: Lake,
    artifacts: Mapping[_Key, Artifact],
    heads: Sequence[Mapping[str, Any]],
    wanted: _Wanted,
    since: float,
) -> tuple[list[Mapping[str, Any]], set[_Key]]:
    """The heads that are kept, and the artefacts that are needed."""
    live = _live_shards(lake, artifacts, heads, wanted)
    kept, by_scope = [], []
    for head in heads:
        table = table_named(head["table"])
        retired = live is not None and table is not None and table.by_shard and head["partition"] not in live
        if head["time"] >= since:
            kept.append(head)
        elif retired or _follows(head):  # see below
            continue
        elif version_of_scope(head["scope"]) in wanted.known_versions:
            if version_of_scope(head["scope"]) in wanted.versions:
                kept.append(head)
        elif not head["scope"] or not wanted.scopes or head["scope"] in wanted.scopes:
            kept.append(head)
        else:
            by_scope.append(head)
    _refuse_damaged(lake, artifacts, kept)
    roots = [_key(head) for head in kept]
    roots += [key for key, one in artifacts.items() if upkeep.changed_at(lake, one) >= since]
    roots += _last_of(lake, artifacts, wanted.versions[1:])
    roots += _unfinished_parts(artifacts, heads, wanted.versions[:1], live)
    if wanted.running_since is not None:
        moved = {head["table"] for head in heads if head["time"] >= wanted.running_since}
        roots += [key for key in artifacts if key[0] in moved]
    needed: set[_Key] = set()
    _add_chains(lake, artifacts, roots, needed)
    # A scope of the corpus or the warm-up stays whole while anything in it is needed.
    scopes = {head["scope"] for head in by_scope if _key(head) in needed}
    more = [head for head in by_scope if head["scope"] in scopes]
    _add_chains(lake, artifacts, [_key(head) for head in more], needed)
    # The head of a block follows the block; and no head goes while its artefact is spared for a run in progress.
    running = wanted.running_since is not None
    follow = [head for head in heads if (running or _follows(head)) and _key(head) in needed]
    return [*kept, *more, *follow], needed


def _live_shards(
    lake: Lake, artifacts: Mapping[_Key, Artifact], heads: Sequence[Mapping[str, Any]], wanted: _Wanted
) -> set[str] | None:
    if wanted.inbox_shards is None:
        return None
    live = set(wanted.inbox_shards)
    for head in heads:
        old = head["scope"] in wanted.known_versions and head["scope"] not in wanted.versions
        table = table_named(head["table"])
        if table is not None and table.lists_shards and _key(head) in artifacts and not old:
            live |= set(lake.read_table(artifacts[_key(head)], ["shard"])["shard"].to_pylist())
    return live


def _add_chains(lake: Lake, artifacts: Mapping[_Key, Artifact], roots: Iterable[_Key], needed: set[_Key]) -> None:
    """Add the roots and all they were made from to `needed`."""
    only_looked_at = set()
    waiting = list(roots)
    while waiting:
        key = waiting.pop()
        if key in needed or key not in artifacts:
            continue
        needed.add(key)
        for reference in all_references(lake, artifacts[key]):
            if reference.table is not None:
                above = (reference.table, str(reference.fingerprint))
                waiting.append(above) if reference.defines else only_looked_at.add(above)
    needed |= only_looked_at & artifacts.keys()


def _last_of(lake: Lake, artifacts: Mapping[_Key, Artifact], versions: Collection[str]) -> list[_Key]:
    """The last artefact of each partition (target and strategy, of a selection) in each of the versions."""
    kept = {one.name for one in tables() if one.last_stays}
    last: dict[tuple[str, str, str | None], Artifact] = {}
    for (table, _), one in artifacts.items():
        version = one.header.get("version")
        if table in kept and version is not None and version in versions:
            before = last.get((table, version, one.partition))
            if before is None or upkeep.changed_at(lake, before) < upkeep.changed_at(lake, one):
                last[table, version, one.partition] = one
    return [(one.table, one.fingerprint) for one in last.values()]


def _unfinished_parts(
    artifacts: Mapping[_Key, Artifact],
    heads: Sequence[Mapping[str, Any]],
    current: Collection[str],
    live: Collection[str] | None,
) -> list[_Key]:
    """All parts (blocks, of features) of the current version where a live shard has no whole in it: some may be that
    shard's."""
    by_shard = {one.name for one in tables() if one.by_shard}
    shards = {head["partition"] for head in heads if head["table"] in by_shard} if live is None else set(live)
    found = []
    for part in tables():
        whole = [head for head in heads if head["table"] == part.parts_of]
        finished = {head["partition"] for head in whole if version_of_scope(head["scope"]) in current}
        if part.parts_of is not None and not shards <= finished:
            found += [
                key for key, one in artifacts.items() if key[0] == part.name and one.header.get("version") in current
            ]
    return found


def _refuse_damaged(lake: Lake, artifacts: Mapping[_Key, Artifact], heads: Iterable[Mapping[str, Any]]) -> None:
    for head in heads:
        path = None if _key(head) in artifacts else upkeep.file_of(lake, *_key(head))
        if path is not None:
            raise DamagedArtifact(
                f"{path} is damaged, so what it was made from is not known. Run `prism run` first: it sets the "
                "file aside and makes it again."
            )


def _key(head: Mapping[str, Any]) -> _Key:
    return head["table"], head["fingerprint"]


def _head_id(head: Mapping[str, Any]) -> tuple[str, str, str | None]:
    return head["table"], head["scope"], head["partition"]


# -- what goes ----------------------------------------------------------------------------------------------------


def _removal(lake: Lake, artifact: Artifact) -> Removal:
    keys = upkeep.keys_of(lake, artifact.table, artifact.fingerprint)
    version = artifact.header.get("version")
    return Removal(artifact.table, artifact.fingerprint, keys, upkeep.size_of(lake, *keys), artifact.partition, version)


def _follows(head: Mapping[str, Any]) -> bool:
    """Whether a head goes and stays with the artefact that it shows."""
    table = table_named(head["table"])
    return table is not None and table.heads_follow


# -- removing ----------------------------------------------------------------------------------------------------


def collect(lake: Lake, plan: Plan) -> dict[str, tuple[int, int]]:
    """Remove what the plan names; returns number and bytes per table.

    Heads go first. What a head has come to show since the plan was made stays. An artefact leaves by a rename, so
    no reader finds half of one; a kill in between leaves a draft that the next `prism gc` clears.
    """
    now_shown = {_head_id(head): head for head in lake.heads()}
    for head in plan.heads:
        if now_shown.get(_head_id(head), {}).get("time") == head["time"]:
            lake.retire(head["table"], head["partition"], head["scope"])
    shown = {_key(head) for head in lake.heads()}
    removed: dict[str, tuple[int, int]] = {}
    for one in (*plan.artifacts, *plan.leftovers):
        if (one.table, one.fingerprint) in shown:
            continue
        for key in one.keys:
            upkeep.discard(lake, key)
        count, size = removed.get(one.table or "leftovers", (0, 0))
        removed[one.table or "leftovers"] = (count + 1, size + one.bytes)
    return dict(sorted(removed.items()))


# -- for the command ---------------------------------------------------------------------------------------------


class Current(NamedTuple):
    """What today's settings work with; None and empty where the model cannot tell."""

    current_version: str | None
    current_scopes: tuple[str, ...]
    inbox_shards: tuple[str, ...] | None


def what_is_current(stage: "Stage") -> Current:
    """The feature version, the corpus and warm-up scopes and the shards of the inbox of today's settings."""
    from prism_assets.corpus.candidates import inbox_files

    inbox = stage.settings.candidates.inbox
    shards = tuple(inbox_files(stage, at_rest_seconds=0)) if inbox.is_dir() else None
    try:
        scopes = (stage.corpus_version, stage.warmup_scope)
    except ModelError:
        return Current(None, (), shards)
    try:
        return Current(stage.feature_version, scopes, shards)
    except LakeError:  # no warm-up yet
        return Current(None, scopes, shards)


class RunInProgress(NamedTuple):
    """A Dagster run that has not ended."""

    run_id: str
    since: float  # seconds since the epoch


def runs_in_progress(instance: "dg.DagsterInstance") -> list[RunInProgress]:
    """The runs of the instance that have started and not ended."""
    import dagster as dg

    names = ("STARTING", "STARTED", "CANCELING")
    statuses = [dg.DagsterRunStatus[name] for name in names]
    records = instance.get_run_records(dg.RunsFilter(statuses=statuses))
    return [RunInProgress(r.dagster_run.run_id, r.start_time or r.create_timestamp.timestamp()) for r in records]


def summary(
    lake: Lake, plan: Plan, removed: Mapping[str, tuple[int, int]] | None, running: Sequence[RunInProgress]
) -> dict[str, Any]:
    """What `prism gc --json` prints; `removed` is None where nothing was removed."""
    tables = plan.by_table() if removed is None else removed
    return {
        "removed": removed is not None,
        "kept_versions": list(plan.kept_versions),
        "dropped_versions": list(plan.dropped_versions),
        "heads": len(plan.heads),
        "tables": {table: {"artifacts": count, "bytes": size} for table, (count, size) in tables.items()},
        "bytes": sum(size for _, size in tables.values()),
        "spared_for_age": plan.spared_for_age,
        "runs_in_progress": [run.run_id for run in running],
        "artifacts": [
            {
                "table": one.table,
                "fingerprint": one.fingerprint,
                "partition": one.partition,
                "version": one.version,
                "bytes": one.bytes,
                "paths": [str(upkeep.path_of(lake, key)) for key in one.keys],
            }
            for one in (*plan.artifacts, *plan.leftovers)
        ],
    }
