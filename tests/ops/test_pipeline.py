"""The whole graph through Dagster, as `prism run` does it: what it makes, what it finds again, what it refuses."""

import gzip
import hashlib
import json
import shutil
import time

import dagster as dg
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from conftest import Project, make_rows, write_lines
from prism_assets.errors import PipelineError, SettingsError, UserMistake
from prism_assets.ops.pipeline import steps_of

GRADIENT_STRATEGIES = ("prism", "uniform", "less")
DUPLICATE = {"prompt": "copy: twice=", "completion": "twice", "source": "copy"}
CONTAMINATION = [
    {"prompt": "reverse: leak=", "completion": "kael", "source": "leak"},
    {"prompt": "reverse: held=", "completion": "dleh", "source": "leak"},
    {"prompt": "pair: leak=", "completion": "good", "source": "leak"},
]
BAD_LINES = [
    "{not json",
    {"prompt": "copy: empty=", "completion": ""},
    {"prompt": "copy: nothing="},
    {"prompt": "copy: long=", "completion": "x" * 60},
]
FINISHED_STEPS = {
    "Base model",
    "Candidates",
    "Targets",
    "Live pool and warm-up",
    "Target directions",
    "Candidate features",
    "Index",
    "Selection",
    "Fine-tuning, evaluation",
    "Report",
}


@pytest.fixture(scope="module")
def finished(make_project, tmp_path_factory) -> Project:
    """A finished project with every strategy, a plain target and a target of pairs, and a pool with bad rows. Read
    only."""
    project = make_project(
        tmp_path_factory.mktemp("finished") / "project",
        strategies=[*GRADIENT_STRATEGIES, "random", "full"],
        targets={
            "plain": {"examples": "plain/target.jsonl", "eval": "plain/eval.jsonl"},
            "pairs": {"examples": "pairs/target.jsonl", "eval": "pairs/eval.jsonl"},
        },
    )
    folder = project.folder
    project.add("shard0", [*make_rows(19, 10), DUPLICATE])
    project.add("shard1", [*make_rows(16, 11), DUPLICATE, *CONTAMINATION, *BAD_LINES])
    targets = [json.loads(line) for line in (folder / "plain" / "target.jsonl").read_text().splitlines()]
    write_lines(folder / "plain" / "target.jsonl", [*targets, CONTAMINATION[0]])
    held_out = [json.loads(line) for line in (folder / "plain" / "eval.jsonl").read_text().splitlines()]
    write_lines(folder / "plain" / "eval.jsonl", [*held_out, CONTAMINATION[1]])
    pairs = [{**row, "rejected": row["completion"][::-1] + "x"} for row in make_rows(9, 300, "reverse")]
    write_lines(folder / "pairs" / "target.jsonl", [*pairs[:5], {**CONTAMINATION[2], "rejected": "bad"}])
    write_lines(folder / "pairs" / "eval.jsonl", pairs[5:])
    project.run()
    return project


@pytest.fixture(scope="module")
def small(make_project, tmp_path_factory) -> Project:
    """A finished project of one target, `prism` and `random`, one seed. Copy it."""
    project = make_project(tmp_path_factory.mktemp("small") / "project", strategies=["prism", "random"], seeds=[0])
    project.run()
    return project


@pytest.fixture(autouse=True)
def blank_plots(monkeypatch):
    """Drawing is half of the time of a run; the projects above, made before any test, have real plots."""
    from prism_assets.plots import canvas

    monkeypatch.setattr(canvas, "png", lambda figure: b"no picture")


@pytest.fixture
def copy(small, tmp_path):
    """`copy()` gives a copy of the small project, its lake included."""
    number = iter(range(9))
    return lambda: small.copy(tmp_path / f"copy{next(number)}")


def everything_made(lake, table):
    return {artifact.fingerprint for artifact in lake.artifacts(table)}


# -- what a run makes --------------------------------------------------------------------------------------------


def test_every_asset_and_partition_is_materialised(finished):
    graph = finished.definitions.resolve_asset_graph()
    keys = [dg.AssetKey(name) for step in steps_of("run") for name in step.assets]
    assert len(keys) == 15
    for key in keys:
        if key == dg.AssetKey("trust"):  # costly: only by hand
            assert not finished.instance.get_materialized_partitions(key)
            continue
        partitions = graph.get(key).partitions_def
        if partitions is None:
            event = finished.instance.get_latest_materialization_event(key)
            assert event is not None, key
        else:
            wanted = set(partitions.get_partition_keys(dynamic_partitions_store=finished.instance))
            assert set(finished.instance.get_materialized_partitions(key)) == wanted and wanted, key
    assert {result.step.title for result in finished.results} == FINISHED_STEPS
    assert all(result.computed > 0 for result in finished.results)


def test_report_json_has_the_promised_layout(finished):
    report = finished.report
    assert (finished.settings.storage.report / "report.html").read_text(encoding="utf-8").startswith("<!")
    assert set(report["targets"]) == {"plain", "pairs"}
    for name, target in report["targets"].items():
        assert target["kind"] == name
        assert set(target["strategies"]) == {*GRADIENT_STRATEGIES, "random", "full"}
        for strategy, entry in target["strategies"].items():
            for metric in ("target_preference", "mean_log_prob", "exact_match"):
                if metric == "exact_match" and name == "pairs":
                    assert entry[metric] is None  # no held-out record of that target has an answer
                    continue
                assert set(entry[metric]) == {"mean", "std", "seeds"}
                values = [one[metric] for one in entry["per_seed"]]
                assert entry[metric]["seeds"] == len(values) == 2
                assert entry[metric]["mean"] == pytest.approx(np.mean(values))
                assert entry[metric]["std"] == pytest.approx(np.std(values, ddof=1))
            selected = pq.read_table(entry["selected"])
            assert selected.num_rows == entry["rows"] == (36 if strategy == "full" else 8)
            assert entry["steps"] == 2
        direction = target["direction"]
        assert set(direction["effective_number_of_targets"]) >= {"prism", "uniform"}
        for one in ("prism", "uniform"):
            assert {"predicted", "measured"} <= set(direction["first_order"][one])


