"""The code location: which assets there are, how they hang together, and how light it is to load."""

import ast
import contextlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Asset -> what it is made from: the arrows of the graph in docs/asset-graph.svg.
EDGES = {
    "base_model": set(),
    "candidates": {"base_model"},
    "targets": {"base_model"},
    "live_pool": {"candidates", "targets"},
    "warmup_sample": {"live_pool"},
    "warmup_checkpoints": {"base_model", "warmup_sample"},
    "candidate_features": {"candidates", "warmup_checkpoints"},
    "candidate_index": {"live_pool", "candidate_features"},
    "target_anchors": {"targets", "warmup_checkpoints"},
    "target_features": {"target_anchors", "warmup_checkpoints"},
    "target_direction": {"target_features", "target_anchors", "targets", "warmup_checkpoints"},
    "selection": {"target_direction", "candidate_index", "live_pool"},
    "adapter": {"selection", "base_model"},
    "evaluation": {"adapter", "targets"},
    "report": {"evaluation", "selection", "target_direction", "live_pool"},
    "trust": {"target_direction", "candidate_index", "targets", "target_anchors", "warmup_checkpoints"},
    "experiment_trials": {"targets", "candidate_index", "live_pool", "warmup_checkpoints"},
    "experiment": {"experiment_trials"},
}
# Too costly for `prism run`: made by hand, `trust` also by a weekly schedule.
BY_HAND = {"experiment_trials", "experiment"}
ON_DEMAND = {"trust", *BY_HAND}
GROUPS = {
    "corpus": {"candidates", "targets", "live_pool"},
    "reference": {"base_model", "warmup_sample", "warmup_checkpoints"},
    "features": {"candidate_features", "candidate_index", "target_anchors", "target_features"},
    "selection": {"target_direction", "selection"},
    "training": {"adapter"},
    "evaluation": {"evaluation", "report"},
    "trust": {"trust"},
    "experiment": {"experiment_trials", "experiment"},
}
PARTITIONS = {
    "shard": {"candidates", "candidate_features"},
    "target": {
        *("targets", "target_anchors", "target_features", "target_direction", "report", "trust"),
        *("experiment_trials", "experiment"),
    },
    "target and strategy": {"selection", "adapter", "evaluation"},
}


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("definitions") / "project")


@pytest.fixture(scope="module")
def graph(project):
    return project.definitions.resolve_asset_graph()


def names(keys):
    return {key.path[-1] for key in keys}


def test_the_definitions_can_be_loaded_as_dagster_does(project):
    dg.Definitions.validate_loadable(project.definitions)


def test_the_graph_has_the_designed_arrows(graph):
    found = {key.path[-1]: names(graph.get(key).parent_keys) for key in graph.get_all_asset_keys()}
    assert found == EDGES


def test_groups_are_the_stage_folders(graph):
    found: dict[str, set[str]] = {}
    for key in graph.get_all_asset_keys():
        found.setdefault(graph.get(key).group_name, set()).add(key.path[-1])
    assert found == GROUPS


def test_every_asset_is_described_versioned_and_of_a_kind(graph):
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.description and len(node.description) > 40, key
        assert node.code_version, key
        assert node.kinds, key
        assert not node.owners, key


def test_partitions_are_shards_targets_and_targets_by_strategy(graph, project):
    by_kind: dict[str, set[str]] = {"none": set()}
    for key in graph.get_all_asset_keys():
        partitions = graph.get(key).partitions_def
        if partitions is None:
            kind = "none"
        elif isinstance(partitions, dg.DynamicPartitionsDefinition):
            kind = partitions.name
        else:
            kind = "target and strategy" if isinstance(partitions, dg.MultiPartitionsDefinition) else "target"
        by_kind.setdefault(kind, set()).add(key.path[-1])
    assert {kind: found for kind, found in by_kind.items() if kind != "none"} == PARTITIONS
    assert by_kind["none"] == set(EDGES) - set().union(*PARTITIONS.values())
    keys = graph.get(dg.AssetKey("selection")).partitions_def.get_partition_keys()
    assert set(keys) == {f"{strategy}|plain" for strategy in project.settings.strategies}


