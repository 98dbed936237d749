"""A project beside others: prefixes, somebody's own definitions, two projects in one instance, the component."""

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from conftest import make_rows
from prism_assets import build_definitions
from prism_assets.ops.pipeline import run_pipeline
from prism_assets.project import Project as Named
from prism_assets.tables import ASSETS, JOBS

SMALL = {"strategies": ["prism", "random"], "seeds": [0]}


@pytest.fixture(autouse=True)
def blank_plots(monkeypatch):
    """Drawing is half of the time of a run."""
    from prism_assets.plots import canvas

    monkeypatch.setattr(canvas, "png", lambda figure: b"no picture")


@dg.asset
def report() -> None:
    """Somebody's own asset of a name that we use too."""


def keys(definitions: dg.Definitions) -> set[str]:
    return {key.to_user_string() for key in definitions.resolve_asset_graph().get_all_asset_keys()}


def test_a_prefix_stands_before_everything_that_has_a_name(make_project, tmp_path):
    project = make_project(tmp_path / "project")
    found = build_definitions(project.settings, key_prefix=["team", "acme"], group_prefix="acme")
    graph = found.resolve_asset_graph()
    assert keys(found) == {f"team/acme/{one.name}" for one in ASSETS}
    assert all(graph.get(key).group_name.startswith("acme_") for key in graph.get_all_asset_keys())
    assert {job.name for job in found.jobs} == {f"team_acme_{name}" for name in (*JOBS, "verify_lake")}
    named = [*found.sensors, *found.schedules]
    assert named and all(one.name.startswith("team_acme_") for one in named)
    assert all(name.startswith("team_acme_") for name in found.resources)
    assert graph.get(dg.AssetKey(["team", "acme", "candidates"])).partitions_def.name == "team/acme/shard"
    assert {key.asset_key.path[0] for key in graph.asset_check_keys} == {"team"}


def test_it_can_be_merged_with_definitions_that_have_an_asset_a_resource_and_an_executor_of_their_own(
    make_project, tmp_path
):
    project = make_project(tmp_path / "project")
    theirs = dg.Definitions([report], executor=dg.multiprocess_executor, resources={"lake": "a lake of theirs"})
    ours = build_definitions(project.settings, key_prefix="prism", executor=None)
    merged = dg.Definitions.merge(theirs, ours)
    dg.Definitions.validate_loadable(merged)
    assert {"report", "prism/report"} <= keys(merged)
    assert merged.resources["lake"] == "a lake of theirs"


def test_two_projects_merge_into_one_code_location(make_project, tmp_path):
    first, second = (make_project(tmp_path / name) for name in ("first", "second"))
    merged = dg.Definitions.merge(
        build_definitions(first.settings, key_prefix="first"), build_definitions(second.settings, key_prefix="second")
    )
    dg.Definitions.validate_loadable(merged)
    assert len(keys(merged)) == 2 * len(ASSETS)


def test_two_projects_in_one_instance_leave_each_other_alone(make_project, tmp_path):
    first, second = (make_project(tmp_path / name, **SMALL) for name in ("first", "second"))
    second.add("more", make_rows(10, 77))
    named = {"first": first, "second": second}

    def run(name: str, instance: dg.DagsterInstance) -> int:
        project = Named.of(named[name].settings, name)
        results = run_pipeline(project, build_definitions(project.settings, key_prefix=name), instance)
        return sum(result.computed for result in results)

    with dg.DagsterInstance.ephemeral() as instance:
        assert run("first", instance) > 10 and run("second", instance) > 10
        shards = {name: set(instance.get_dynamic_partitions(f"{name}/shard")) for name in named}
        assert len(shards["first"]) == 2 and len(shards["second"]) == 3
        assert run("first", instance) == 0
        assert set(instance.get_dynamic_partitions("second/shard")) == shards["second"]
        assert instance.get_materialized_partitions(dg.AssetKey(["second", "candidates"])) == shards["second"]
    # What was made does not know what the project is called.
    alone = second.copy(tmp_path / "alone")
    assert sum(alone.run().values()) == 0


def test_one_project_has_one_lake_and_two_names_may_share_a_home(tmp_path):
    from prism_assets.errors import UserMistake
    from prism_assets.ops.home import claim_home

    home = tmp_path / "home"
    home.mkdir()
    for name in ("", "first", "team/second"):
        claim_home(home, tmp_path / f"lake of {name.replace('/', ' ')}", name)
    claim_home(home, tmp_path / "lake of first", "first")
    with pytest.raises(UserMistake, match="'first'.*retire each other's shards.*key_prefix"):
        claim_home(home, tmp_path / "another", "first")


def test_a_workspace_of_two_locations_loads_and_names_no_warning_of_ours(make_project, tmp_path):
    entries = []
    for name in ("first", "second"):
        project = make_project(tmp_path / name)
        location = tmp_path / f"{name}_location.py"
        location.write_text(
            "from prism_assets import build_definitions, load_settings\n"
            f"defs = build_definitions(load_settings({str(project.config)!r}), key_prefix={name!r})\n"
        )
        entries.append({"python_file": {"relative_path": location.name, "attribute": "defs", "location_name": name}})
    workspace = tmp_path / "workspace.yaml"
    workspace.write_text(yaml.safe_dump({"load_from": entries}))
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [Path(sys.executable).with_name("dagster"), "definitions", "validate", "-w", workspace],
        **{"capture_output": True, "text": True, "cwd": tmp_path, "timeout": 120},
        env={**os.environ, "DAGSTER_HOME": str(home)},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "first" in said and "second" in said
    assert "BetaWarning" not in said and "PreviewWarning" not in said and "DeprecationWarning" not in said


def test_the_component_makes_a_project_of_a_defs_yaml(make_project, tmp_path):
    from dagster.components.testing import create_defs_folder_sandbox

    from prism_assets import PrismProject

    project = make_project(tmp_path / "project")
    with create_defs_folder_sandbox() as sandbox:
        attributes = {"config": str(project.config), "key_prefix": "acme", "group_prefix": "acme"}
        folder = sandbox.scaffold_component(
            component_cls=PrismProject,
            defs_yaml_contents={"type": "prism_assets.PrismProject", "attributes": attributes},
        )
        with sandbox.load_component_and_build_defs(defs_path=folder) as (component, definitions):
            assert isinstance(component, PrismProject)
            assert keys(definitions) == {f"acme/{one.name}" for one in ASSETS}
