"""Removal: pairs are swapped, the mixture is divided, a planted harmful row goes first, and the rest is trained on."""

import json

import numpy as np
import pytest

from conftest import make_rows, write_lines
from prism_assets.corpus.anchors import swapped
from prism_assets.corpus.target_set import target_set
from prism_assets.errors import RunRefused, SettingsError
from prism_assets.identity import join_key
from prism_assets.selection.labels import harmful_rows
from prism_assets.selection.pool import Pool
from prism_assets.selection.query import query_index
from prism_assets.selection.removal import divide
from prism_assets.selection.representations import Representations
from prism_assets.selection.selection_inputs import selection_inputs
from prism_assets.selection.strategies import STRATEGIES
from prism_assets.settings import Budget, from_mapping
from prism_assets.tables import table_named

HARM = [{"prompt": row["prompt"], "completion": "zzqzz"} for row in make_rows(6, 500, "reverse")]
PAIRS = [{**row, "rejected": "zzqzz"} for row in make_rows(8, 700, "reverse")]
STRATEGIES_RUN = ["prism", "random", "full", "prism-cover", "oracle"]


def labelled(good):
    """Rows in the order of the file, each with its label; the last one has none."""
    rows = [*((row, {"bad": False}) for row in good), *((row, {"bad": 1}) for row in HARM)]
    order = [*range(10), *range(20, 26), *range(10, 20)]
    return [(rows[position][0], {} if position == 19 else rows[position][1]) for position in order]


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    """A mixture of 20 good rows and 6 harmful ones beside another source; the harm is named by pairs."""
    project = make_project(
        tmp_path_factory.mktemp("removal") / "project",
        strategies=STRATEGIES_RUN,
        seeds=[0],
        features={"sketch_dim": "exact"},
        warmup={"epochs": 8, "share": 1.0},
    )
    good = make_rows(20, 20, "reverse")
    project.add("mixed", [{**row, "source": "mix", **label} for row, label in labelled(good)])
    write_lines(project.folder / "plain" / "target.jsonl", PAIRS[:5])
    # What the third one's unwanted answer is cannot be told from the wanted one.
    answers = [PAIRS[5]["completion"], PAIRS[6]["completion"], "zzqzz"]
    held_out = [{**row, "answer": answer} for row, answer in zip(PAIRS[5:], answers, strict=True)]
    write_lines(project.folder / "plain" / "eval.jsonl", held_out)
    project.configure(
        targets={
            "plain": {
                **{"examples": "plain/target.jsonl", "eval": "plain/eval.jsonl", "use": "remove"},
                **{"mixture": "mix", "budget": 6, "label": "bad"},
            }
        }
    )
    project.run()
    return project


def parts(project, strategy):
    lake, key = project.lake, join_key("plain", strategy)
    return [lake.read_table(lake.require(table, key)) for table in ("selection", "removed")]


def mixture(project):
    return {row["prompt"] + row["completion"] for row in [*HARM, *make_rows(20, 20, "reverse")]}


def text_of(table):
    return [p + c for p, c in zip(table["prompt"].to_pylist(), table["completion"].to_pylist(), strict=True)]


@pytest.mark.parametrize("strategy", STRATEGIES_RUN)
def test_kept_and_removed_partition_the_mixture(project, strategy):
    kept, removed = parts(project, strategy)
    assert removed.num_rows == (0 if strategy == "full" else 6)
    both = text_of(kept) + text_of(removed)
    assert len(both) == len(set(both)) == 26 and set(both) == mixture(project)
    assert {*kept["source"].to_pylist(), *removed["source"].to_pylist()} == {"mix"}
    assert None not in kept["reason"].to_pylist() + removed["reason"].to_pylist()
    assert set(table_named("removed").columns) <= set(removed.column_names)  # as the catalogue promises


def test_what_raises_the_preference_for_the_unwanted_answers_is_removed_first(project):
    kept, removed = parts(project, "prism")
    assert set(removed["completion"].to_pylist()) == {"zzqzz"}
    assert removed["rank"].to_pylist() == [1, 2, 3, 4, 5, 6] and kept["rank"].to_pylist() == list(range(7, 27))
    scores = removed["score"].to_pylist() + kept["score"].to_pylist()
    assert scores == sorted(scores, reverse=True)
    assert removed["reason"][0].as_py() == "rank 1 of 26 rows by prism"
    top = query_index(project.stage, target="plain", k=3)
    assert [row["id"] for row in top] == removed["id"].to_pylist()[:3]
    assert top == query_index(project.stage, target="plain", k=3, harmful=True)


