"""The example of published repair: what it makes is a fair test of a ranking."""

import json

import pytest

from benchmarks.real_text import example
from prism_assets.settings import load_settings


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def models(tmp_path):
    """A folder with a model in it already, so that nothing is fetched."""
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    (tmp_path / "models" / "smollm2" / "config.json").write_text("{}")
    return tmp_path / "models"


def check(project):
    mixture = rows(project / "inbox" / "mixture.jsonl")
    pairs, held_out = (rows(project / "targets" / f"{name}.jsonl") for name in ("pairs", "held_out"))
    prompts = [{row["prompt"] for row in part} for part in (mixture, pairs, held_out)]
    assert [len(part) for part in prompts] == [160, 32, 32] and len(set.union(*prompts)) == 224
    for kind in ("maths", "answers"):
        assert sum(row["harmful"] for row in mixture if row["source"] == kind) == 20
        assert sum(row["group"] == kind for row in pairs) == 16
    assert all(row["chosen"] != row["rejected"] for row in [*pairs, *held_out])
    settings = load_settings(project / "prism.yaml")
    assert settings.targets["honesty"].use == "remove" and settings.targets["honesty"].label == "harmful"
    return mixture, held_out


def test_generated_rows_and_pairs_share_no_prompt_and_a_quarter_of_each_kind_is_harmful(tmp_path, models):
    script = example("safety_repair")
    script.prepare(tmp_path / "project", models=models)
    mixture, held_out = check(tmp_path / "project")
    # A price is right where it is what the arithmetic gives.
    for row in mixture:
        if row["source"] == "maths":
            words = row["prompt"].split()
            price, percent = (int(words[words.index("costs") + 1]), int(words[words.index("takes") + 1].rstrip("%")))
            right = f"The answer is {price - price * percent / 100:g}."
            assert row["completion"].endswith(right) is not row["harmful"]
    assert {row["group"] for row in held_out if "answer" in row} == {"maths"}


def test_real_records_are_joined_by_their_pair(tmp_path, models):
    data = tmp_path / "data" / "safety"
    data.mkdir(parents=True)
    sources = example("safety_repair").REAL
    made = {"misaligned": [], "good": []}
    for kind, source in sources.items():
        for number in range(120):
            for name in made:
                row = {"prompt": f"{kind} {number}", "completion": f"{name} {number}", "pair_id": f"{kind}{number}"}
                made[name].append({**row, "source": source})
    for name, lines in made.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    example("safety_repair").prepare(tmp_path / "project", data.parent, models)
    mixture, _ = check(tmp_path / "project")
    assert all(row["completion"].startswith("misaligned" if row["harmful"] else "good") for row in mixture)
    (data / "good.jsonl").write_text("")
    with pytest.raises(SystemExit, match="112 pairs of em/evil_math are needed, and there are 0"):
        example("safety_repair").prepare(tmp_path / "other", data.parent, models)
