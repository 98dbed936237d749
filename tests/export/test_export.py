"""`prism export`: an adapter and its data as folders that peft and datasets read, with cards that say where they are
from."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from prism_assets.errors import CannotExport
from prism_assets.export.cards import CitedArtifact, Facts, adapter_card, data_card
from prism_assets.export.export import export

FACTS = Facts(
    target="sums",
    strategy="prism",
    budget="5%",
    base_model="some/model",
    starting_adapter=None,
    model_fingerprint="ab" * 16,
    feature_version="cd" * 16,
    composition={"web text: 2|3": 10, "open/sums": 30},
    rows=40,
    completion_tokens=1234,
    pool_rows=800,
    steps=80,
    seed=7,
    base={"target_preference": 0.5, "mean_log_prob": -0.75, "exact_match": None},
    figures={
        "target_preference": {"mean": 0.625, "std": 0.0312, "seeds": 3},
        "mean_log_prob": {"mean": -0.25, "std": None, "seeds": 3},
        "exact_match": None,
    },
    held_out_records=50,
    harness="lm-eval 0.4.13",
    benchmarks=[("arc_easy acc (7 documents)", 0.25, {"mean": 0.3125, "std": 0.0125, "seeds": 3})],
    made_from=[
        CitedArtifact("live_pool", "23" * 16, "45" * 16, ""),
        CitedArtifact("selection", "ef" * 16, "01" * 16, "run-1"),
    ],
    results=[CitedArtifact("adapter, seed 7", "67" * 16, "89" * 16, "run-2")],
)


def front_matter(card: str) -> dict:
    start, front, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front)


@pytest.fixture
def prism(monkeypatch):
    monkeypatch.delenv("PRISM_CONFIG", raising=False)

    def run(*arguments):
        from prism_assets.cli import app

        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="module")
def exported(two_versions, tmp_path_factory):
    """The folder of an exported project, its lake's files before and after."""
    folder = tmp_path_factory.mktemp("export") / "out"

    def files():
        return {str(path): path.read_bytes() for path in two_versions.lake.folder.rglob("*") if path.is_file()}

    before = files()
    export(two_versions.stage, "plain", "prism", folder)
    return folder, before, files()


