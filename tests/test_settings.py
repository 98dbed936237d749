"""prism.yaml: what is read, what is refused and with which advice."""

import os
import re
from pathlib import Path

import pytest
import yaml

from prism_assets.errors import SettingsError
from prism_assets.identity import lora_identity
from prism_assets.resources.lake.recipe import digest
from prism_assets.settings import STRATEGIES, Budget, Settings, TargetSettings, config_path, load_settings
from prism_assets.settings.budget import parse_budget
from prism_assets.settings.reference import settings_page
from prism_assets.settings.section import Section

MINIMAL = {"targets": {"a": {"examples": "t.jsonl", "eval": "e.jsonl"}}}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("PRISM_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def load(tmp_path):
    """Write a prism.yaml (a mapping laid over the minimal one, or text) and load it."""

    def write_and_load(content=None):
        path = tmp_path / "project" / "prism.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump({**MINIMAL, **(content or {})}))
        return load_settings(path)

    return write_and_load


def refusal(load, content):
    with pytest.raises(SettingsError) as caught:
        load(content)
    return str(caught.value)


# -- reading -----------------------------------------------------------------------------------------------------


def test_everything_but_the_targets_has_a_default(load):
    settings = load()
    assert settings.strategies == ("prism", "prism-cover", "uniform", "less", "random") and settings.seeds == (0, 1, 2)
    assert settings.selection.budget == Budget(kind="share", amount=0.05)
    assert (settings.lora.rank, settings.features.sketch_dim, settings.features.optimizer) == (16, 4096, "sgd")
    assert settings.preference.temperature is None


def test_relative_paths_are_relative_to_the_file(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project" / "local" / "model").mkdir(parents=True)
    settings = load(
        {
            "candidates": {"inbox": "data/in"},
            "storage": {"root": "../lake", "report": "/absolute/report"},
            "model": {"name": "local/model", "adapter": "../adapter"},
        }
    )
    project = tmp_path / "project"
    assert settings.candidates.inbox == project / "data" / "in"
    assert settings.targets["a"].examples == project / "t.jsonl"
    assert settings.targets["a"].eval == project / "e.jsonl"
    assert settings.storage.root == tmp_path / "lake"
    assert settings.storage.report == Path("/absolute/report")
    assert settings.model.name == str(project / "local" / "model")
    assert settings.model.adapter == str(tmp_path / "adapter")


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_a_hub_name_stays_a_hub_name(load, name):
    assert load({"model": {"name": name}}).model.name == name


@pytest.mark.parametrize("written", ["./none", "../none", "~/none", "/none"])
def test_a_name_written_like_a_path_is_a_path_though_nothing_is_there(load, written):
    assert Path(load({"model": {"name": written}}).model.name).is_absolute()


def test_the_file_is_the_one_given_else_of_the_environment_else_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_path() == tmp_path / "prism.yaml"
    monkeypatch.setenv("PRISM_CONFIG", "other.yaml")
    assert config_path() == tmp_path / "other.yaml"
    assert config_path("given.yaml") == tmp_path / "given.yaml"


def test_writing_the_defaults_out_changes_no_identity(load):
    """Fingerprints are made of the settings: `alpha: 32` must be what no alpha is."""
    written = {
        "lora": {"rank": 16, "alpha": 32, "target_modules": "all-linear"},
        "warmup": {"share": 0.05, "epochs": 4, "learning_rate": 2.0e-5},
        "training": {"epochs": 3, "weight_decay": 0, "learning_rate": 2.0e-4},
        "selection": {"budget": "5%"},
        "candidates": {"at_rest_seconds": 2},
    }
    for name, values in load(written).model_dump().items():
        assert digest(values) == digest(load().model_dump()[name]), name


def test_lora_settings_that_came_later_count_only_where_they_are_set(load):
    """A lake of before knows its adapters by the four settings that there were."""
    before = {"rank": 16, "alpha": 32.0, "target_modules": "all-linear", "rslora": False}
    defaults = {"exclude_modules": [], "layers": None, "dropout": 0}
    for written in ({}, {"lora": defaults}):
        settings = load(written)
        assert (
            lora_identity(settings)
            == before
            == settings.model_dump()["lora"]
            == settings.model_dump(mode="json")["lora"]
        )
    set_one_by_one = [
        {"exclude_modules": ["k_proj"]},
        {"exclude_modules": ".*k_proj"},
        {"layers": [0]},
        {"dropout": 0.1},
    ]
    identities = [digest(lora_identity(load({"lora": one}))) for one in [{}, *set_one_by_one]]
    assert len(set(identities)) == 5
    assert lora_identity(load({"lora": {"layers": [2, 0, 2]}}))["layers"] == (0, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lora": {"layers": []}}, "lora.layers"),
        ({"lora": {"layers": [-1]}}, "lora.layers"),
        ({"lora": {"dropout": 1}}, "lora.dropout"),
        ({"lora": {"exclude_modules": ""}}, "lora.exclude_modules"),
        ({"model": {"adapter": "a"}, "lora": {"dropout": 0.1}}, "lora.dropout has no effect beside model.adapter"),
        ({"model": {"adapter_base": "org/base"}}, "model.adapter_base is about model.adapter, which is not set"),
    ],
)
def test_lora_settings_without_a_meaning_are_refused(load, content, message):
    with pytest.raises(SettingsError, match=message):
        load(content)


def test_the_example_of_prism_init_is_valid_and_says_the_defaults(load):
    import prism_assets

    text = (Path(prism_assets.__file__).parent / "example.yaml").read_text(encoding="utf-8")
    example = load(text)
    targets = {name: {"examples": "x", "eval": "x"} for name in example.targets}
    defaults = load({"targets": targets})
    assert example.model_dump(exclude={"targets"}) == defaults.model_dump(exclude={"targets"})


# -- the environment ---------------------------------------------------------------------------------------------


def test_environment_variables_override_the_file(load, monkeypatch, tmp_path):
    monkeypatch.setenv("PRISM_SELECTION__BUDGET", "10%")
    monkeypatch.setenv("PRISM_LORA__RANK", "3")
    monkeypatch.setenv("PRISM_SEEDS", "[7, 8]")
    monkeypatch.setenv("PRISM_STORAGE__ROOT", "elsewhere")
    monkeypatch.setenv("PRISM_PREFERENCE__TEMPERATURE", "null")
    settings = load({"lora": {"rank": 5, "alpha": 9}, "preference": {"temperature": 0.5}})
    assert settings.selection.budget == Budget(kind="share", amount=0.1)
    assert (settings.lora.rank, settings.lora.alpha) == (3, 9)
    assert settings.seeds == (7, 8) and settings.preference.temperature is None
    assert settings.storage.root == tmp_path / "project" / "elsewhere"


def test_other_variables_of_the_same_prefix_are_nobodys_settings(load, monkeypatch):
    monkeypatch.setenv("PRISM_CONFIG", "x")
    monkeypatch.setenv("PRISM_REAL_DATA", "y")
    monkeypatch.setenv("PRISM", "z")
    assert load().lora.rank == 16


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("PRISM_LORA__RANKS", "PRISM_LORA__RANK"),
        ("PRISM_LORAS__RANK", "PRISM_LORA__RANK"),
        ("PRISM_SELECTION_BUDGET", "PRISM_SELECTION__BUDGET"),
        ("PRISM_BUDGET", "PRISM_SELECTION__BUDGET"),
        ("PRISM_TARGET", "PRISM_TARGETS"),
    ],
)
def test_a_variable_that_names_no_setting_is_refused(load, monkeypatch, variable, meant):
    monkeypatch.setenv(variable, "3")
    message = refusal(load, {})
    assert f"variable {variable} names no key" in message and f"did you mean {meant}?" in message


