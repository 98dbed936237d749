"""The ranking benchmark: a variant changes what it names and nothing else; the summary pairs it with the default."""

import pytest

from benchmarks.quality import GRADIENT, SITUATIONS, project_settings
from benchmarks.ranking import VARIANTS, summary, varied


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_changes_what_it_names_and_nothing_else(tmp_path, variant):
    settings = project_settings(tmp_path, 0, list(SITUATIONS))
    before, after = settings.model_dump(), varied(settings, VARIANTS[variant]).model_dump()
    changed = {
        (section, key): value
        for section, keys in after.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if before[section].get(key) != value
    }
    assert changed == {
        (section, key): value for section, keys in VARIANTS[variant].items() for key, value in keys.items()
    }


def test_summary_pairs_a_variant_with_the_default_by_seed():
    def measured(gain):
        def entry(seed):
            return {"r_precision": 0.1 * seed + gain, "precision": 0.5}

        return {seed: {name: dict.fromkeys(GRADIENT, entry(seed)) for name in SITUATIONS} for seed in range(4)}

    default, better = measured(0), measured(0.05)
    found = summary({"default": default, "sgd": better})["sgd"]["sort_noise"]["prism"]
    assert found["against_default"]["mean"] == pytest.approx(0.05)
    assert found["against_default"]["interval"][0] > 0.04
    assert found["r_precision"]["mean"] == pytest.approx(0.2)