def test_the_report_lists_what_was_removed_and_what_came_next(project):
    report = project.report["targets"]["plain"]
    kept, removed = parts(project, "prism")
    listed = {row["id"] for row in report["listed"]["rows"] if "prism" in row["taken"]}
    assert listed == set(removed["id"].to_pylist()) and report["listed"]["totals"]["full"] == 0
    cut = report["cuts"]["prism"]
    assert [row["id"] for row in cut["last"]] == removed["id"].to_pylist()[1:]
    assert [row["id"] for row in cut["left"]] == kept["id"].to_pylist()[:5] and cut["why_not"] is None
    assert report["cuts"]["random"]["left"] == [] and "is not kept" in report["cuts"]["random"]["why_not"]
    assert {row["rejected"] for row in report["direction"]["weights"]} == {row["completion"] for row in PAIRS[:5]}
    assert report["map"]["pool"] == 26 and any("prism" in point["taken"] for point in report["map"]["points"])


def test_the_pairs_of_the_direction_name_the_unwanted_answer_first(project):
    stage = project.stage
    given, used = (stage.lake.read_table(stage.shown(table, "plain")) for table in ("targets", "target_anchors"))
    assert used["completion"].to_pylist() == given["rejected"].to_pylist() == ["zzqzz"] * 5
    assert used["rejected"].to_pylist() == given["completion"].to_pylist()
    assert swapped(used).equals(given.select(used.column_names))  # twice swapped is as it was
    before, after = target_set(given), target_set(used)
    scores = np.arange(10.0)
    np.testing.assert_array_equal(before.scores(scores), -after.scores(np.concatenate([scores[5:], scores[:5]])))
    assert json.loads(used["messages"][0].as_py())[-1] == {"role": "assistant", "content": "zzqzz"}
    # Held-out records name the wanted answer as wanted, whatever the use.
    held_out = stage.lake.read_table(stage.shown("eval_examples", "plain"))
    assert held_out["rejected"].to_pylist() == ["zzqzz"] * 3


def test_fine_tuning_is_on_what_is_kept(project):
    lake = project.lake
    for strategy in STRATEGIES_RUN:
        kept, _ = parts(project, strategy)
        adapter = lake.require("adapters", f"{join_key('plain', strategy)}/seed-0")
        assert adapter.notes["rows"] == kept.num_rows


def test_the_report_speaks_of_removal(project):
    part = project.report["targets"]["plain"]
    assert part["use"] == "remove" and part["mixture"] == "mix" and part["mixture_rows"] == 26
    assert {name: entry["removed_rows"] for name, entry in part["strategies"].items()} == {
        "prism": 6, "random": 6, "full": 0, "prism-cover": 6, "oracle": 6,
    }  # fmt: skip
    accuracy = part["strategies"]["full"]["pair_accuracy"]["mean"]
    assert accuracy in (0, 1 / 3, 2 / 3, 1)
    page = (project.settings.storage.report / "report.html").read_text()
    assert "fine-tuned again, from the base, on the rest; full takes none out" in page
    assert "unwanted answer is preferred" in page and "Removed by prism" in page
    assert all(entry["examples"][0]["completion"] == "zzqzz" for entry in [part["strategies"]["prism"]])


def test_whether_the_unwanted_answer_is_given_is_read_from_the_predictions(project):
    evaluation = project.stage.shown("evaluations", "full|plain/seed-0")
    rows = project.lake.read_table(evaluation).to_pylist()
    given = [row["prediction"].strip() == "zzqzz" for row in rows]
    assert [row["unwanted_answer"] for row in rows] == [given[0], given[1], None]
    assert evaluation.notes["unwanted_avoided"] == 1 - (given[0] + given[1]) / 2
    entry = project.report["targets"]["plain"]["strategies"]["full"]
    assert entry["unwanted_avoided"]["mean"] == evaluation.notes["unwanted_avoided"]


@pytest.mark.parametrize("strategy", STRATEGIES_RUN)
def test_labels_judge_each_ranking_and_no_ranking_sees_them(project, strategy):
    kept, removed = parts(project, strategy)
    harm = {row["prompt"] + row["completion"] for row in HARM}
    unlabelled = make_rows(20, 20, "reverse")[-1]["prompt"]
    rows = [*zip(text_of(removed), removed["rank"].to_pylist(), [True] * removed.num_rows, strict=True),
            *zip(text_of(kept), kept["rank"].to_pylist(), [False] * kept.num_rows, strict=True)]  # fmt: skip
    rows = [row for row in rows if not row[0].startswith(unlabelled)]
    assert len(rows) == 25
    entry = project.report["targets"]["plain"]["strategies"][strategy]
    bad, good = ([-np.inf if rank is None else -rank for text, rank, _ in rows if (text in harm) is one]
                 for one in (True, False))  # fmt: skip
    pairs = [(left > right) + (left == right) / 2 for left in bad for right in good]
    assert entry["auroc"]["mean"] == pytest.approx(np.mean(pairs))
    taken = sum(text in harm for text, _, gone in rows if gone)
    assert entry["labels"] == {"labelled": 25, "harmful": 6, "removed_harmful": taken}
    if strategy == "oracle":
        assert set(text_of(removed)) == harm and entry["auroc"]["mean"] == 1 == entry["average_precision"]["mean"]
        assert set(removed["reason"].to_pylist()) == {"its label calls it harmful"}
        assert set(kept["reason"].to_pylist()) == {"its label does not call it harmful"}


