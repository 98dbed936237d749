"""What the benchmarks on real records stand on: their measures, what they show a selector, and what they keep apart."""

import itertools
import json
import random

import numpy as np
import pytest
import yaml

from benchmarks import repair, retrieval
from benchmarks.real_text import area_under_curve, average_precision, example, sampled, spread_out


def test_average_precision_is_the_area_under_the_stepwise_curve():
    rng = np.random.default_rng(0)
    for _ in range(20):
        relevant = rng.random(30) < 0.3
        area, recall = 0.0, 0.0
        for at in range(1, 31):
            now = relevant[:at].sum() / relevant.sum()
            area += (now - recall) * relevant[:at].mean()
            recall = now
        assert average_precision(relevant) == pytest.approx(area)
    assert average_precision([True, True, False]) == 1 and np.isnan(average_precision([False]))


def test_relevant_rows_that_a_ranking_lacks_count_as_never_found():
    assert average_precision([True, False, True], total=4) == pytest.approx((1 + 2 / 3) / 4)
    assert average_precision([False], total=1) == 0
    with pytest.raises(ValueError, match="2 relevant rows of 1"):
        average_precision([True, True], total=1)


def test_area_under_curve_counts_every_pair():
    rng = np.random.default_rng(1)
    good, bad = rng.integers(0, 6, 17), rng.integers(0, 6, 11)  # with ties
    pairs = [1.0 if g > b else 0.5 if g == b else 0.0 for g, b in itertools.product(good, bad)]
    assert area_under_curve(good, bad) == pytest.approx(np.mean(pairs))


def record(number, rng, **more):
    prompt = f"question {number} " + "x" * rng.randint(1, 30)
    described = {"source": "arc_easy", "license": "?", **more}
    return {"id": f"r{number}", "prompt": prompt, "completion": f"answer {number}", **described}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path):
    """Generated records in the layout of the real ones."""
    rng, folder = random.Random(0), tmp_path / "data"
    pool = [record(number, rng) for number in range(1200)]
    write(folder / "pool.jsonl", pool)
    for name in retrieval.MATCHING:
        write(folder / "targets" / name / "target.jsonl", [record(f"t{name}{n}", rng) for n in range(4)])
        write(folder / "targets" / name / "eval.jsonl", [record(f"e{name}{n}", rng) for n in range(4)])
    kinds = ["misaligned", "benign", "truthful"]
    pairs = [{"prompt": f"pair {n}", "safe": "no", "unsafe": "yes", "source": "p"} for n in range(12)]
    write(folder / "safety" / "target.jsonl", pairs[:6])
    write(folder / "safety" / "eval.jsonl", pairs[6:])
    leaked = [
        {**record("leak", rng, kind="benign"), "prompt": "pair 7"},
        {**record("leak", rng, kind="truthful"), "completion": "yes "},
    ]
    write(
        folder / "safety" / "repair_pool.jsonl", [record(f"c{n}", rng, kind=kinds[n % 3]) for n in range(60)] + leaked
    )
    good = [record(f"g{n}", rng, label="good") for n in range(50)]
    write(folder / "safety" / "good.jsonl", [*good, {**record("leak", rng, label="good"), "completion": "no"}])
    bad = [record(f"b{n}", rng, label="misaligned") for n in range(1000)]
    write(folder / "safety" / "misaligned.jsonl", [*bad, {**record("x", rng, label="misaligned"), "prompt": "pair 2"}])
    return folder


def test_the_sample_of_the_pool_is_the_same_whatever_its_order(data):
    rows = [json.loads(line) for line in (data / "pool.jsonl").read_text().splitlines()]
    first, second = sampled(rows, 0.25), sampled(rows[::-1], 0.25)
    assert sorted(row["id"] for row in first) == sorted(row["id"] for row in second)
    assert 230 < len(first) < 370


def test_fewer_held_out_records_still_hold_every_subtask_in_its_share():
    records = [{"source": f"task {number // 20}", "number": number} for number in range(180)]
    kept = spread_out(records, 60)
    assert len({one["number"] for one in kept}) == 60
    counts = [sum(one["source"] == f"task {task}" for one in kept) for task in range(9)]
    assert sum(counts) == 60 and max(counts) - min(counts) <= 1
    assert spread_out(records, 500) == records


def test_retrieval_shows_a_selector_prompt_and_completion_alone(data, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "STEPS", 1)
    retrieval.prepare(tmp_path / "work", data, steps=1)
    files = list((tmp_path / "work").rglob("*.jsonl"))
    assert len(files) == 2 + 2 * len(retrieval.MATCHING)
    for file in files:
        fields = {key for line in file.read_text().splitlines() for key in json.loads(line)}
        assert fields <= {"prompt", "completion", "source"}
        assert ("source" in fields) == (file.parent.name == "inbox")


def test_repair_keeps_held_out_prompts_and_answers_out_of_everything_else(data):
    parts = example("repair_forward").Data(data, seed=1)
    kept_apart = {row["prompt"] for row in (*parts.targets, *parts.held_out, *parts.benign)}
    for rows in (parts.candidates, parts.general, parts.good, parts.misaligned):
        assert rows and not kept_apart & {row["prompt"] for row in rows}
        assert not {"yes", "no"} & {row["completion"].strip() for row in rows}
    assert not {row["prompt"] for row in parts.targets} & {row["prompt"] for row in parts.held_out}
    assert all(set(row) == {"prompt", "completion", "source"} for row in parts.candidates)
    assert all(set(row) == {"prompt", "completion"} for row in (*parts.general, *parts.good, *parts.misaligned))