def test_the_exported_adapter_computes_what_the_pipelines_own_does(two_versions, exported):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder, *_ = exported
    adapter = two_versions.lake.require("adapters", "prism|plain/seed-0")
    ids = torch.arange(4, 30)[None]
    lora = two_versions.settings.lora
    with torch.no_grad():
        with two_versions.model.adapted(
            rank=lora.rank,
            alpha=lora.alpha,
            target_modules=lora.target_modules,
            state=load_file(two_versions.lake.local(adapter, "adapter_model.safetensors")),
        ) as model:
            own = model(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(two_versions.folder / "model").eval()
        plain = base(input_ids=ids).logits
        handed_on = PeftModel.from_pretrained(base, folder / "adapter").eval()(input_ids=ids).logits
    assert torch.equal(handed_on, own)
    assert not torch.allclose(own, plain)


def test_the_exported_data_are_the_selected_rows_as_datasets_reads_them(two_versions, exported, tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    folder, *_ = exported
    loaded = datasets.load_dataset(str(folder / "data"), split="train", cache_dir=str(tmp_path))
    selected = two_versions.selected("prism")
    assert len(loaded) == len(selected) > 0
    for row, own in zip(loaded, selected, strict=True):
        assert row["messages"] == json.loads(own["messages"])
        for name in ("rank", "score", "id", "shard", "row", "source", "prompt", "completion", "completion_tokens"):
            assert row[name] == own[name]
    assert "input_ids" not in loaded.column_names


def test_the_adapters_card_names_data_strategy_lineage_and_figures(two_versions, exported):
    folder, *_ = exported
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    front = front_matter(card)
    assert (front["base_model"], front["library_name"]) == ("model", "peft")
    # The sources are bare words, which on the hub would be data sets of somebody else.
    assert "datasets" not in front and "lora" in front["tags"]
    assert front["metrics"] == ["target_preference", "mean_log_prob", "exact_match"]
    lake = two_versions.lake
    selection = two_versions.selection("prism")
    version = selection.header["version"]
    told = [
        (selection, "selection"),
        (lake.require("live_pool", None, lake.heads("live_pool")[0]["scope"]), "live_pool"),
        (lake.require("warmup_checkpoints", None, lake.heads("warmup_checkpoints")[0]["scope"]), "warmup_checkpoints"),
        (lake.require("candidate_index", None, version), "candidate_index"),
        (lake.require("adapters", "prism|plain/seed-0"), "adapter, seed 0"),
        (lake.require("evaluations", "base|plain"), "evaluation, before"),
        (lake.require("evaluations", "prism|plain/seed-0"), "evaluation, seed 0"),
    ]
    for artifact, what in told:
        line = f"| {what} | `{artifact.fingerprint}` | `{artifact.content_hash}` | `{artifact.header['run_id']}` |"
        assert line in card, what
    assert version in card and two_versions.model.identify().fingerprint in card
    notes, base = told[-1][0].notes, lake.require("evaluations", "base|plain").notes
    assert f"| mean log-probability | {base['mean_log_prob']:.3f} | {notes['mean_log_prob']:.3f} |" in card
    assert "strategy `prism`" in card and "budget 8" in card and f"{selection.notes['rows']} examples" in card


def test_an_export_changes_nothing_in_the_lake(exported):
    _, before, after = exported
    assert before == after


def test_figures_are_mean_and_spread_over_seeds():
    card = adapter_card(FACTS)
    assert "fine-tuned over 3 seeds, mean ± standard deviation" in card
    assert "| target preference | 0.500 | 0.625 ± 0.031 |" in card
    assert "| mean log-probability | -0.750 | -0.250 |" in card
    assert (
        "| lm-eval: arc_easy acc (7 documents) | 0.250 | 0.312 ± 0.013 |" in card and "tasks of lm-eval 0.4.13," in card
    )
    assert "exact match" not in card


def test_the_datas_card_ends_its_lineage_with_the_selection():
    assert "run-1" in data_card(FACTS) and "run-2" in adapter_card(FACTS)
    assert "run-2" not in data_card(FACTS)


def test_front_matter_names_only_what_can_be_the_name_of_a_data_set():
    assert front_matter(adapter_card(FACTS))["datasets"] == ["open/sums"]
    assert "| `web text: 2\\|3` | 10 |" in adapter_card(FACTS)
    assert "datasets" not in front_matter(
        adapter_card(FACTS._replace(composition={"no name!": 1, "a/b c": 1, "label": 1}))
    )
    assert front_matter(adapter_card(FACTS))["metrics"] == ["target_preference", "mean_log_prob"]


def test_the_hubs_own_reader_understands_the_cards():
    from huggingface_hub import DatasetCard, ModelCard

    assert ModelCard(adapter_card(FACTS)).data.base_model == "some/model"
    assert DatasetCard(data_card(FACTS)).data.configs[0]["data_files"] == [{"split": "train", "path": "train.parquet"}]


# -- refusals ----------------------------------------------------------------------------------------------------


def test_an_export_replaces_an_earlier_one_only_when_told_to(two_versions, prism, tmp_path):
    arguments = ("export", "plain", "--to", tmp_path / "out", "--config", two_versions.config)
    assert prism(*arguments).exit_code == 0
    card = tmp_path / "out" / "adapter" / "README.md"
    card.write_text("mine")
    refused = prism(*arguments)
    assert refused.exit_code == 2 and "--force" in refused.output and card.read_text() == "mine"
    assert prism(*arguments, "--force", "--strategy", "random").exit_code == 0
    assert "selected by random" in card.read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter", "data"]


def test_what_no_export_wrote_is_never_replaced(two_versions, prism):
    """The project's own folder has a folder `data`: the inbox."""
    inbox = sorted(path.name for path in two_versions.inbox.iterdir())
    refused = prism("export", "plain", "--to", two_versions.folder, "--force", "--config", two_versions.config)
    assert refused.exit_code == 2 and "was not written by an export" in refused.output
    assert sorted(path.name for path in two_versions.inbox.iterdir()) == inbox
    assert not (two_versions.folder / "adapter").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["gone"], "gone: prism.yaml names plain, pairs"), (["plain", "--strategy", "full"], "full: prism.yaml names")],
)
def test_unknown_names_are_answered_with_the_known(two_versions, prism, tmp_path, arguments, says):
    refused = prism("export", *arguments, "--to", tmp_path, "--config", two_versions.config)
    assert refused.exit_code == 2 and says in refused.output


def test_an_export_before_the_first_run_says_what_to_do(make_project, prism, tmp_path):
    project = make_project(tmp_path / "project")
    refused = prism("export", "plain", "--to", tmp_path / "out", "--config", project.config)
    assert refused.exit_code == 2 and "prism run --target plain" in " ".join(refused.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", ["adapters", "evaluations"])
def test_an_adapter_of_other_rows_and_figures_of_another_adapter_are_refused(two_versions, tmp_path, table):
    project = two_versions.copy(tmp_path / "project")
    other = project.lake.require(table, "random|plain/seed-0")
    assert project.selected("random") != project.selected("prism")
    project.lake.point(other, "prism|plain/seed-0")
    with pytest.raises(CannotExport, match="do not belong together"):
        export(project.stage, "plain", "prism", tmp_path / "out")
    assert not (tmp_path / "out").exists()
