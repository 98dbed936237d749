"""lm-eval's harness on a model in memory, and its scores in the lake and the report."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import make_rows, write_lines
from prism_assets.errors import SettingsError, UnusableBenchmark
from prism_assets.evaluation import benchmarks
from prism_assets.evaluation.benchmarks import read_tasks, run_tasks

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'prism-assets[benchmarks]'")

CHOICE_TASK = """
task: turned
dataset_path: json
dataset_kwargs: {data_files: {test: data/turned.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
target_delimiter: ""
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
metadata: {version: 3}
"""


def write_choice_task(folder: Path, count: int = 12) -> Path:
    """A task file and its data: a word turned round, the word, and two letters of either; each is right in turn."""
    rows = []
    for number, row in enumerate(make_rows(count, 400, "reverse")):
        whole = [row["completion"], row["completion"][::-1]]
        choices = [*whole, *(one[:2] for one in whole)]
        rows.append({"prompt": row["prompt"], "choices": choices, "gold": number % 4})
    write_lines(folder / "data" / "turned.jsonl", rows)
    (folder / "turned.yaml").write_text(CHOICE_TASK)
    return folder / "turned.yaml"


@pytest.fixture(scope="module")
def task_file(tmp_path_factory) -> Path:
    return write_choice_task(tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(scope="module")
def adapted_model(tiny_model):
    """The tiny model with an adapter that is far from zero, and its tokenizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model).eval(),
        LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval(), AutoTokenizer.from_pretrained(tiny_model)


def accuracy_by_hand(model, tokenizer, rows) -> dict[str, float]:
    """acc and acc_norm from the log-likelihood of each choice, one sequence at a time."""
    import torch

    right, right_by_length = [], []
    for row in rows:
        likelihoods = []
        for choice in row["choices"]:
            start = len(tokenizer(row["prompt"])["input_ids"])
            ids = torch.tensor(tokenizer(row["prompt"] + choice)["input_ids"])
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0].double()
            log_probs = torch.log_softmax(logits, dim=-1)
            likelihoods.append(sum(float(log_probs[at - 1, ids[at]]) for at in range(start, len(ids))))
        by_length = [one / len(choice) for one, choice in zip(likelihoods, row["choices"], strict=True)]
        right.append(likelihoods.index(max(likelihoods)) == row["gold"])
        right_by_length.append(by_length.index(max(by_length)) == row["gold"])
    return {"acc": sum(right) / len(rows), "acc_norm": sum(right_by_length) / len(rows)}