def test_a_tracker_that_is_not_installed_is_said_before_any_work(load, monkeypatch):
    monkeypatch.setattr("prism_assets.settings.schema.find_spec", lambda name: None)
    assert "wandb is not installed" in refusal(load, {"training": {"report_to": ["wandb"]}})


def test_trackers_are_no_part_of_what_is_fingerprinted(load, monkeypatch):
    monkeypatch.setattr("prism_assets.settings.schema.find_spec", lambda name: object())
    plain, tracked = load({}), load({"training": {"report_to": ["tensorboard"]}})
    assert tracked.training.report_to == ("tensorboard",)
    assert plain.model_dump() == tracked.model_dump()


def test_a_benchmarks_file_is_relative_to_the_settings_and_a_name_stays_a_name(load, tmp_path, monkeypatch):
    monkeypatch.setattr("prism_assets.settings.schema.find_spec", lambda name: object())
    monkeypatch.chdir("/")
    settings = load({"evaluation": {"benchmarks": ["arc_easy", "tasks/mine.yaml"]}})
    assert settings.evaluation.benchmarks == ("arc_easy", str(tmp_path / "project" / "tasks" / "mine.yaml"))
    assert load({}).evaluation.benchmarks == ()


def test_a_variable_that_is_no_yaml_is_named(load, monkeypatch):
    monkeypatch.setenv("PRISM_SEEDS", "[1, 2")
    message = refusal(load, {})
    assert "PRISM_SEEDS" in message and "YAML" in message


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "place", "advice"),
    [
        ({"target": {}}, "target", "did you mean `targets`?"),
        ({"lora": {"rnak": 4}}, "lora.rnak", "did you mean `rank`?"),
        ({"warmup": {"learning_rte": 1}}, "warmup.learning_rte", "did you mean `learning_rate`?"),
        ({"targets": {"a": {"examples": "t", "eval": "e", "evals": "f"}}}, "targets.a.evals", "did you mean `eval`?"),
        ({"storage": {"zzzzzzzz": 1}}, "storage.zzzzzzzz", "known here: out, report, root."),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(load, content, place, advice):
    assert f"  {place}: unknown key; {advice}" in refusal(load, content).splitlines()


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"rank": "many"}}, "lora.rank"),
        ({"features": {"optimizer": "adamw"}}, "features.optimizer"),
        ({"features": {"sketch_dim": "all"}}, "features.sketch_dim"),
        ({"features": {"sketch_dim": 0}}, "features.sketch_dim"),
        ({"preference": {"temperature": 0}}, "preference.temperature"),
        ({"preference": {"temperature": float("inf")}}, "preference.temperature"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
        ({"warmup": {"share": 1.5}}, "warmup.share"),
        ({"strategies": ["prism", "magic"]}, "strategies.1"),
        ({"strategies": []}, "strategies"),
        ({"seeds": []}, "seeds"),
        ({"selection": {"budget": "lots"}}, "selection.budget"),
        ({"targets": {}}, "targets"),
        ({"targets": None}, "targets"),
        ({"targets": {"a": {"examples": "t"}}}, "targets.a.eval"),
        ({"lora": ["rank"]}, "lora"),
    ],
)
def test_a_bad_value_is_refused_with_its_place(load, content, place):
    lines = refusal(load, content).splitlines()
    assert "prism.yaml needs a change" in lines[0]
    assert any(line.startswith(f"  {place}") for line in lines[1:]), lines


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "a b", "a|b", "x" * 101, "a\n"])
def test_a_target_name_that_is_no_plain_name_is_refused(load, name):
    message = refusal(load, {"targets": {name: {"examples": "t", "eval": "e"}}})
    assert "a target's name is made of letters" in message