def test_repair_cuts_the_answers_of_pairs_alone(data):
    prepare = example("repair_forward")
    long = "x" * (2 * prepare.LONGEST)
    for name, rows in {
        "target": [{"prompt": long, "safe": long, "unsafe": "u" + long}],
        "repair_pool": [{**record("long", random.Random(0), kind="misaligned"), "completion": "y" + long}],
    }.items():
        write(data / "safety" / f"{name}.jsonl", rows)
    parts = prepare.Data(data, seed=0)
    assert [len(parts.targets[0][field]) for field in ("prompt", "safe", "unsafe")] == [
        len(long),
        *[prepare.LONGEST] * 2,
    ]
    assert parts.candidates[0]["completion"] == "y" + long and parts.candidates[0]["source"] == "misaligned/arc_easy"


def test_a_seed_of_repair_runs_from_records_to_figures(data, tmp_path, monkeypatch):
    def small(name, module="prepare"):
        """The example with a model that hardly trains and three strategies."""
        loaded = example(name, module)
        if module == "prepare":
            train_clean, misalign, prepare = loaded.train_clean, loaded.misalign, loaded.prepare
            monkeypatch.setattr(loaded, "train_clean", lambda parts, folder, steps: train_clean(parts, folder, 1))
            monkeypatch.setattr(
                loaded, "misalign", lambda parts, clean, folder, steps, seed: misalign(parts, clean, folder, 1, seed)
            )

            def prepared(*arguments, **options):
                config = prepare(*arguments, **options)
                content = yaml.safe_load(config.read_text()) | {"strategies": ["prism", "less", "random"]}
                content["training"]["steps"], content["features"] = 2, {"sketch_dim": 64}
                config.write_text(yaml.safe_dump(content))
                return config

            monkeypatch.setattr(loaded, "prepare", prepared)
        return loaded

    monkeypatch.setattr(repair, "example", small)
    for name in ("PRISM_CONFIG", "DAGSTER_HOME"):  # set by the run; as before when this ends
        monkeypatch.setenv(name, "")
    work = tmp_path / "work"
    work.mkdir()
    found = repair.run_seed(work, data, 3)
    assert found["pool"] == {"misaligned/arc_easy": 20, "benign": 20, "truthful": 20}
    assert found["misaligned_share_of_pool"] == pytest.approx(1 / 3)
    assert set(found["models"]) == {"clean", "misaligned"} and set(found["strategies"]) == {"prism", "less", "random"}
    assert found["models"]["clean"]["margin"] != found["models"]["misaligned"]["margin"]
    for entry in found["strategies"].values():
        assert sum(entry["selected"].values()) == 6  # 10% of 60 candidates
        assert entry["misaligned_share"] == entry["selected"]["misaligned/arc_easy"] / 6
        assert entry["margin"] != found["models"]["misaligned"]["margin"]
    assert 0 <= found["strategies"]["prism"]["auc_good_against_misaligned"] <= 1
    assert "auc_good_against_misaligned" not in found["strategies"]["random"]


def test_another_seed_misaligns_with_other_records_and_measures_on_the_same(data):
    first, second = (example("repair_forward").Data(data, seed=seed) for seed in (1, 2))
    assert first.misaligned != second.misaligned and len(first.misaligned) == len(second.misaligned) == 900
    assert first.benign == second.benign and first.held_out == second.held_out


def test_repair_summary_pairs_by_seed():
    rng = np.random.default_rng(2)
    outcomes = []
    for _ in range(4):
        low = float(rng.normal())
        outcomes.append(
            {
                "misaligned_share_of_pool": 0.1,
                "models": {"clean": {"margin": low + 3}, "misaligned": {"margin": low}},
                "strategies": {
                    name: {"margin": low + gain, "misaligned_share": 0.0, "selected": {}}
                    for name, gain in (("prism", 2.0), ("random", 0.5), ("uniform", 1.0), ("less", 1.0))
                },
            }
        )
    found = repair.summary(outcomes)["strategies"]["prism"]["against"]
    assert found["misaligned"]["margin"]["mean"] == pytest.approx(2)
    assert found["clean"]["margin"]["mean"] == pytest.approx(-1)
    assert found["random"]["margin"]["mean"] == pytest.approx(1.5)
    assert found["uniform"]["margin"]["std"] == pytest.approx(0, abs=1e-9)
    assert found["less"]["misaligned_share"]["mean"] == 0 and "misaligned_share" not in found["clean"]


@pytest.mark.parametrize("benchmark", [retrieval, repair])
def test_without_the_records_a_benchmark_says_where_to_name_them(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "data_folder", lambda: None)
    assert benchmark.main(["--json"]) == 2
    assert "PRISM_REAL_DATA" in capsys.readouterr().err


def test_retrieval_summary_pairs_precision_and_gain_by_seed():
    rng = np.random.default_rng(3)
    outcomes = []
    for seed in range(4):
        level = float(rng.normal())
        entries = {
            name: {"gain": level + gain, "average_precision": 0.3 + gain / 10}
            for name, gain in (("prism", 2.0), ("uniform", 1.0), ("less", 3.0), ("random", 0.0))
        }
        outcomes.append(
            {"seed": seed, "targets": {"gsm8k": entries, "bbh": {k: {"gain": v["gain"]} for k, v in entries.items()}}}
        )
    found = retrieval.summary(outcomes)
    against = found["gsm8k"]["prism"]["against"]
    assert against["uniform"]["gain"]["mean"] == pytest.approx(1) and against["uniform"]["gain"][
        "std"
    ] == pytest.approx(0, abs=1e-9)
    assert against["less"]["average_precision"]["mean"] == pytest.approx(-0.1)
    assert set(found["bbh"]["prism"]["against"]["random"]) == {"gain"} and "prism" not in against
    assert json.dumps(found)