def rows_of(task_file: Path) -> list[dict]:
    return [json.loads(line) for line in (task_file.parent / "data" / "turned.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("limit", [None, 7])
def test_accuracy_is_that_of_the_choices_log_likelihoods(adapted_model, task_file, limit):
    model, tokenizer = adapted_model
    scores = run_tasks(model, tokenizer, read_tasks([str(task_file)]), batch_size=5, limit=limit)
    rows = rows_of(task_file)[:limit]
    expected = accuracy_by_hand(model, tokenizer, rows)
    assert {score.metric: score.value for score in scores} == pytest.approx(expected)
    assert 0 < expected["acc"] != expected["acc_norm"]  # both say something, and not the same
    assert {(score.task, score.filter, score.documents, score.task_version) for score in scores} == {
        ("turned", "none", len(rows), "3")
    }
    assert all(score.asked and score.higher_is_better for score in scores)
    with model.disable_adapter():
        base = run_tasks(model, tokenizer, read_tasks([str(task_file)]), batch_size=5, limit=limit)
        assert {score.metric: score.value for score in base} == pytest.approx(accuracy_by_hand(model, tokenizer, rows))


def test_generated_answers_are_those_of_greedy_decoding(adapted_model, tmp_path):
    import torch

    model, tokenizer = adapted_model
    prompts = [row["prompt"] for row in make_rows(6, 500, "reverse")]
    greedy = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        for _ in range(4):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        greedy.append(tokenizer.decode(ids[0, -4:], skip_special_tokens=True).strip())
    answers = [text if number % 3 else "x" + text for number, text in enumerate(greedy)]
    write_lines(tmp_path / "said.jsonl", [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)])
    (tmp_path / "said.yaml").write_text(
        "task: said\ndataset_path: json\ndataset_kwargs: {data_files: {test: said.jsonl}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\ntarget_delimiter: ''\n"
        "generation_kwargs: {until: ['#'], max_gen_toks: 4, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    tokens = tokenizer.pad_token, len(tokenizer)
    (score,) = run_tasks(model, tokenizer, read_tasks([str(tmp_path / "said.yaml")]), batch_size=3)
    assert (score.metric, score.value) == ("exact_match", pytest.approx(4 / 6))
    assert (tokenizer.pad_token, len(tokenizer)) == tokens


def test_a_task_file_is_known_by_its_content_and_that_of_its_data_not_by_its_place(task_file, tmp_path):
    (before,) = read_tasks([str(task_file)])
    moved = Path(shutil.copytree(task_file.parent, tmp_path / "moved")) / "turned.yaml"
    assert read_tasks([str(moved)])[0].content == before.content
    data = moved.parent / "data" / "turned.jsonl"
    data.write_text(data.read_text().replace("reverse", "Reverse"))
    changed = read_tasks([str(moved)])[0].content
    assert changed != before.content
    (moved.parent / "helper.py").write_text("def process(doc): return doc")  # what `!function helper.process` runs
    with_code = read_tasks([str(moved)])[0].content
    (moved.parent / "shared.yaml").write_text(CHOICE_TASK)
    moved.write_text("include: shared.yaml\nnum_fewshot: 0\n")
    including = read_tasks([str(moved)])[0].content
    (moved.parent / "shared.yaml").write_text(CHOICE_TASK + "description: now\n")
    assert len({before.content, changed, with_code, including, read_tasks([str(moved)])[0].content}) == 5


def test_an_unknown_task_is_answered_with_the_nearest_and_the_way_to_name_a_file(monkeypatch):
    monkeypatch.setattr(benchmarks, "_manager", lambda defaults: SimpleNamespace(all_tasks=["arc_easy", "gsm8k"]))
    with pytest.raises(UnusableBenchmark, match=r"no task 'arc_eazy'; did you mean arc_easy\?.*path of its file"):
        read_tasks(["gsm8k", "arc_eazy"])
    with pytest.raises(UnusableBenchmark, match="two entries are the task 'gsm8k'"):
        read_tasks(["gsm8k", "gsm8k"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no such file"),
        ("task: [a, b", "is no task file of lm-eval"),
        ("group: many\ntask: [a, b]\n", "names no single task"),
        ("include: mine.yaml\n", "includes itself"),
        (
            "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\n",
            r"gone\.jsonl, and there is no",
        ),
        ("task: t\ndataset_path: own\ndataset_kwargs: {trust_remote_code: true}\n", "asks for trust_remote_code"),
    ],
)
def test_a_task_file_that_cannot_serve_is_named_with_the_reason(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UnusableBenchmark, match=rf"mine\.yaml.*{says}"):
        read_tasks([str(path)])


def test_data_that_cannot_be_downloaded_are_said_with_the_task(adapted_model, tmp_path, monkeypatch):
    def no_network(**_):
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr("datasets.load_dataset", no_network)
    path = tmp_path / "far.yaml"
    path.write_text(CHOICE_TASK.replace("turned", "far").replace("json", "some/where").replace("dataset_kwargs", "# "))
    with pytest.raises(UnusableBenchmark, match=r"far cannot be loaded .*the hub cannot be reached.*keep a copy"):
        run_tasks(*adapted_model, read_tasks([str(path)]), batch_size=2)


def test_a_score_that_is_no_finite_number_is_said_with_its_task_and_metric(adapted_model, tmp_path):
    path = write_choice_task(tmp_path, count=3)
    path.write_text(CHOICE_TASK.replace("{metric: acc_norm}", "{metric: acc_norm, aggregation: !function own.nothing}"))
    (tmp_path / "own.py").write_text("def nothing(values):\n    return float('nan')\n")
    with pytest.raises(UnusableBenchmark, match="the acc_norm of turned is nan"):
        run_tasks(*adapted_model, read_tasks([str(path)]), batch_size=2)


def test_a_group_has_one_score_that_is_asked_for_over_the_documents_of_its_members(
    adapted_model, tmp_path, monkeypatch
):
    from lm_eval.tasks import TaskManager

    model, tokenizer = adapted_model
    rows = {}
    for name, count in (("few", 3), ("many", 9)):
        path = write_choice_task(tmp_path / name, count)
        rows[name] = rows_of(path)
        path.write_text(CHOICE_TASK.replace("turned\n", f"{name}\n").replace("data/", f"{tmp_path / name}/data/"))
    write = (
        "group: both\ntask: [few, many]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
        "metadata: {version: 1}\n"
    )
    (tmp_path / "both.yaml").write_text(write)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(benchmarks, "_manager", lambda defaults: manager)
    scores = run_tasks(model, tokenizer, read_tasks(["both"]), batch_size=4)
    (asked,) = [score for score in scores if score.asked]
    expected = accuracy_by_hand(model, tokenizer, [*rows["few"], *rows["many"]])["acc"]
    assert (asked.task, asked.metric, asked.documents, asked.value) == ("both", "acc", 12, pytest.approx(expected))
    assert {score.task for score in scores if not score.asked} == {"few", "many"}


# -- in the pipeline ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    """A finished project with a benchmark of its own. Copy it before changing it."""
    from prism_assets.plots import canvas

    folder = tmp_path_factory.mktemp("benchmarks") / "project"
    project = make_project(folder, strategies=["prism", "random"], evaluation={"benchmarks": ["tasks/turned.yaml"]})
    write_choice_task(folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "png", lambda figure: b"no picture")
        project.run()
    return project


@pytest.fixture
def copy(project, tmp_path, monkeypatch):
    from prism_assets.plots import canvas

    monkeypatch.setattr(canvas, "png", lambda figure: b"no picture")
    return project.copy(tmp_path / "copy")


def test_each_seeds_adapter_and_the_base_model_have_scores_of_their_own(project):
    import numpy as np
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lake, tokenizer = project.lake, project.model.tokenizer()
    rows = rows_of(project.folder / "tasks" / "turned.yaml")

    def stored(partition):
        return {
            row["metric"]: row["value"] for row in lake.read_table(lake.require("benchmarks", partition)).to_pylist()
        }

    base = AutoModelForCausalLM.from_pretrained(project.folder / "model").eval()
    assert stored("base|plain") == pytest.approx(accuracy_by_hand(base, tokenizer, rows))
    told = project.report["targets"]["plain"]["benchmarks"]
    assert told["metrics"]["turned acc"]["base"] == stored("base|plain")["acc"]
    for strategy in ("prism", "random"):
        values = []
        for seed in (0, 1):
            key = f"{strategy}|plain/seed-{seed}"
            base = AutoModelForCausalLM.from_pretrained(project.folder / "model").eval()
            model = PeftModel.from_pretrained(base, lake.local(lake.require("adapters", key))).eval()
            assert stored(key) == pytest.approx(accuracy_by_hand(model, tokenizer, rows))
            values.append(stored(key)["acc"])
        summary = told["metrics"]["turned acc"]["strategies"][strategy]
        assert (summary["mean"], summary["std"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    page = (project.settings.storage.report / "report.html").read_text(encoding="utf-8")
    assert "turned acc_norm" in page and f"lm-eval {told['lm_eval']}" in page


def test_the_catalogue_has_the_scores(project):
    from prism_assets.catalog.sql import connect
    from prism_assets.catalog.views import additions

    stored = project.lake.read_table(project.lake.require("benchmarks", "prism|plain/seed-1"))
    assert set(additions().columns["benchmarks"]) == set(stored.column_names)
    with connect(project.lake) as opened:
        rows = opened.execute(
            "SELECT target, strategy, seed, metric, value FROM benchmarks WHERE seed = 1 AND strategy = 'prism'"
        ).fetchall()
        assert opened.execute("SELECT count(*) FROM benchmarks").fetchone() == (
            10,
        )  # base and 2 × 2 adapters, 2 metrics
    assert sorted(rows) == sorted(("plain", "prism", 1, row["metric"], row["value"]) for row in stored.to_pylist())


def test_an_exported_adapters_card_has_the_scores_and_never_those_of_another(project, tmp_path):
    import numpy as np

    from prism_assets.errors import CannotExport
    from prism_assets.export.export import export

    adapter, _ = export(project.stage, "plain", "prism", tmp_path / "out")

    def stored(partition):
        scores = project.lake.read_table(project.lake.require("benchmarks", partition)).to_pylist()
        return {row["metric"]: row["value"] for row in scores}["acc_norm"]

    values = [stored(f"prism|plain/seed-{seed}") for seed in (0, 1)]
    figures = f"{stored('base|plain'):.3f} | {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} |"
    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert f"| lm-eval: turned acc_norm (12 documents) | {figures}" in card
    assert f"tasks of lm-eval {benchmarks.harness_version()}," in card
    sources = {"before": "base|plain", "seed 0": "prism|plain/seed-0", "seed 1": "prism|plain/seed-1"}
    for what, partition in sources.items():
        scores = project.lake.require("benchmarks", partition)
        assert f"| benchmarks, {what} | `{scores.fingerprint}` | `{scores.content_hash}` |" in card
    changed = project.copy(tmp_path / "copy")
    changed.lake.point(changed.lake.require("benchmarks", "random|plain/seed-0"), "prism|plain/seed-0")
    with pytest.raises(CannotExport, match="those of an earlier adapter"):
        export(changed.stage, "plain", "prism", tmp_path / "other")


def test_changed_data_are_scored_anew_and_nothing_else_is_made(copy):
    data = copy.folder / "tasks" / "data" / "turned.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    made = {step: count for step, count in copy.run().items() if count}
    adapters = {
        copy.lake.require("adapters", f"{s}|plain/seed-{n}").content_hash for s in ("prism", "random") for n in (0, 1)
    }
    assert made == {"Fine-tuning, evaluation": 1 + len(adapters), "Report": 1}
    copy.configure(evaluation={"benchmarks": []})
    assert {step for step, count in copy.run().items() if count} == {"Report"}
    assert "benchmarks" not in copy.report["targets"]["plain"] and copy.lake.heads("benchmarks") == []


def test_a_benchmark_that_cannot_be_run_stops_a_run_before_any_work(make_project, tmp_path):
    from prism_assets.errors import UserMistake

    project = make_project(tmp_path / "project", evaluation={"benchmarks": ["tasks/gone.yaml"]})
    with pytest.raises(UserMistake, match=r"tasks/gone\.yaml: there is no such file"):
        project.run()
    assert project.lake.heads() == []


def test_a_harness_that_is_not_installed_is_said_before_any_work(make_project, tmp_path, monkeypatch):
    monkeypatch.setattr("prism_assets.settings.schema.find_spec", lambda name: None)
    project = make_project(tmp_path / "project", evaluation={"benchmarks": ["gsm8k"]})
    says = r"evaluation\.benchmarks: lm-eval is not installed: `pip install 'prism-assets\[benchmarks\]'`"
    with pytest.raises(SettingsError, match=says):
        project.settings  # noqa: B018
