"""The arithmetic and the words of an experiment, on trials whose answers are known."""

import numpy as np
import pytest

from prism_assets.experiment.summary import Cost, Trial, long_table, share_cost, summarize_trials, table, total_cost
from prism_assets.experiment.verdict import verdict

BASE = {"target_preference": 0.3, "mean_log_prob": -1.2, "exact_match": 0.1}


def trials(values, seeds=2, exact_match=True, costs=lambda strategy, split, seed: []):
    """`values`: strategy -> one number per split; seeds of a split lie symmetrically about it."""
    made = []
    for strategy, its in values.items():
        for split, value in enumerate(its):
            for seed in range(seeds):
                shift = 0.01 * (seed - (seeds - 1) / 2)
                metrics = {
                    "target_preference": value + shift,
                    "mean_log_prob": value - 2 + shift,
                    "exact_match": value / 2 if exact_match else None,
                }
                base = BASE if exact_match else {**BASE, "exact_match": None}
                made.append(Trial(strategy, split, seed, metrics, base, 8, 40, costs(strategy, split, seed)))
    return made


FLAT = {"uniform": [0.5, 0.55, 0.6], "less": [0.52, 0.53, 0.64], "random": [0.3, 0.31, 0.29]}


def outcome(prism, **options):
    content = summarize_trials(trials({"prism": prism, **FLAT}, **options), "apart")
    return content, verdict(content)


def test_the_unit_is_a_split_and_counts_as_the_mean_of_its_seeds():
    content, _ = outcome([0.7, 0.9, 0.8])
    entry = content["strategies"]["prism"]["target_preference"]
    assert (content["unit"], content["units"], entry["n"]) == ("split", 3, 3)
    np.testing.assert_allclose(entry["values"], [0.7, 0.9, 0.8])
    assert entry["mean"] == pytest.approx(0.8) and entry["std"] == pytest.approx(np.std([0.7, 0.9, 0.8], ddof=1))


def test_more_seeds_in_a_split_do_not_narrow_the_interval():
    few, many = (outcome([0.7, 0.9, 0.8], seeds=seeds)[0] for seeds in (2, 20))
    for other in FLAT:
        intervals = [one["differences"]["prism"][other]["target_preference"]["interval"] for one in (few, many)]
        np.testing.assert_allclose(*intervals)