def test_the_report_counts_what_was_left_out(finished):
    report = finished.report
    pool = report["intake"]["parts"][0]
    assert pool["contaminated"] == 3 and pool["duplicates"] == 1
    assert (pool["given"], pool["used"], pool["rejected"]) == (44, 36, 4) and sum(pool["reasons"].values()) == 4
    # 44 rows in two files: four are rejected, three are in target or held-out files, one is there twice.
    assert report["targets"]["plain"]["pool"]["rows"] == 40
    assert report["targets"]["plain"]["pool"]["canonical"] == 36
    assert len(report["rejects"]) == 4


def test_bad_rows_are_in_rejects_with_line_field_and_reason(finished):
    with finished.lake.connect() as connection:
        found = connection.execute("SELECT line, field, reason FROM rejects ORDER BY line").fetchall()
    assert [line for line, *_ in found] == [21, 22, 23, 24]
    assert [field for _, field, _ in found][1:] == ["completion", "completion", "completion"]
    reasons = [reason for *_, reason in found]
    assert "JSON" in reasons[0] and "empty" in reasons[1] and "missing" in reasons[2] and "48" in reasons[3]


def test_checks_tell_what_is_wrong_with_the_data(finished):
    states = {}
    for record in finished.instance.event_log_storage.get_records_for_run(finished.results[3].run_ids[0]).records:
        event = record.event_log_entry.dagster_event
        if event and event.event_type_value == "ASSET_CHECK_EVALUATION":
            evaluation = event.asset_check_evaluation_data
            states[evaluation.check_name] = evaluation.passed
    assert states["no_contamination"] is False and states["nothing_pending"] is True


def test_a_second_run_computes_nothing_and_changes_no_file(finished):
    before = {
        path: path.read_bytes() for path in (finished.settings.storage.root / "artifacts").rglob("*") if path.is_file()
    }
    again = finished.run()
    assert set(again) == FINISHED_STEPS and set(again.values()) == {0}
    after = {path for path in (finished.settings.storage.root / "artifacts").rglob("*") if path.is_file()}
    assert after == set(before) and all(path.read_bytes() == content for path, content in before.items())


def test_every_input_that_lineage_names_is_in_the_lake_with_that_content(finished):
    with finished.lake.connect() as connection:
        edges, lost = connection.execute(
            "SELECT count(*), count(*) FILTER (a.fingerprint IS NULL) FROM lineage l LEFT JOIN artifacts a "
            "ON a.table_name = l.input_table AND a.fingerprint = l.input_fingerprint "
            "AND a.content_hash = l.input_content_hash WHERE l.input_table IS NOT NULL"
        ).fetchone()
        assert edges > 100 and lost == 0
        runs = connection.execute("SELECT DISTINCT run_id FROM artifacts").fetchall()
    assert all(finished.instance.get_run_by_id(run) is not None for (run,) in runs)


# -- the selection -----------------------------------------------------------------------------------------------


def canonical_rows(project):
    """The pool by hand: accepted rows of all files in key order, first come first kept, records of targets left out."""
    kept, seen = [], set()
    held_back = set()
    for target in project.settings.targets.values():
        for path in (target.examples, target.eval):
            rows = map(json.loads, path.read_text().splitlines())
            held_back |= {(row["prompt"], row["completion"]) for row in rows}
    lake = project.lake
    shards = sorted(project.instance.get_dynamic_partitions("shard"))
    version = lake.require("live_pool", None, scope_of(lake, "live_pool")).header["version"]
    for shard in shards:
        for row in pq.read_table(lake.local(lake.require("candidates", shard, version))).to_pylist():
            key = (row["prompt"], row["completion"])
            if key not in held_back and key not in seen:
                seen.add(key)
                kept.append({**row, "shard": shard})
    return kept


def scope_of(lake, table):
    (scope,) = {entry["scope"] for entry in lake.heads(table)}
    return scope


def stored_vectors(project):
    """id -> stored unit features [C·K], read with pyarrow from the block files."""
    vectors = {}
    for path in (project.settings.storage.root / "artifacts" / "feature_blocks").glob("*.parquet"):
        for row in pq.read_table(path, columns=["id", "vector"]).to_pylist():
            vectors[row["id"]] = np.array(row["vector"], np.float64)
    return vectors


def numpy_scores(project, target, strategy):
    """id -> Σ_k η̄_k ⟨S t_k/‖t_k‖, Γ⟩ from the stored target gradients, with the weights written out."""
    lake = project.lake
    version = scope_of(lake, "candidate_index")
    features = pq.read_table(lake.local(lake.require("target_features", target, version))).to_pydict()
    scores, norms = np.array(features["score"]), np.array(features["norm"])  # [m, C]
    checkpoints = scores.shape[1]
    gradients = np.array(features["sketch"]).reshape(len(scores), checkpoints, -1)  # [m, C, K]
    if strategy == "uniform":
        weights = np.full_like(scores, 1 / len(scores))
    elif strategy == "less":
        weights = 1 / norms / len(scores)
    elif target == "pairs":
        preference = 1 / (1 + np.exp(-scores))
        weights = preference / preference.sum(axis=0)
    else:
        weights = np.exp(scores) / np.exp(scores).sum(axis=0)
    direction = load_file(lake.local(lake.require("target_directions", target, f"{version}/{strategy}")))
    entries = json.loads((lake.local(lake.require("warmup_checkpoints", None, scope_of(lake, "warmup_checkpoints")))
                          / "checkpoints.json").read_text())  # fmt: skip
    rates = np.array([entry["mean_learning_rate"] for entry in entries])
    query = []
    for k in range(checkpoints):
        exact = [tensor for name, tensor in direction.items() if name.startswith(f"t/{k}/")]
        length = np.sqrt(sum(np.square(tensor.astype(np.float64)).sum() for tensor in exact))
        query.append(rates[k] / rates.sum() * (weights[:, k] @ gradients[:, k]) / length)
    query = np.concatenate(query)
    return {one: float(vector @ query) for one, vector in stored_vectors(project).items()}