def test_repetitions_are_refused(load):
    assert "seeds names something twice: 1, 1" in refusal(load, {"seeds": [1, 1]})
    assert "strategies names something twice" in refusal(load, {"strategies": ["prism", "prism"]})


def test_all_that_is_wrong_is_said_at_once(load):
    message = refusal(load, {"lora": {"rank": 0, "rnak": 1}, "seeds": []})
    assert all(place in message for place in ("lora.rank:", "lora.rnak:", "seeds:"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("targets: [", "is not YAML"),
        ("", "must hold keys and values"),
        ("- a\n- b\n", "must hold keys and values at its top, such as `targets:`; it holds list"),
        ("1: 2\ntargets: {}\n", "every key at the top must be a word"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(load, text, says):
    assert says in refusal(load, text)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "prism.yaml").write_bytes(b"\xff\xfe\x00targets")
    with pytest.raises(SettingsError, match="is not YAML"):
        load_settings(tmp_path / "prism.yaml")


@pytest.mark.parametrize("text", ["targets: {}\ntargets: {}\n", "lora: {rank: 3, rank: 4}\n"])
def test_a_key_that_stands_twice_is_refused_not_dropped(load, text):
    assert re.search(r"`(targets|rank)` is given twice", refusal(load, text))


def test_a_missing_file_is_named_with_the_command_that_writes_one(tmp_path):
    with pytest.raises(SettingsError, match=r"There is no .*nowhere\.yaml\. `prism init` writes"):
        load_settings(tmp_path / "nowhere.yaml")


# -- budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "amount", "shown"),
    [
        (500, "rows", 500, "500"),
        ("500", "rows", 500, "500"),
        ("1_000 rows", "rows", 1000, "1000"),
        ("2k", "rows", 2000, "2000"),
        ("5%", "share", 0.05, "5%"),
        ("0.5 %", "share", 0.005, "0.5%"),
        ("100%", "share", 1.0, "100%"),
        ("200k tokens", "tokens", 200_000, "200000 tokens"),
        ("1.5M tokens", "tokens", 1_500_000, "1500000 tokens"),
        ("1,000 Token", "tokens", 1000, "1000 tokens"),
    ],
)
def test_a_budget_is_rows_a_share_or_tokens(text, kind, amount, shown):
    budget = parse_budget(text)
    assert budget == Budget(kind=kind, amount=amount) and str(budget) == shown


@pytest.mark.parametrize(
    "text", ["", "0", "-5", 0, 2.5, "0%", "101%", "5% tokens", "many", "5 percent", None, True, [5], "0.5k tokens%"]
)
def test_what_is_no_budget_is_refused_with_the_forms(load, text):
    message = refusal(load, {"selection": {"budget": text}})
    assert "selection.budget" in message
    assert re.search(r"is no (budget: write|share of the pool: write|whole number)", message)


@pytest.mark.parametrize(
    "given", [{"kind": "rows", "amount": -5}, {"kind": "share", "amount": 3}, {"amount": 3}, {"amounts": 3}]
)
def test_a_budget_in_parts_is_checked_too(load, given):
    assert "selection.budget" in refusal(load, {"selection": {"budget": given}})


def test_settings_survive_their_own_dump(load):
    settings = load({"selection": {"budget": "200k tokens"}})
    assert Settings(**settings.model_dump()) == settings
    assert set(STRATEGIES) > set(settings.strategies)


# -- documentation -----------------------------------------------------------------------------------------------


def fields(section):
    """Every key of a section and of the sections in it, with its place."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from ((f"{name}.{place}", one) for place, one in fields(kind))
        else:
            yield name, field


def test_every_key_is_described():
    described = {place: one.description or "" for place, one in [*fields(Settings), *fields(TargetSettings)]}
    assert len(described) > 60
    assert [place for place, text in described.items() if not text.endswith(".") or "\n" in text] == []


def test_the_page_of_settings_is_that_of_the_schema():
    page = Path(__file__).parent.parent / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == settings_page(), "python -m prism_assets.settings.reference writes it"


def test_rows_wider_than_an_index_are_refused(load):
    message = refusal(load, {"features": {"sketch_dim": 2**18}, "warmup": {"checkpoints": 5}})
    assert "262,144 x warmup.checkpoints 5 makes rows of 1,310,720 dimensions" in message