def test_what_must_read_all_shards_depends_on_all_of_them(graph):
    for child, parent in (("live_pool", "candidates"), ("candidate_index", "candidate_features")):
        mapping = graph.get_partition_mapping(dg.AssetKey(child), dg.AssetKey(parent))
        assert isinstance(mapping, dg.AllPartitionMapping)


def test_the_warmup_is_not_partitioned_so_that_new_shards_leave_it_alone(graph):
    assert "candidates" not in names(graph.get(dg.AssetKey("warmup_checkpoints")).parent_keys)


def test_every_stage_has_its_checks(project, graph):
    found = {(key.asset_key.path[-1], key.name) for key in graph.asset_check_keys}
    assert found >= {
        ("candidates", "file_readable"),
        ("candidates", "rows_accepted"),
        ("candidates", "prompts_whole"),
        ("targets", "target_rows_accepted"),
        ("targets", "eval_disjoint"),
        ("live_pool", "nothing_pending"),
        ("live_pool", "no_contamination"),
        ("warmup_sample", "sample_covers_pool"),
        ("warmup_checkpoints", "warmup_learned"),
        ("candidate_features", "gradients_usable"),
        ("candidate_index", "index_complete"),
        ("candidate_index", "warmup_drift"),
        ("target_anchors", "all_targets_anchored"),
        ("target_features", "target_gradients_usable"),
        ("target_direction", "enough_effective_targets"),
        ("target_direction", "first_order_holds"),
        ("target_direction", "held_out_improves"),
        ("selection", "influence_positive"),
        ("selection", "sketch_resolves"),
        ("adapter", "training_learned"),
        ("evaluation", "better_than_base"),
        ("trust", "weights_not_concentrated"),
        ("trust", "preferences_stable"),
        ("trust", "first_order_reaches"),
        ("trust", "single_steps_agree"),
        ("trust", "held_out_follows"),
        ("trust", "subsets_predicted"),
    }
    specs = [spec for asset in project.definitions.assets for spec in asset.check_specs]
    assert len(specs) == len(found) and all(spec.description for spec in specs)


def test_one_job_per_partitions_definition_and_one_on_demand_cover_every_asset_once(project, graph):
    definitions = project.definitions
    jobs = [job for job in definitions.resolve_all_job_defs() if not job.name.startswith("__")]
    (verifying,) = [job for job in jobs if job.name == "verify_lake"]  # makes nothing
    assert verifying.description
    jobs.remove(verifying)
    covered = []
    for job in jobs:
        members = names(job.asset_layer.executable_asset_keys)
        definitions_of = {graph.get(dg.AssetKey(name)).partitions_def for name in members} - {None}
        assert len(definitions_of) <= 1, job.name
        assert job.description
        covered += members
    assert sorted(covered) == sorted(EDGES)
    assert len(jobs) == len(PARTITIONS) + 1 + 2  # what has no partitions; trust and the experiment
    (by_hand,) = [job for job in jobs if job.name == "run_experiment"]
    assert names(by_hand.asset_layer.executable_asset_keys) == BY_HAND


def test_the_report_alone_is_to_be_fresh_and_the_weekly_refresh_is_often_enough(project):
    specs = {spec.key.path[-1]: spec for asset in project.definitions.assets for spec in asset.specs}
    policies = {name: spec.freshness_policy for name, spec in specs.items() if spec.freshness_policy is not None}
    assert set(policies) == {"report"}
    schedules = {one.name: one for one in project.definitions.schedules}
    assert schedules["weekly_refresh"].cron_schedule == "0 4 * * 0"
    warn, fail = policies["report"].warn_window.to_timedelta(), policies["report"].fail_window.to_timedelta()
    assert timedelta(days=7) < warn < fail <= timedelta(days=14)