def assert_is_the_top_of(scores, selected, tolerance=1e-5):
    """Rows in the order of `scores`, but for swaps of scores that differ by less than the tolerance."""
    ids = [row["id"] for row in selected]
    mine = np.array([scores[one] for one in ids])
    np.testing.assert_allclose([row["score"] for row in selected], mine, atol=tolerance)
    assert (np.diff(mine) <= tolerance).all()
    outside = [score for one, score in scores.items() if one not in set(ids)]
    assert max(outside) <= mine[-1] + tolerance
    assert np.ptp(mine) > 100 * tolerance  # else any order would do


@pytest.mark.parametrize("target", ["plain", "pairs"])
@pytest.mark.parametrize("strategy", GRADIENT_STRATEGIES)
def test_the_ranking_of_the_index_is_that_of_numpy(finished, target, strategy):
    pool = {row["id"] for row in canonical_rows(finished)}
    scores = {one: score for one, score in numpy_scores(finished, target, strategy).items() if one in pool}
    assert len(scores) == len(pool) == 36
    assert_is_the_top_of(scores, finished.selected(strategy, target))


def test_strategies_do_not_select_the_same(finished):
    selections = {
        name: tuple(row["id"] for row in finished.selected(name)) for name in (*GRADIENT_STRATEGIES, "random")
    }
    assert len(set(selections.values())) == 4


def test_random_is_the_keyed_hash_of_the_canonical_rows(finished):
    pool = [row["id"] for row in canonical_rows(finished)]
    expected = sorted(pool, key=lambda one: hashlib.sha256(f"0:{one}".encode()).digest()[:8], reverse=True)
    assert [row["id"] for row in finished.selected("random")] == expected[:8]


def test_full_takes_every_canonical_row_once(finished):
    pool = sorted(row["id"] for row in canonical_rows(finished))
    assert [row["id"] for row in finished.selected("full")] == pool


def test_contamination_is_selected_by_no_strategy(finished):
    forbidden = {row["completion"] for row in CONTAMINATION}
    for target in ("plain", "pairs"):
        for strategy in (*GRADIENT_STRATEGIES, "random", "full"):
            assert not forbidden & {row["completion"] for row in finished.selected(strategy, target)}


def test_selected_rows_say_what_they_are_and_where_they_come_from(finished):
    by_id = {row["id"]: row for row in canonical_rows(finished)}
    selection = finished.selection("prism")
    rows = finished.selected("prism")
    assert [row["rank"] for row in rows] == list(range(1, 9))
    for row in rows:
        origin = by_id[row["id"]]
        assert {name: row[name] for name in ("prompt", "completion", "source", "shard")} == {
            name: origin[name] for name in ("prompt", "completion", "source", "shard")
        }
        in_shard = pq.read_table(
            finished.lake.local(finished.lake.require("candidates", row["shard"], origin_version(finished))),
            columns=["id"],
        )
        assert in_shard["id"][row["row"]].as_py() == row["id"]
    lines = [json.loads(line) for line in finished.lake.local(selection, suffix=".jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    assert lines[0]["messages"] == [
        {"role": "user", "content": rows[0]["prompt"]},
        {"role": "assistant", "content": rows[0]["completion"]},
    ]
    assert selection.notes["non_positive_influence"] == sum(row["score"] <= 0 for row in rows)


def origin_version(project):
    return scope_of(project.lake, "live_pool")


def test_query_answers_with_the_top_of_the_selection(finished):
    from prism_assets.selection.query import query_index

    found = query_index(finished.stage, target="plain", k=3)
    selected = finished.selected("prism")[:3]
    assert [(row["rank"], row["id"], row["score"]) for row in found] == [
        (row["rank"], row["id"], row["score"]) for row in selected
    ]
    assert len(query_index(finished.stage, target="pairs", strategy="less", k=1000)) == 36


# -- training and evaluation -------------------------------------------------------------------------------------


def reference_scores(model, rows, column=""):
    """Mean log-probability of each record with nothing but transformers."""
    import torch

    found = []
    for row in rows:
        ids = torch.tensor(row[f"{column}input_ids"])
        mask = torch.tensor(row[f"{column}loss_mask"])[1:]
        with torch.no_grad():
            log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        found.append(log_probs.gather(1, ids[1:, None])[:, 0][mask].mean().item())
    return np.array(found)


def plain_base(project):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(project.folder / "model").eval()


@pytest.mark.parametrize("target", ["plain", "pairs"])
def test_a_published_adapter_loads_with_peft_and_scores_as_stored(finished, target):
    from peft import PeftModel

    lake = finished.lake
    entry = finished.report["targets"][target]["strategies"]["prism"]
    records = pq.read_table(lake.local(lake.require("eval_examples", target, origin_version(finished)))).to_pylist()
    model = PeftModel.from_pretrained(plain_base(finished), entry["adapter"]).eval()
    stored = pq.read_table(lake.local(lake.require("evaluations", f"prism|{target}/seed-0"))).to_pydict()
    found = reference_scores(model, records)
    np.testing.assert_allclose(stored["mean_log_prob"], found, atol=2e-5)
    published = entry["per_seed"][0]
    assert published["mean_log_prob"] == pytest.approx(found.mean(), abs=2e-5)
    if target == "pairs":
        margins = found - reference_scores(model, records, "rejected_")
        np.testing.assert_allclose(stored["margin"], margins, atol=4e-5)
        assert published["target_preference"] == pytest.approx(np.mean(1 / (1 + np.exp(-margins))), abs=1e-5)
    else:
        assert published["target_preference"] == pytest.approx(np.exp(found).mean(), abs=1e-5)
    base = reference_scores(plain_base(finished), records)
    assert finished.report["targets"][target]["base"]["mean_log_prob"] == pytest.approx(base.mean(), abs=2e-5)
    assert np.abs(found - base).max() > 1e-3  # the adapter does something


def test_predictions_are_those_of_greedy_generation(finished):
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    lake = finished.lake
    records = pq.read_table(lake.local(lake.require("eval_examples", "plain", origin_version(finished)))).to_pylist()
    artifact = lake.require("evaluations", "prism|plain/seed-0")
    stored = pq.read_table(lake.local(artifact)).to_pylist()
    adapter = finished.report["targets"]["plain"]["strategies"]["prism"]["adapter"]
    model = PeftModel.from_pretrained(plain_base(finished), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "model")
    for record, row in zip(records, stored, strict=True):
        if not record["answers"]:
            assert row["prediction"] is None and row["exact_match"] is None
            continue
        prompt = torch.tensor(record["input_ids"][: record["loss_mask"].index(True)])[None]
        with torch.no_grad():
            generated = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False,
                eos_token_id=2, pad_token_id=0,
            )  # fmt: skip
        assert row["prediction"] == tokenizer.decode(generated[0, prompt.shape[1] :], skip_special_tokens=True)
        assert row["exact_match"] == (row["prediction"].strip() in record["answers"])
    assert [bool(record["answers"]) for record in records] == [True] * 6 + [False]
    asked = [row["exact_match"] for row in stored if row["exact_match"] is not None]
    assert artifact.notes["exact_match"] == pytest.approx(np.mean(asked))