def test_differences_are_paired_by_split():
    content, _ = outcome([0.6, 0.65, 0.7])  # always 0.1 above uniform, which itself moves
    found = content["differences"]["prism"]["uniform"]["target_preference"]
    np.testing.assert_allclose(found["values"], [0.1] * 3)
    assert found["std"] == pytest.approx(0, abs=1e-12)
    # Student's t over the three differences, by hand.
    less = content["differences"]["prism"]["less"]["target_preference"]
    each = np.array([0.08, 0.12, 0.06])
    half = 4.302653 * each.std(ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(less["interval"], [each.mean() - half, each.mean() + half], atol=1e-4)


def test_with_one_split_seeds_are_the_unit():
    one_split = {name: its[:1] for name, its in {"prism": [0.7], **FLAT}.items()}
    content = summarize_trials(trials(one_split, seeds=3), "apart")
    assert (content["unit"], content["units"]) == ("seed", 3)
    assert "over seeds" in verdict(content)[0] and "training alone" in verdict(content)[0]


def test_a_single_trial_has_no_interval_and_the_words_say_so():
    one = {name: its[:1] for name, its in {"prism": [0.9], **FLAT}.items()}
    content = summarize_trials(trials(one, seeds=1), "apart")
    assert content["differences"]["prism"]["uniform"]["target_preference"]["interval"] is None
    text = " ".join(verdict(content))
    assert "no interval is known" in text and "says nothing about chance" in text
    assert "paid" not in text and "is above" not in text and "95%" not in text


@pytest.mark.parametrize(
    ("prism", "says"),
    [
        ([0.7, 0.76, 0.79], "The preference weighting paid here"),
        ([0.4, 0.44, 0.51], "The preference weighting cost here"),
        ([0.9, 0.3, 0.6], "It is not shown that the preference weighting pays here"),
    ],
    ids=["above", "below", "apart"],
)
def test_the_verdict_on_weighting_follows_from_the_interval(prism, says):
    content, sentences = outcome(prism)
    assert sum(says in one for one in sentences) == 1
    low, high = content["differences"]["prism"]["uniform"]["target_preference"]["interval"]
    assert (low > 0, high < 0) == ("paid" in says, "cost" in says)


def test_what_cannot_be_told_apart_is_named_so():
    _, sentences = outcome([0.9, 0.3, 0.6])
    assert (
        "prism in target preference: no significant difference (95% interval) from uniform, less and random."
        in sentences
    )
    _, sentences = outcome([0.54, 0.56, 0.6])
    assert (
        "prism in target preference: above random; no significant difference (95% interval) from uniform and less."
        in sentences
    )


def test_the_verdict_states_its_limits():
    _, sentences = outcome([0.7, 0.76, 0.79])
    text = " ".join(sentences)
    assert "3 splits × 2 seeds for each of 4 strategies" in sentences[0]
    assert "redraws of the same records, so they overlap" in text
    assert "reaches 2.5 standard deviations" in text  # 4.30/√3
    # prism against three, and these among themselves; three metrics each.
    assert "there are 18, so one in twenty of them misses by chance" in text
    twelve = {name: [0.5 + 0.01 * n for n in range(12)] for name in ("prism", *FLAT)}
    assert "standard deviations" not in " ".join(verdict(summarize_trials(trials(twelve), "apart")))


def test_strategies_below_the_base_model_are_named():
    _, sentences = outcome([0.7, 0.76, 0.2])
    content, sentences = outcome([0.1, 0.12, 0.14])
    assert "Target preference: less has the highest mean, 0.563; the base model is at 0.300, above prism." in sentences


def test_without_answers_nothing_is_said_of_exact_match():
    content, sentences = outcome([0.7, 0.76, 0.79], exact_match=False)
    assert content["strategies"]["prism"]["exact_match"] is None and content["base"]["exact_match"] is None
    assert not any("xact match" in one for one in sentences)
    assert table({"t": content})[1][4] == "–"


def test_an_incomplete_grid_is_refused():
    with pytest.raises(ValueError, match=r"there is no trial of \('less', 2, 1\)"):
        summarize_trials(
            [
                one
                for one in trials({"prism": [1, 2, 3], **FLAT})
                if (one.strategy, one.split, one.seed) != ("less", 2, 1)
            ],
            "apart",
        )


def test_an_artefact_that_trials_share_is_paid_once():
    def costs(strategy, split, seed):
        gpu = 1.0 if strategy == "less" else None
        return [
            Cost("target features", f"features-{split}", 5.0, gpu),
            Cost("fine-tuning", f"{strategy}-{split}-{seed}", 2.0, gpu),
            Cost("evaluation", f"judged-{strategy}-{split}-{seed}", None if seed else 0.5, None),
        ]

    content, _ = outcome([0.7, 0.8, 0.9], costs=costs)
    prism = content["strategies"]["prism"]["cost"]
    assert prism["target features"] == {"cpu_seconds": 15.0, "gpu_seconds": None, "unknown": 0}
    assert prism["fine-tuning"]["cpu_seconds"] == 12.0
    assert prism["evaluation"] == {"cpu_seconds": 1.5, "gpu_seconds": None, "unknown": 3}
    assert content["strategies"]["less"]["cost"]["target features"]["gpu_seconds"] == 3.0
    assert content["cost"]["target features"]["cpu_seconds"] == 15.0  # of all strategies together
    assert total_cost(prism) == {"cpu_seconds": 28.5, "gpu_seconds": None, "unknown": 3}
    assert table({"t": content})[2][-2:] == ["28.5 CPU s (3 not recorded)", "–"]
    shared = {
        "warm-up": {"cpu_seconds": 4.0, "gpu_seconds": None, "unknown": 0},
        "hidden states": {"cpu_seconds": 0.5, "gpu_seconds": 0.25, "unknown": 1},
    }
    needed = {name: [] for name in content["strategies"]} | {
        "prism": ["warm-up", "candidate features"],
        "less": ["hidden states"],
    }
    share_cost(content, shared, needed)
    assert content["shared_cost"] == shared
    assert table({"t": content})[2][-2:] == ["28.5 CPU s (3 not recorded)", "32.5 CPU s (3 not recorded)"]
    assert content["strategies"]["less"]["with_shared"]["gpu_seconds"] == pytest.approx(
        total_cost(content["strategies"]["less"]["cost"])["gpu_seconds"] + 0.25
    )


def test_the_long_table_has_each_mean_and_each_difference_once():
    content, _ = outcome([0.7, 0.76, 0.79])
    rows = long_table("t", content)
    assert len({(row["strategy"], row["other"], row["metric"]) for row in rows}) == len(rows) == 3 * (4 + 6)
    (row,) = [r for r in rows if (r["strategy"], r["other"], r["metric"]) == ("prism", "less", "exact_match")]
    assert (row["low"], row["high"]) == content["differences"]["prism"]["less"]["exact_match"]["interval"]


def test_the_page_shows_the_numbers_and_escapes_names():
    from prism_assets.experiment.page import build_page

    content, sentences = outcome([0.7, 0.76, 0.79])
    content |= {"verdict": sentences, "shared_cost": {}}
    data = {
        "format": 1,
        "created": "now",
        "model": {"name": "<m>", "fingerprint": "f" * 32},
        "settings": {},
        "targets": {"<b>": content},
    }
    page = build_page(data)
    assert "0.750 ± 0.046" in page and "&lt;b&gt;" in page and "<b>" + "</b>" not in page and "<script" not in page
    assert all(one.replace("'", "&#39;") in page for one in sentences)
    with pytest.raises(ValueError, match="format 2"):
        build_page({**data, "format": 2})
