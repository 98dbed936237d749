"""docs/reference/assets.md, from the definitions and the registry."""

import sys
from collections.abc import Iterator
from typing import Any

from prism_assets.pages.markdown import codes, page, prose, table
from prism_assets.tables import ASSETS, Asset

_HEAD = """# Assets, checks and jobs

What Dagster shows of a project, made from the definitions by `python -m prism_assets.pages`. With a `key_prefix` all
names carry it. [Design](../design.md#the-asset-graph) says why the graph has this shape, [Tables](tables.md) what the
assets publish, [Operating it](../operations.md#checks) what to do about a failed check.

A partition is a `shard` (a file of the inbox), a `target`, or a `target` and a strategy. "By automation" says when the
sensor `automation` makes an asset.
"""
_PARTITIONS = {None: "none", "shard": "`shard`", "target": "`target`", "target_strategy": "`target` × strategy"}
_CONDITIONS = {
    None: "never",
    "when_missing": "where it is missing",
    "follow": "when an input changed",
    "follow_arrivals": "when an input changed, whether or not other shards are in progress",
    "follow_selections": "when an input changed and all selections of an arrival are made",
    "follow_evaluations": "when an evaluation changed",
}
_ONLY_WHERE_SAID = ", and only with `train: on_arrival`"


def assets_page() -> str:
    """The page as Markdown: assets in the order of the registry, each with its checks; jobs, schedules, sensors."""
    definitions = _definitions()
    graph = definitions.resolve_asset_graph()
    nodes = {key.path[-1]: graph.get(key) for key in graph.get_all_asset_keys()}
    rows = [
        [
            f"[`{one.name}`](#{one.name})",
            nodes[one.name].group_name,
            _inputs(nodes[one.name]),
            _PARTITIONS[one.partitions],
        ]
        for one in ASSETS
    ]
    parts = [_HEAD, table(["asset", "group", "made from", "partitions"], rows)]
    for one in ASSETS:
        parts += [f"## `{one.name}`", prose(nodes[one.name].description), _facts(one, nodes[one.name])]
        parts += _checks(graph, one.name)
    return page(*parts, *_automation(definitions))


def _definitions() -> Any:
    """Those of a project with one target and default settings; no file is read for them."""
    from prism_assets import Settings, build_definitions

    files = {"examples": "target.jsonl", "eval": "eval.jsonl"}
    return build_definitions(Settings.model_validate({"targets": {"target": files}}))


def _inputs(node: Any) -> str:
    order = [one.name for one in ASSETS]
    return codes(sorted((key.path[-1] for key in node.parent_keys), key=order.index))


def _facts(asset: Asset, node: Any) -> str:
    commands = [f"prism {one}" for one in asset.commands]
    facts = {
        "tables": ", ".join(f"[`{one.name}`](tables.md#{one.name})" for one in asset.tables),
        "kinds": codes(sorted(node.kinds)),
        "sections of `prism.yaml` that it reads": codes(asset.reads),
        "job": codes(filter(None, [asset.job])),
        "commands": codes(commands),
        "by automation": _CONDITIONS[asset.condition] + (_ONLY_WHERE_SAID if asset.fine_tunes else ""),
        "pool": codes(sorted(node.pools)),
    }
    return "".join(f"- {what}: {words}\n" for what, words in facts.items() if words != "–")


def _checks(graph: Any, asset: str) -> Iterator[str]:
    keys = sorted((one for one in graph.asset_check_keys if one.asset_key.path[-1] == asset), key=lambda one: one.name)
    if keys:
        rows = [[f"`{one.name}`", prose(graph.get_check_spec(one).description)] for one in keys]
        yield table(["check", "passes where"], rows)


def _automation(definitions: Any) -> Iterator[str]:
    repository = definitions.get_repository_def()
    jobs = [one for one in repository.get_all_jobs() if not one.name.startswith("__")]
    yield "## Jobs"
    yield table(["job", "what it makes"], [[f"`{one.name}`", prose(one.description)] for one in _sorted(jobs)])
    yield (
        "## Schedules\n\nAll start switched off, but `nightly_training` where `train: nightly` is set; turn them on in "
        "the UI under Automation. Times are UTC."
    )
    schedules = [
        [f"`{one.name}`", f"`{one.cron_schedule}`", f"`{one.job_name}`", prose(one.description)]
        for one in _sorted(repository.schedule_defs)
    ]
    yield table(["schedule", "cron", "job", "what it does"], schedules)
    yield "## Sensors\n\nAll start switched on; they run while `prism ui` or a Dagster daemon does."
    sensors = [
        [
            f"`{one.name}`",
            str(one.minimum_interval_seconds),
            prose(one.description) or "Requests what its inputs call for.",
        ]
        for one in _sorted(repository.sensor_defs)
    ]
    yield table(["sensor", "seconds between looks", "what it does"], sensors)


def _sorted(named: Any) -> list[Any]:
    return sorted(named, key=lambda one: one.name)


if __name__ == "__main__":
    sys.stdout.write(assets_page())  # of the code, none of it data