def test_seeds_are_separate_adapters_and_the_first_is_published(finished):
    lake = finished.lake
    adapters = [lake.require("adapters", f"prism|plain/seed-{seed}") for seed in (0, 1)]
    assert [one.notes["seed"] for one in adapters] == [0, 1]
    weights = [load_file(finished.lake.local(one, "adapter_model.safetensors")) for one in adapters]
    assert any(not np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert finished.report["targets"]["plain"]["strategies"]["prism"]["adapter"] == str(
        finished.lake.local(adapters[0])
    )


def test_the_margins_of_the_base_model_are_stored_and_the_temperature_is_the_published_one(finished):
    records = pq.read_table(
        finished.lake.local(finished.lake.require("targets", "pairs", origin_version(finished)))
    ).to_pylist()
    model = plain_base(finished)
    margins = reference_scores(model, records) - reference_scores(model, records, "rejected_")
    version = scope_of(finished.lake, "candidate_index")
    stored = pq.read_table(finished.lake.local(finished.lake.require("target_features", "pairs", version)))
    np.testing.assert_allclose(stored["base_score"].to_numpy(), margins, rtol=1e-3, atol=1e-5)
    assert {target["direction"]["temperature"] for target in finished.report["targets"].values()} == {1.0}


def test_weights_in_the_report_are_those_of_the_scores(finished):
    for name, target in finished.report["targets"].items():
        rows = target["direction"]["weights"]
        scores = np.array([row["score"] for row in rows])
        tau = target["direction"]["temperature"]
        slope = np.exp(scores / tau) if name == "plain" else 1 / (1 + np.exp(-scores / tau))
        weights = np.array([row["prism"] for row in rows])
        np.testing.assert_allclose(weights, slope / slope.sum(), rtol=1e-6)
        assert target["direction"]["effective_number_of_targets"]["prism"] == pytest.approx(1 / (weights**2).sum())
        assert target["direction"]["effective_number_of_targets"]["uniform"] == pytest.approx(len(rows))
        assert target["direction"]["log_z"] == pytest.approx(np.log(slope.mean() / tau), rel=1e-6)


# -- other forms of features -------------------------------------------------------------------------------------


def test_several_checkpoints_and_exact_features_rank_as_numpy_does(make_project, tmp_path):
    project = make_project(
        tmp_path / "project",
        strategies=["prism"],
        seeds=[0],
        warmup={"checkpoints": 2},
        features={"sketch_dim": "exact"},
        selection={"budget": "20%"},
    )
    project.run()
    selected = project.selected("prism")
    assert len(selected) == 8
    scores = numpy_scores(project, "plain", "prism")
    assert len(scores) == 40
    # float16 rows against a float32 query: about 1e-4 of a unit row.
    assert_is_the_top_of(scores, selected)
    vectors = stored_vectors(project)
    width = len(next(iter(vectors.values())))
    lora = load_file(
        project.report["targets"]["plain"]["strategies"]["prism"]["adapter"] + "/adapter_model.safetensors"
    )
    assert width == 2 * sum(tensor.size for tensor in lora.values())
    for vector in vectors.values():  # exact features keep the length: each checkpoint's block is a unit vector
        np.testing.assert_allclose(np.linalg.norm(vector.reshape(2, -1), axis=1), 1, atol=2e-3)


def test_a_starting_adapter_is_where_everything_begins(finished, make_project, tmp_path):
    entry = finished.report["targets"]["plain"]["strategies"]["full"]
    project = make_project(tmp_path / "project", strategies=["prism"], seeds=[0])
    for name in ("target", "eval"):
        shutil.copy(finished.folder / "plain" / f"{name}.jsonl", project.folder / "plain")
    project.configure(model={"adapter": entry["adapter"]})
    project.run()
    continued = project.report["targets"]["plain"]
    assert continued["base"]["mean_log_prob"] == pytest.approx(entry["per_seed"][0]["mean_log_prob"], abs=1e-6)
    assert continued["base"]["exact_match"] == entry["per_seed"][0]["exact_match"]


# -- arrivals and retirements ------------------------------------------------------------------------------------


def test_the_order_of_arrival_changes_no_selection(copy):
    late = {"aaa": make_rows(12, 50, "reverse"), "zzz": make_rows(12, 51)}
    hashes = set()
    for order in (["aaa", "zzz"], ["zzz", "aaa"], [["zzz", "aaa"]]):
        project = copy()
        before = {name: project.selection(name).content_hash for name in ("prism", "random")}
        for names in order:
            for name in [names] if isinstance(names, str) else names:
                project.add(name, late[name])
            project.run()
        after = {name: project.selection(name).content_hash for name in ("prism", "random")}
        assert all(after[name] != before[name] for name in before), "the arrivals must matter, or nothing is shown"
        hashes.add(tuple(after.values()))
    assert len(hashes) == 1


def test_an_arrival_that_changes_no_selected_row_retrains_nothing(copy):
    scout, project = copy(), copy()
    arrivals = make_rows(12, 60)
    scout.add("late", arrivals)
    scout.run()
    last = project.selected("prism")[-1]["score"]
    scores = numpy_scores(scout, "plain", "prism")
    with scout.lake.connect() as connection:
        ids = dict(connection.execute("SELECT prompt, id FROM candidates WHERE partition LIKE 'late-%'").fetchall())
    weak = [row for row in arrivals if scores[ids[row["prompt"]]] < last - 1e-3]
    assert len(weak) >= 2

    project.configure(strategies=["prism"])
    project.run()
    trained = {name: everything_made(project.lake, name) for name in ("adapters", "evaluations", "warmup_checkpoints")}
    before = project.selection("prism")
    project.add("late", weak)
    computed = project.run()
    assert computed["Candidates"] == 1 and computed["Candidate features"] == 1
    assert computed["Index"] == 2  # the new shard's segment, and the list of segments
    assert computed["Target directions"] == 0
    assert computed["Selection"] == 1 and computed["Fine-tuning, evaluation"] == 0  # it was looked at again
    after = project.selection("prism")
    assert after.fingerprint != before.fingerprint and after.content_hash == before.content_hash
    for name, made in trained.items():
        assert everything_made(project.lake, name) == made


def test_an_arrival_loads_the_model_once_and_reads_and_rewrites_nothing_old(copy, monkeypatch):
    import prism_assets.resources.model.language_model as language_model
    from benchmarks.incremental import Reads
    from prism_assets.ops.pipeline import steps_of

    project = copy()
    project.run()  # a new Dagster instance looks at everything once
    lake = project.lake
    for name in ("one", "two", "three"):
        project.add(name, make_rows(9, seed=len(name) * 7 + ord(name[0])))
    old = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in lake.folder.glob("artifacts/*/*")}
    language_model._forget_model()
    forget, loads = language_model._forget_model, []

    def counted():  # called before every loading
        loads.append(1)
        forget()

    monkeypatch.setattr(language_model, "_forget_model", counted)
    # Up to the adapters' evaluation. The report looks for the nearest neighbours of a few rows, in all segments.
    steps = [step for step in steps_of("run") if "report" not in step.assets]
    with Reads().noted() as reads:
        results = project.run_steps(steps)
    computed = {result.step.title: result.computed for result in results}
    assert computed["Candidates"] == computed["Candidate features"] == 3 and computed["Index"] == 4
    assert len(loads) == 1
    assert len(reads.blocks) == 3 and not reads.blocks & set(old)
    segments = {path.parent for path in reads.segments}
    assert len(segments) == 3 and not segments & set(old)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in old} == old