def test_every_step_that_loads_a_model_takes_the_pool_and_no_other(make_project, tmp_path, monkeypatch):
    from prism_assets.resources.model.language_model import LanguageModel

    # A selection loads the model only where it is re-ranked or looks at hidden states, anchors where it writes them.
    plain = {"examples": "plain/target.jsonl", "eval": "plain/eval.jsonl", "anchors": "generated"}
    project = make_project(
        tmp_path / "project", strategies=["prism"], seeds=[0], selection={"rerank": 2}, targets={"plain": plain}
    )
    base = LanguageModel.base
    loading = set()

    def watched(model):
        with contextlib.suppress(dg.DagsterInvariantViolationError):  # the rehearsal before all steps
            loading.add(dg.AssetExecutionContext.get().asset_key.path[-1])
        return base(model)

    monkeypatch.setattr(LanguageModel, "base", watched)
    project.run()
    pooled = {asset.key.path[-1] for asset in project.definitions.assets if asset.op.pool == "model"}
    assert loading | {"trust", "experiment_trials"} == pooled
    assert len(pooled) == 11 and {"candidate_features", "adapter", "evaluation"} <= pooled
    assert {asset.op.pool for asset in project.definitions.assets} == {"model", None}


def test_the_pool_lets_one_step_run_at_a_time(project, monkeypatch):
    from prism_assets.ops.home import instance_of

    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    with instance_of(project.settings) as instance:
        config = instance.get_concurrency_config().pool_config
        assert config.default_pool_limit == 1 and config.pool_granularity.value == "op"


def test_the_steps_of_prism_run_take_every_asset_after_its_inputs():
    from prism_assets.ops.pipeline import steps_of

    for steps, everything in ((steps_of("run"), set(EDGES) - ON_DEMAND), (steps_of("experiment"), None)):
        done: set[str] = set()
        for step in steps:
            inside = set(step.assets)
            for name in step.assets:
                assert EDGES[name] <= done | inside, name
            done |= inside
        assert done >= BY_HAND if everything is None else done == everything
        assert sum(len(step.assets) for step in steps) == len(done)


def test_an_experiment_is_never_made_without_a_hand_and_training_only_where_it_is_said(project, graph, tmp_path):
    from prism_assets.definitions import build_definitions

    def without(graph) -> set[str]:
        return {key.path[-1] for key in graph.get_all_asset_keys() if graph.get(key).automation_condition is None}

    assert without(graph) == ON_DEMAND | {"adapter", "evaluation"}
    for train, more in (("nightly", {"adapter", "evaluation"}), ("on_arrival", set())):
        settings = project.settings.model_copy(update={"train": train})
        assert without(build_definitions(settings).resolve_asset_graph()) == ON_DEMAND | more


def test_engines_can_be_exchanged(project, tmp_path):
    from prism_assets.definitions import build_definitions
    from prism_assets.resources.lake.lake import Lake
    from prism_assets.work import engine_of

    other = Lake(root=str(tmp_path / "other"))
    definitions = build_definitions(project.settings, {"lake": other})
    assert engine_of(definitions.resources["lake"]) is other
    assert engine_of(definitions.resources["language_model"]).name == str(project.folder / "model")


def test_resources_know_nothing_of_the_method_and_of_dagster():
    for path in (ROOT / "resources").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = {name for name in imported if name.split(".")[0] in ("prism_assets", "dagster")}
            below = tuple(f"prism_assets.{name}" for name in ("errors", "compat", "quantized", "resources"))
            assert all(name.startswith(below) for name in ours), path


def loaded_modules(code, project, *unwanted):
    """Which of the unwanted modules a fresh interpreter has after running `code`."""
    script = f"import sys\n{code}\nprint([name for name in {list(unwanted)!r} if name in sys.modules])"
    environment = {**os.environ, "PRISM_CONFIG": str(project.config), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_the_definitions_load_without_torch_and_transformers(project):
    assert loaded_modules(
        "from prism_assets.definitions import build_definitions; from prism_assets import load_settings; "
        "assert len(build_definitions(load_settings()).resolve_asset_graph().get_all_asset_keys()) == 18",
        project,
        "torch", "transformers", "peft", "faiss", "matplotlib", "duckdb", "pyarrow",
    ) == "[]"  # fmt: skip


def test_broken_settings_stop_the_location_with_the_place_and_the_advice(project, tmp_path):
    config = tmp_path / "prism.yaml"
    config.write_text(project.config.read_text().replace("rank:", "rnak:"))
    done = subprocess.run(
        [Path(sys.executable).with_name("dagster"), "definitions", "validate", "-w", "workspace.yaml"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PRISM_CONFIG": str(config)},
        timeout=120,
    )
    assert done.returncode != 0
    assert "lora.rnak: unknown key; did you mean `rank`?" in done.stdout + done.stderr