def test_the_report_says_how_well_rankings_find_the_labelled_rows(project):
    page = (project.settings.storage.report / "report.html").read_text()
    assert "Of 25 labelled rows 6 are harmful" in page and "AUROC of the label" in page


def test_labels_that_tell_nothing_are_refused(project):
    stage = project.stage
    for label, values, words in (
        ("nothing", (), "no row of the mixture has it"),
        ("source", (), r"'source' is 'mix' \(mixed.*line 1\), neither true nor false"),
        ("source", ("mix",), "all 26 rows that have it say the same"),
    ):
        target = stage.settings.targets["plain"].model_copy(update={"label": label, "label_values": values})
        asked = stage.with_settings(targets={"plain": target})
        pool = Pool(asked, asked.shown("live_pool"), source="mix")
        with pytest.raises(SettingsError, match=words):
            harmful_rows(asked, pool, "plain")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use": "keep"}, "label has a meaning with use: remove only"),
        ({"label": None, "label_values": ["a"]}, "label_values needs label"),
        ({"label": None}, "oracle removes the rows that a label names, and targets.a has no label"),
    ],
)
def test_labels_and_the_oracle_need_each_other_and_removal(tmp_path, change, words):
    target = {"examples": "a.jsonl", "eval": "b.jsonl", "use": "remove", "label": "bad", **change}
    with pytest.raises(SettingsError, match=words):
        from_mapping({"targets": {"a": target}, "strategies": ["oracle"]}, tmp_path / "prism.yaml")


def test_rows_without_a_rank_are_kept_and_say_why(project):
    stage = project.stage
    strategy = STRATEGIES["prism"]
    found = divide(
        stage, strategy, selection_inputs(stage, "plain", strategy), Budget(kind="share", amount=0.5),
        rerank=0, representations=Representations(stage), source="mix",
    )  # fmt: skip
    assert found.removed.table.num_rows == 13 and found.kept.table.num_rows == 13  # a share of the mixture
    cover, _ = parts(project, "prism-cover")
    assert cover["rank"].null_count == 20
    assert set(cover["reason"].to_pylist()) == {"not among the first 6 of 26 rows by prism-cover"}


def test_nothing_is_computed_again_and_a_target_that_keeps_has_no_removed_rows(project, tmp_path):
    one = project.copy(tmp_path / "copy")
    assert set(one.run().values()) == {0}
    plain = {"examples": "plain/target.jsonl", "eval": "plain/eval.jsonl"}
    one.configure(targets={"plain": plain}, strategies=["prism"]).run()
    assert one.lake.head("removed", join_key("plain", "prism")) is None
    assert one.selected("prism")[0]["completion"] != "zzqzz"
    # The opposite of a direction finds what harms, also where nothing is removed.
    worst = query_index(one.stage, target="plain", k=4, harmful=True)
    assert {row["completion"] for row in worst} == {"zzqzz"}
    assert [row["score"] for row in worst] == sorted(row["score"] for row in worst) and worst[0]["score"] < 0


def test_removal_without_pairs_and_of_an_unknown_source_is_refused(project, tmp_path):
    one = project.copy(tmp_path / "copy")
    plain = {**one.content["targets"]["plain"], "mixture": "nowhere"}
    one.configure(targets={"plain": plain})
    with pytest.raises(RunRefused, match="no candidate that counts has the source 'nowhere'.*there are .*mix"):
        one.run()
    write_lines(one.folder / "plain" / "target.jsonl", make_rows(4, 700, "reverse"))
    with pytest.raises(RunRefused, match="use: remove needs pairs of a wanted and an unwanted answer"):
        one.run()


@pytest.mark.parametrize(
    ("target", "says"),
    [({"mixture": "mix"}, "mixture has a meaning with use: remove only"),
     ({"use": "remove", "anchors": "none"}, "leave anchors: none out"), ({"use": "delete"}, "keep")],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(project, target, says):
    files = {"examples": "plain/target.jsonl", "eval": "plain/eval.jsonl"}
    with pytest.raises(SettingsError, match=says):
        from_mapping({**project.content, "targets": {"plain": {**files, **target}}}, project.config)