def test_a_row_in_two_shards_counts_once_and_survives_the_first(copy):
    project = copy()
    top = project.selected("prism")[0]
    twin = {name: top[name] for name in ("prompt", "completion", "source")}
    project.add("zz_twin", [twin, *make_rows(3, 70)])
    project.run()
    pool = project.report["targets"]["plain"]["pool"]
    assert pool["rows"] == 44 and pool["canonical"] == 43 and project.report["intake"]["parts"][0]["duplicates"] == 1
    again = [row for row in project.selected("prism") if row["id"] == top["id"]]
    assert len(again) == 1 and again[0]["shard"] == top["shard"]

    name = top["shard"].rpartition("-")[0]
    (project.inbox / f"{name}.jsonl").unlink()
    project.run()
    again = [row for row in project.selected("prism") if row["id"] == top["id"]]
    assert len(again) == 1 and again[0]["shard"].startswith("zz_twin-")
    assert again[0]["score"] == pytest.approx(top["score"], abs=1e-5)
    assert project.report["targets"]["plain"]["pool"]["canonical"] == 24


def test_an_edited_file_is_another_shard_and_the_old_one_retires(copy):
    project = copy()
    old = set(project.instance.get_dynamic_partitions("shard")) | {row["shard"] for row in project.selected("random")}
    rows = make_rows(20, 11)
    rows[0] = {"prompt": "copy: edited=", "completion": "edited", "source": "copy"}
    project.add("shard1", rows)
    computed = project.run()
    now = set(project.instance.get_dynamic_partitions("shard"))
    assert len(now) == 2 and len(now - old) == 1
    assert computed["Candidates"] == 1 and computed["Candidate features"] == 1
    assert project.report["targets"]["plain"]["pool"]["rows"] == 40
    for strategy in ("prism", "random"):
        assert {row["shard"] for row in project.selected(strategy)} <= now


