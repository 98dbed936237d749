"""The skills experiment: its data keep their promises, and its summary follows from the numbers."""

import json

import numpy as np
import pytest

from benchmarks.quality import GRADIENT, HELD_OUT, SEVERAL, SITUATIONS, TARGETS, summary, write_project
from prism_assets.demo.skills import SKILLS


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_targets_held_out_and_pool_share_no_prompt_and_seeds_redraw_everything(tmp_path):
    names = ["reverse_noise", "three_clean"]
    for seed in (0, 1):
        write_project(tmp_path / str(seed), seed, names)
    first = tmp_path / "0"
    files = [first / "targets" / name / f"{kind}.jsonl" for name in names for kind in ("target", "eval")]
    prompts = [[row["prompt"] for row in records(file)] for file in files]
    everything = [prompt for one in prompts for prompt in one]
    assert len(everything) == len(set(everything)) == len(names) * (TARGETS + HELD_OUT)
    inbox = records_of_first_shard(first)
    assert len(inbox) > 600 and not set(inbox) & set(everything)
    # The shortest prompts meet by chance now and then.
    assert len(set(inbox) & set(records_of_first_shard(tmp_path / "1"))) < 0.05 * len(inbox)


def records_of_first_shard(folder):
    lines = (folder / "inbox" / "strings-1.jsonl").read_text().splitlines()[:-1]  # the last is broken on purpose
    prompts = [json.loads(line)["prompt"] for line in lines]
    # Sums of two-digit numbers are too few to differ between seeds.
    return [prompt for prompt in prompts if not prompt.startswith("addition")]


def test_held_out_records_are_of_the_right_skills_alone(tmp_path):
    write_project(tmp_path, 0, ["shift_copy"])
    held_out = records(tmp_path / "targets" / "shift_copy" / "eval.jsonl")
    assert {row["source"] for row in held_out} == {"shift"}
    assert all(SKILLS["shift"].solve(row["prompt"].split(": ")[1][:-1]) == row["completion"] for row in held_out)
    targets = [row["source"] for row in records(tmp_path / "targets" / "shift_copy" / "target.jsonl")]
    assert targets.count("shift") == targets.count("copy") == TARGETS // 2


def test_subtasks_are_named_only_where_every_target_is_wanted(tmp_path):
    write_project(tmp_path, 0, ["three_clean", "sort_noise"])
    clean = records(tmp_path / "targets" / "three_clean" / "target.jsonl")
    noisy = records(tmp_path / "targets" / "sort_noise" / "target.jsonl")
    assert {row["group"] for row in clean} == {"reverse", "sort", "shift"}
    assert not any("group" in row for row in noisy)


def outcomes(gains, seeds=6):
    """Outcomes in which each strategy's preference is random's plus a known gain; seeds shift all alike."""
    rng = np.random.default_rng(0)
    found = []
    for seed in range(seeds):
        base = 0.4 + rng.normal(0, 0.05)
        entries = {
            strategy: {"target_preference": base + gain + rng.normal(0, 1e-4), "exact_match": 0.5, "precision": 0.5}
            for strategy, gain in gains.items()
        }
        found.append({"seed": seed, "situations": {"sort_noise": entries}})
    return found


def test_summary_recovers_planted_shares_and_differences():
    gains = {"base": -0.1, "random": 0, "prism": 0.08, "uniform": 0.02, "less": 0.1, "prism-unit": 0.08, "oracle": 0.1}
    gains |= {"prism-cover": 0.09, "less-max": 0.05}
    found = summary(outcomes(gains))["sort_noise"]
    assert found["strategies"]["prism"]["gap_recovered"]["mean"] == pytest.approx(0.8, abs=0.01)
    assert found["strategies"]["oracle"]["gap_recovered"]["mean"] == pytest.approx(1)
    assert found["differences"]["prism"]["uniform"]["mean"] == pytest.approx(0.06, abs=0.001)
    verdict = " ".join(found["verdict"])
    assert "prism is above uniform" in verdict and "prism is below less" in verdict
    assert "not significantly different from prism-unit" in verdict and "prism-cover is above less-max" in verdict
    assert json.dumps(found)


def test_a_situation_without_a_gap_has_no_share():
    gains = dict.fromkeys(["base", "random", *GRADIENT, *SEVERAL, "oracle"], 0.0)
    rng = np.random.default_rng(1)
    made = outcomes(gains)
    for one in made:
        for entry in one["situations"]["sort_noise"].values():
            entry["target_preference"] += rng.normal(0, 0.01)
    assert summary(made)["sort_noise"]["strategies"]["prism"]["gap_recovered"]["mean"] is None


def test_defaults_were_chosen_on_four_situations_and_the_others_are_unseen():
    seen = [name for name, one in SITUATIONS.items() if not one.unseen]
    assert seen == ["reverse_noise", "sort_noise", "reverse_addition", "three_clean"] and len(SITUATIONS) == 8
