"""The verdict on top of a page: what it recommends, and how sure it says that is."""

import pytest
from report_samples import one_target

from prism_assets.evaluation.metrics import mean_over_seeds
from prism_assets.report.headline import headline


def target(base: float | None = 0.3, trust=None, use="keep", **preferences: list[float]) -> dict:
    """A target whose strategies have these target preferences, a number a seed."""
    return {
        "use": use,
        "base": {"target_preference": base},
        "trust": trust,
        "strategies": {
            name: {
                "target_preference": mean_over_seeds(values),
                "per_seed": [{"seed": seed, "target_preference": value} for seed, value in enumerate(values)],
            }
            for name, values in preferences.items()
        },
    }


def test_what_is_clearly_ahead_is_recommended_with_its_figure():
    said = headline("t", target(prism=[0.6, 0.62, 0.61], less=[0.5, 0.51, 0.5], random=[0.4, 0.41, 0.42]))
    assert said.use == "Use the rows that prism selects: 0.610 in target preference, the base model 0.300."
    assert "prism is higher than random by 0.200 on average, and ahead at 3 of 3 seeds" in said.sure
    assert "3 seeds describe the runs at hand and are no significance test" in said.sure
    assert "“prism experiment t”" in said.sure


@pytest.mark.parametrize(
    "random",
    [
        [0.58, 0.6, 0.59],  # within one standard deviation of 0.04
        [0.7, 0.3, 0.3],  # far below on average, but ahead at the first seed
    ],
)
def test_random_would_do_where_nothing_is_clearly_ahead_of_it(random):
    said = headline("t", target(prism=[0.6, 0.64, 0.56], random=random))
    assert said.use.startswith("Random would do: prism is not clearly ahead of it")


def test_random_would_do_where_it_is_the_best():
    said = headline("t", target(prism=[0.6, 0.64, 0.56], random=[0.9, 0.9, 0.9]))
    assert said.use == "Random would do: no strategy is above it in target preference."


def test_strategies_that_are_level_are_both_named():
    said = headline("t", target(prism=[0.6, 0.62], less=[0.59, 0.62], uniform=[0.58, 0.63], random=[0.4, 0.41]))
    assert "prism selects" in said.use and said.use.endswith("; less and uniform are not clearly behind.")


def test_the_base_model_is_kept_where_nothing_is_above_it():
    said = headline("t", target(base=0.7, prism=[0.6, 0.62], random=[0.4, 0.41]))
    assert said.use == (
        "Keep the base model: no strategy is above it in target preference (0.700; the best, prism, is at 0.610)."
    )


def test_without_random_it_is_said_that_random_is_not_known():
    said = headline("t", target(prism=[0.6, 0.62], uniform=[0.4, 0.41]))
    assert "as random is not among the strategies" in said.use and "random" not in said.sure


def test_of_a_removal_rows_are_removed_and_the_oracle_is_no_choice():
    said = headline("t", target(use="remove", oracle=[0.9, 0.9], prism=[0.6, 0.62], random=[0.4, 0.41]))
    assert said.use.startswith("Remove the rows that prism ranks first, and train on the rest")
    said = headline("t", target(full=[0.9, 0.91], prism=[0.6, 0.62], random=[0.4, 0.41]))
    assert said.use.startswith("Train on the whole pool: full is ahead")


def test_one_seed_and_unmeasured_strategies_are_called_so():
    said = headline("t", target(prism=[0.6], random=[0.4]))
    assert said.use.startswith("Random would do") and "one seed says nothing about chance" in said.sure
    assert headline("t", {"strategies": {"prism": {}}}).use == "Nothing was measured of these strategies yet."


def test_another_metric_with_another_winner_is_named():
    data = target(prism=[0.6, 0.62], random=[0.4, 0.41])
    for name, values in (("prism", [0.1, 0.12]), ("random", [0.5, 0.51])):
        entry = data["strategies"][name]
        entry["exact_match"] = mean_over_seeds(values)
        for seed, value in zip(entry["per_seed"], values, strict=True):
            seed["exact_match"] = value
    assert "by exact match random is ahead of it" in headline("t", data).sure


def test_trust_is_measured_or_not_and_failures_are_named():
    said = headline("t", target(prism=[0.6]))
    assert said.trust == "Whether the scores can be trusted was not measured; “prism trust t” measures it."
    findings = [
        {"question": "Does it?", "passed": True},
        {"question": "Is it?", "passed": None},
        {"question": "Will it?", "passed": False},
    ]
    said = headline("t", target(prism=[0.6], trust=findings))
    assert (
        said.trust == ("Trust was measured: 1 of 3 questions hold, 1 could not be answered. What does not: Will it?")
        and not said.trusted
    )
    assert headline("t", target(prism=[0.6], trust=findings[:1])).trusted


def test_the_sample_of_the_other_tests_has_a_verdict():
    said = headline("reverse_noise", one_target()["targets"]["reverse_noise"])
    assert said.use.startswith("Use the rows that prism selects: 0.631 in target preference")