def test_a_renamed_file_costs_nothing_and_trains_nothing(copy):
    project = copy()
    trained = everything_made(project.lake, "adapters")
    (project.inbox / "shard1.jsonl").rename(project.inbox / "renamed.jsonl")
    computed = project.run()
    assert computed["Candidates"] == computed["Candidate features"] == 0
    assert {row["shard"].rpartition("-")[0] for row in project.selected("random")} <= {"shard0", "renamed"}
    assert everything_made(project.lake, "adapters") == trained


def test_one_file_under_two_names_counts_once(copy):
    project = copy()
    selected = [row["id"] for row in project.selected("prism")]
    shutil.copy(project.inbox / "shard0.jsonl", project.inbox / "another.jsonl")
    computed = project.run()
    assert computed["Candidate features"] == 0
    assert project.report["targets"]["plain"]["pool"]["canonical"] == 40
    assert project.report["intake"]["parts"][0]["duplicates"] == 20
    assert [row["id"] for row in project.selected("prism")] == selected


def test_new_shards_do_not_move_the_pinned_warmup_and_a_generation_does(copy):
    project = copy()
    versions = [scope_of(project.lake, "candidate_index")]
    warmup = everything_made(project.lake, "warmup_checkpoints")
    project.add("late", make_rows(10, 80))
    assert project.run()["Live pool and warm-up"] == 1  # the manifest
    assert everything_made(project.lake, "warmup_checkpoints") == warmup
    project.configure(warmup={"generation": 2})
    computed = project.run()
    assert computed["Candidate features"] == 3 and computed["Candidates"] == 0
    versions += [entry["scope"] for entry in project.lake.heads("candidate_index") if entry["scope"] not in versions]
    assert len(versions) == 2

    from prism_assets.selection.query import query_index

    old = query_index(project.stage, target="plain", k=50, version=versions[0])
    new = query_index(project.stage, target="plain", k=50)
    assert {row["id"] for row in old} == {row["id"] for row in new}
    assert [row["score"] for row in old] != [row["score"] for row in new]


# -- changes of the settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "computed"),
    [
        ({"selection": {"budget": 5}}, {"Selection", "Fine-tuning, evaluation"}),
        ({"preference": {"temperature": 0.2}}, {"Target directions", "Selection", "Fine-tuning, evaluation"}),
        ({"training": {"steps": 1}}, {"Fine-tuning, evaluation"}),
        ({"evaluation": {"max_new_tokens": 2}}, {"Fine-tuning, evaluation"}),
        ({"evaluation": {"batch_size": 3}, "features": {"token_budget": 200}}, set()),
    ],
    ids=["budget", "temperature", "steps", "answers", "sizes of batches"],
)
def test_a_change_of_settings_costs_what_depends_on_it(copy, change, computed):
    project = copy()
    features = everything_made(project.lake, "target_features") | everything_made(project.lake, "feature_blocks")
    done = project.configure(**change).run()
    assert {title for title, count in done.items() if count} - {"Report"} == computed
    now = everything_made(project.lake, "target_features") | everything_made(project.lake, "feature_blocks")
    assert now == features
    assert (done["Report"] == 1) == bool(computed)


def test_a_token_budget_takes_the_longest_prefix_of_the_ranking(copy):
    project = copy()
    project.configure(strategies=["prism"], selection={"budget": "100%"})
    project.run()
    ranking = project.selected("prism")
    assert len(ranking) == 40
    for amount in (ranking[0]["completion_tokens"], 31, 150):
        project.configure(selection={"budget": f"{amount} tokens"})
        project.run()
        chosen = project.selected("prism")
        assert [row["id"] for row in chosen] == [row["id"] for row in ranking[: len(chosen)]]
        used = sum(row["completion_tokens"] for row in chosen)
        assert used <= amount < used + ranking[len(chosen)]["completion_tokens"]
    project.configure(selection={"budget": "1 token"})
    with pytest.raises(PipelineError, match="does not hold even the first row"):
        project.run()


def test_one_target_can_be_run_alone(make_project, tmp_path):
    """The records of the other targets are read all the same: they are kept out of the pool."""
    project = make_project(tmp_path / "project", strategies=["random"], seeds=[0])
    project.add("leak", [{"prompt": "copy: other=", "completion": "other"}])
    write_lines(project.folder / "other.jsonl", [{"prompt": "copy: other=", "completion": "other"}])
    other = {"examples": "other.jsonl", "eval": "plain/eval.jsonl"}
    project.configure(targets={**project.content["targets"], "other": other})
    project.run(targets=["plain"])
    assert set(project.report["targets"]) == {"plain"} and project.report["intake"]["parts"][0]["contaminated"] == 1
    project.run()
    assert set(project.report["targets"]) == {"plain", "other"}


def test_a_report_shows_the_strategies_of_today(copy):
    project = copy()
    project.configure(strategies=["uniform", "random"])
    project.run()
    assert set(project.report["targets"]["plain"]["strategies"]) == {"uniform", "random"}
    project.configure(strategies=["prism", "random"])
    project.run()
    assert set(project.report["targets"]["plain"]["strategies"]) == {"prism", "random"}


def test_two_targets_of_the_same_records_are_both_reported(copy):
    project = copy()
    project.configure(targets={**project.content["targets"], "twin": project.content["targets"]["plain"]})
    computed = project.run()
    assert computed["Selection"] == computed["Fine-tuning, evaluation"] == 0
    assert set(project.report["targets"]) == {"plain", "twin"}
    # A target of one example weighs it alike under every strategy; the report must still name what was run.
    write_lines(project.folder / "one.jsonl", make_rows(1, 90, "reverse"))
    project.configure(targets={"plain": {"examples": "one.jsonl", "eval": "plain/eval.jsonl"}})
    for strategy in ("prism", "uniform"):
        project.configure(strategies=[strategy])
        project.run()
        assert set(project.report["targets"]["plain"]["strategies"]) == {strategy}


