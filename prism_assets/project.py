"""A project in a Dagster instance: its name there, and everything that is named after it.

Two projects in one instance, or a project beside other definitions, must not collide: asset keys carry the prefix,
and so do jobs, sensors, schedules, resources and the dynamic partitions of shards.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import dagster as dg

from prism_assets.identity import ENGINES
from prism_assets.settings import Settings
from prism_assets.tables import Asset, asset_named

MODEL_POOL = "model"  # its slots keep steps from loading a model side by side


@dataclass(frozen=True)
class Project:
    """The settings of a project and its prefixes; builds the keys and names of its definitions."""

    settings: Settings
    key_prefix: tuple[str, ...] = ()
    group_prefix: str = ""

    @classmethod
    def of(cls, settings: Settings, key_prefix: str | Sequence[str] = (), group_prefix: str = "") -> "Project":
        """A project with a prefix given as one part or as several."""
        return cls(settings, (key_prefix,) if isinstance(key_prefix, str) else tuple(key_prefix), group_prefix)

    @property
    def name(self) -> str:
        """What the project is called in an instance; empty for one without a prefix."""
        return "/".join(self.key_prefix)

    def key(self, asset: str) -> dg.AssetKey:
        """The key of an asset."""
        return dg.AssetKey([*self.key_prefix, asset])

    def keys(self, assets: Iterable[str]) -> list[dg.AssetKey]:
        """The keys of several assets."""
        return [self.key(asset) for asset in assets]

    def named(self, what: str) -> str:
        """The name of a job, sensor, schedule or resource: `<prefix>_<what>`."""
        return "_".join([*self.key_prefix, what])

    # -- partitions --------------------------------------------------------------------------------------------

    @cached_property
    def shards(self) -> dg.DynamicPartitionsDefinition:
        """A shard is a file of the inbox; its key is <name>-<content hash>, so a shard never changes."""
        return dg.DynamicPartitionsDefinition(name="/".join([*self.key_prefix, "shard"]))

    @cached_property
    def targets(self) -> dg.StaticPartitionsDefinition:
        """One partition per target of `prism.yaml`."""
        return dg.StaticPartitionsDefinition(list(self.settings.targets))

    @cached_property
    def target_strategies(self) -> dg.MultiPartitionsDefinition:
        """One partition per target and strategy. Dagster orders the dimensions by name: `strategy` first."""
        strategies = dg.StaticPartitionsDefinition(list(self.settings.strategies))
        return dg.MultiPartitionsDefinition({"target": self.targets, "strategy": strategies})

    def partitions_of(self, asset: Asset) -> dg.PartitionsDefinition | None:
        """What an asset is partitioned by."""
        return {
            None: None,
            "shard": self.shards,
            "target": self.targets,
            "target_strategy": self.target_strategies,
        }[asset.partitions]

    # -- assets ------------------------------------------------------------------------------------------------

    def asset(
        self,
        name: str,
        *,
        group: str,
        kinds: set[str],
        deps: Sequence[str | dg.AssetDep] = (),
        checks: "Sequence[Check]" = (),
        loads_model: bool = False,
        **more: Any,
    ) -> Any:
        """The decorator `dagster.asset` for an asset of the registry: keys, partitions, versions and resources filled
        in."""
        entry = asset_named(name)
        partitions = self.partitions_of(entry)
        return dg.asset(
            key=self.key(name),
            group_name="_".join(filter(None, [self.group_prefix, group])),
            kinds=kinds,
            partitions_def=partitions,
            backfill_policy=dg.BackfillPolicy.single_run() if partitions is not None else None,
            code_version=str(entry.table.version),
            deps=[self._dep(one) for one in deps],
            check_specs=[
                dg.AssetCheckSpec(one.name, asset=self.key(name), description=one.description) for one in checks
            ],
            required_resource_keys={self.named(one) for one in ENGINES},
            config_schema={},  # none: what an asset does is set in prism.yaml alone
            pool=MODEL_POOL if loads_model else None,
            **more,
        )

    def all_shards_of(self, asset: str) -> dg.AssetDep:
        """A dependency on every partition of an asset."""
        return dg.AssetDep(self.key(asset), partition_mapping=dg.AllPartitionMapping())

    def _dep(self, dep: str | dg.AssetDep) -> dg.AssetDep:
        return dep if isinstance(dep, dg.AssetDep) else dg.AssetDep(self.key(dep))


@dataclass(frozen=True)
class Check:
    """A check of an asset: what it promises, and how severe a failure is.

    Calling it gives its result: `ROWS_ACCEPTED(not rejected, rejected=len(rejected))`.
    """

    name: str
    description: str
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.WARN

    def __call__(self, passed: bool, **facts: Any) -> "CheckResult":
        return CheckResult(self, passed, facts)


@dataclass(frozen=True)
class CheckResult:
    """The result of a check for one partition."""

    check: Check
    passed: bool
    facts: dict[str, Any]