# -- interruptions and bad input ---------------------------------------------------------------------------------


def test_a_killed_run_resumes_at_the_block(copy, monkeypatch):
    from prism_assets.features import blocks
    from prism_assets.resources.lake.lake import Lake

    monkeypatch.setattr(blocks, "BLOCK_ROWS", 8)
    interrupted, straight = copy(), copy()
    for project in (interrupted, straight):
        project.add("late", make_rows(20, 55, "reverse"))
    publish = Lake.publish_table
    blocks_before = everything_made(interrupted.lake, "feature_blocks")
    published = []

    def killed_at_the_second_block(self, recipe, *arguments, **keywords):
        if recipe.table == "feature_blocks":
            published.append(recipe.fingerprint)
            if len(published) == 2:
                raise KeyboardInterrupt
        return publish(self, recipe, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Lake, "publish_table", killed_at_the_second_block)
        with pytest.raises((KeyboardInterrupt, PipelineError)):
            interrupted.run()
    assert everything_made(interrupted.lake, "feature_blocks") - blocks_before == {published[0]}
    assert interrupted.run()["Candidate features"] == 2
    assert straight.run()["Candidate features"] == 3
    assert everything_made(interrupted.lake, "feature_blocks") == everything_made(straight.lake, "feature_blocks")
    for name in ("prism", "random"):
        assert interrupted.selection(name).content_hash == straight.selection(name).content_hash


@pytest.mark.parametrize(
    ("raised", "becomes", "said"),
    [(KeyboardInterrupt(), KeyboardInterrupt, ""), (RuntimeError("no disk"), PipelineError, "the run failed: .*disk")],
)
def test_a_run_that_fails_outside_of_its_steps_says_why(copy, raised, becomes, said):
    from prism_assets.definitions import build_definitions
    from prism_assets.ops.pipeline import run_pipeline
    from prism_assets.project import Project as Named

    def starts(context):
        if context.run_id is not None:  # `run_pipeline` itself asks for the engine before any run
            raise raised

    project = copy()
    store = dg.ResourceDefinition(starts)  # Dagster starts it before the first step
    definitions = build_definitions(project.settings, {"vector_store": store})
    with pytest.raises(becomes, match=said):
        run_pipeline(Named.of(project.settings), definitions, project.instance, steps=steps_of("run")[:1])


def test_damaged_artefacts_are_rebuilt_by_the_next_run_and_nothing_else_is(copy):
    project = copy()
    tables = ("candidates", "feature_blocks", "index_segments", "target_directions", "selection", "adapters")
    before = {one.fingerprint: one.content_hash for one in project.lake.artifacts()}
    for table in tables:
        file = project.lake.local(next(project.lake.artifacts(table)))
        if file.is_dir():
            inside = [path for path in file.iterdir() if path.name != "artifact.json"]
            file = max(inside, key=lambda path: path.stat().st_size)
        with open(file, "rb+") as handle:
            handle.truncate(file.stat().st_size // 2)
    assert sum(project.run().values()) == len(tables)
    assert {one.fingerprint: one.content_hash for one in project.lake.artifacts()} == before
    assert set(project.run().values()) == {0}


def test_a_file_that_cannot_be_read_holds_nothing_else_back(copy):
    project = copy()
    (project.inbox / "broken.parquet").write_bytes(b"PAR1 no parquet at all")
    (project.inbox / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 50)[:-20])
    selected = project.selection("prism").content_hash
    project.run()
    assert project.selection("prism").content_hash == selected
    rejects = [row for row in project.report["rejects"] if row["shard"].startswith("broken-")]
    assert len(rejects) == 2 and all(row["reason"] for row in rejects)
    assert any("broken.parquet" in row["reason"] for row in rejects)
    assert set(project.run().values()) == {0}


def test_a_row_without_usable_gradient_is_refused_and_never_selected(copy, monkeypatch):
    from prism_assets.gradients.engine import GradientEngine

    project = copy()
    feature_rows = GradientEngine.feature_rows

    def first_row_vanishes(self, examples, **options):
        found = feature_rows(self, examples, **options)
        if options.get("preconditioner") is None:
            return found  # targets
        found.rows[0], found.norms[0], found.refused[0] = 0, 0, "the gradient vanishes"
        return found

    monkeypatch.setattr(GradientEngine, "feature_rows", first_row_vanishes)
    rows = make_rows(5, 77)
    project.add("late", rows)
    project.configure(strategies=["prism"], selection={"budget": "100%"})
    project.run()
    selected = project.selected("prism")
    assert len(selected) == 44 and rows[0]["prompt"] not in {row["prompt"] for row in selected}
    assert project.selection("prism").notes["refused_rows"] == 1
    assert all(np.isfinite(row["score"]) for row in selected)


def test_a_target_without_usable_gradient_gets_no_weight(copy, monkeypatch):
    from prism_assets.gradients.engine import GradientEngine

    project = copy()
    feature_rows = GradientEngine.feature_rows

    def last_target_is_not_finite(self, examples, **options):
        found = feature_rows(self, examples, **options)
        if options.get("preconditioner") is None:
            found.mean_log_probs[-1], found.norms[-1], found.rows[-1] = np.nan, np.nan, 0
            found.refused[-1] = "not finite"
        return found

    monkeypatch.setattr(GradientEngine, "feature_rows", last_target_is_not_finite)
    extra = make_rows(1, 91, "copy")
    targets = (project.folder / "plain" / "target.jsonl").read_text().splitlines()
    before = [row["id"] for row in project.selected("prism")]
    write_lines(project.folder / "plain" / "target.jsonl", [*targets, *extra])
    project.run()
    weights = project.report["targets"]["plain"]["direction"]["weights"]
    assert [row["prism"] for row in weights].count(None) == 1 and weights[-1]["prism"] is None
    assert sum(row["prism"] or 0 for row in weights) == pytest.approx(1)
    assert [row["id"] for row in project.selected("prism")] == before


def failing(project):
    with pytest.raises(PipelineError) as caught:
        project.run()
    return str(caught.value)


def test_a_missing_inbox_is_named(make_project, tmp_path):
    project = make_project(tmp_path / "project")
    shutil.rmtree(project.inbox)
    assert f"candidates.inbox: there is no folder {project.inbox}" in failing(project)
    project.inbox.mkdir()
    (project.inbox / "notes.docx").write_text("words")
    message = failing(project)
    assert "holds no file of records: JSON Lines, " in message and "notes.docx" in message


def test_a_pool_without_a_single_usable_row_is_said(make_project, tmp_path):
    project = make_project(tmp_path / "project")
    project.add("shard0", ["not json"])
    (project.inbox / "shard1.jsonl").unlink()
    message = failing(project)
    assert "No candidate is left" in message and str(project.inbox) in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "targets.plain: there is no file"),
        ([], "is empty"),
        ([{"prompt": "a", "completion": ""}], "was rejected because:"),
        ([{"question": "a", "answer": "b"}], "was rejected because:"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "rejected": "c"}],
            "a file holds plain records or pairs, not both",
        ),
    ],
    ids=["missing", "empty", "empty completion", "unknown columns", "mixed"],
)
@pytest.mark.parametrize("role", ["target", "eval"])
def test_a_target_file_that_cannot_serve_is_named(make_project, tmp_path, content, says, role):
    project = make_project(tmp_path / "project")
    path = project.folder / "plain" / f"{role}.jsonl"
    path.unlink()
    if content is not None:
        write_lines(path, content)
    message = failing(project)
    assert message.startswith("Targets: targets failed") and says in message and path.name in message


def test_a_sketch_larger_than_the_adapter_is_refused_with_advice(make_project, tmp_path):
    project = make_project(tmp_path / "project", features={"sketch_dim": 100_000})
    assert "lower sketch_dim" in failing(project)


def test_exact_rows_wider_than_an_index_are_refused_before_the_gradient_pass(make_project, tmp_path, monkeypatch):
    project = make_project(tmp_path / "project", features={"sketch_dim": "exact"})
    monkeypatch.setattr("prism_assets.features.gradient_pass.MOST_INDEX_DIMENSIONS", 100)
    message = failing(project)
    assert message.startswith("Target directions") and "an index takes 100 at most: set a number" in message
    assert not everything_made(project.lake, "feature_blocks")


def test_a_model_without_safetensors_is_refused_before_anything_is_done(make_project, tmp_path):
    project = make_project(tmp_path / "project")
    (project.folder / "model" / "model.safetensors").unlink()
    assert "no .safetensors weights" in failing(project)
    assert not everything_made(project.lake, "candidates")


def test_bad_settings_never_reach_the_graph(make_project, tmp_path):
    project = make_project(tmp_path / "project", training={"stpes": 3})
    with pytest.raises(SettingsError, match="did you mean `steps`"):
        project.run()


def test_a_bad_target_does_not_keep_the_others_back(small, tmp_path):
    project = small.copy(tmp_path / "project")
    project.configure(
        targets={**project.content["targets"], "bad": {"examples": "missing.jsonl", "eval": "plain/eval.jsonl"}}
    )
    shutil.rmtree(project.settings.storage.root)
    message = failing(project)
    assert (
        "1 of 2 partitions failed; the others are finished and kept" in message
        and "there is no file" in message
        and "bad" in message
    )
    assert len(everything_made(project.lake, "targets")) == 1


def test_an_asset_asked_for_too_early_says_what_to_do_first(small, tmp_path):
    project = small.copy(tmp_path / "project")
    shutil.rmtree(project.settings.storage.root)
    job = project.definitions.resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(
        instance=project.instance,
        asset_selection=[dg.AssetKey("selection")],
        partition_key="prism|plain",
        raise_on_error=False,
    )
    assert not result.success
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    error = failure.step_failure_data.error
    while error.cause is not None:
        error = error.cause
    assert "materialise it first, or run `prism run`" in error.message


def test_summed_scores_of_pairs_are_refused_before_any_gradient(make_project, tmp_path):
    project = make_project(tmp_path / "project", preference={"score": "sum"})
    pairs = [{**row, "rejected": row["completion"][::-1] + "x"} for row in make_rows(9, 300, "reverse")]
    write_lines(project.folder / "plain" / "target.jsonl", pairs[:5])
    write_lines(project.folder / "plain" / "eval.jsonl", pairs[5:])
    with pytest.raises(UserMistake, match=r"targets\.plain: preference\.score: sum is for plain targets"):
        project.run()
    assert not list(project.lake.artifacts("warmup_checkpoints"))
    project.configure(preference={"score": "mean"}, strategies=["prism"], seeds=[0])
    assert project.run()["Target directions"]


def test_what_every_gradient_pass_begins_with_is_nobodys_cost(small, monkeypatch):
    from prism_assets.features.gradient_pass import gradient_pass
    from prism_assets.gradients.engine import GradientEngine
    from prism_assets.progress import Stopwatch

    build = GradientEngine.__init__

    def slow(self, *arguments, **keywords):
        until = time.process_time() + 2
        while time.process_time() < until:
            pass
        build(self, *arguments, **keywords)

    monkeypatch.setattr(GradientEngine, "__init__", slow)
    with gradient_pass(small.stage) as work:
        stopwatch = Stopwatch()
        work.at(work.checkpoints[-1])
        assert stopwatch.cost()["cpu_seconds"] < 2
