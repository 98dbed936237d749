"""`selection.rerank: all`: exact scores of all rows, where it can be out of the pass that makes their features."""

import subprocess
import sys

import numpy as np
import pytest

from conftest import make_rows, write_lines
from prism_assets.features import exact_products
from prism_assets.identity import join_key
from prism_assets.selection import exact_scores


@pytest.fixture(autouse=True)
def blank_plots(monkeypatch):
    from prism_assets.plots import canvas

    monkeypatch.setattr(canvas, "png", lambda figure: b"no picture")


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    """Selections by exact scores beside a poor sketch, two checkpoints. Copy it before changing it."""
    from prism_assets.plots import canvas

    made = make_project(
        tmp_path_factory.mktemp("everywhere") / "project",
        warmup={"checkpoints": 2},
        features={"sketch_dim": 16},
        selection={"budget": 8, "rerank": "all"},
        seeds=[0],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "png", lambda figure: b"no picture")
        patch.setattr(exact_scores, "gradient_pass", _no_pass)  # the directions came first: no other pass is needed
        made.run()
    return made


def _no_pass(*_: object) -> None:
    raise AssertionError("a gradient pass was made for what the features' own pass should have given")


def products(project) -> dict[str, bytes]:
    folder = project.settings.storage.root / "cache" / "products"
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def forget_products(project) -> None:
    for one in (project.settings.storage.root / "cache" / "products").rglob("*"):
        if one.is_file():
            one.unlink()


def ranking(project, strategy):
    """Ids by descending score, and the scores."""
    rows = project.selected(strategy)
    return [row["id"] for row in rows], [row["score"] for row in rows]


@pytest.mark.parametrize("scale", ["unit", "sum"])
def test_the_ranking_is_that_of_features_without_a_sketch(project, tmp_path, scale):
    found = project.copy(tmp_path / "found").configure(selection={"row_scale": scale})
    dense = project.copy(tmp_path / "dense").configure(
        features={"sketch_dim": "exact"}, selection={"rerank": 0, "row_scale": scale}
    )
    for one in (found, dense):
        one.run(["plain"])
    for strategy in ("prism", "uniform", "less"):
        ids, scores = ranking(found, strategy)
        expected, values = ranking(dense, strategy)
        assert ids == expected
        np.testing.assert_allclose(scores, values, rtol=5e-3, atol=1e-3)  # the dense rows are stored as float16


def test_all_rows_are_ranked_by_them_and_nothing_is_said_of_the_sketch(project):
    notes = project.selection("prism").notes
    assert notes["shortlist"] == notes["pool_rows"] - notes["refused_rows"]
    assert notes.get("sketch_noise") is None


def test_an_arrival_costs_no_pass_but_its_own(project, tmp_path, monkeypatch):
    late = project.copy(tmp_path / "late")
    late.add("shard2", make_rows(20, 12))
    before = products(late)
    monkeypatch.setattr(exact_scores, "gradient_pass", _no_pass)
    late.run()
    after = products(late)
    assert {name: after[name] for name in before} == before and len(after) > len(before)


def test_a_pass_of_its_own_gives_the_same_bits_whatever_the_other_directions(project, tmp_path):
    expected = products(project)
    again = project.copy(tmp_path / "again").configure(strategies=["uniform", "prism"], selection={"budget": 9})
    forget_products(again)
    again.run()
    found = products(again)
    # Of the two strategies that are left, and of no other.
    assert found and len(found) < len(expected)
    assert {name: expected[name] for name in found} == found


def test_features_are_the_same_bits_with_products_and_without(project, tmp_path, make_project):
    plain = make_project(
        tmp_path / "plain", warmup={"checkpoints": 2}, features={"sketch_dim": 16}, selection={"budget": 8}, seeds=[0]
    )
    plain.run()
    blocks = [
        sorted(one.content_hash for one in each.lake.artifacts() if one.table == "feature_blocks")
        for each in (project, plain)
    ]
    assert blocks[0] == blocks[1] and blocks[0]


def test_a_query_gives_the_order_of_the_selection_and_loads_no_model(project, monkeypatch):
    from prism_assets.selection.query import query_index

    monkeypatch.setattr(exact_scores, "gradient_pass", _no_pass)
    rows = query_index(project.stage, target="plain", strategy="less", k=8)
    selected = project.selected("less")
    assert [(row["id"], row["score"]) for row in rows] == [(row["id"], row["score"]) for row in selected]


def test_where_products_are_lost_a_query_asks_the_sketch_and_exact_ones_are_made_when_wanted(project, tmp_path):
    from typer.testing import CliRunner

    from prism_assets.cli import app
    from prism_assets.selection.query import ask

    copy = project.copy(tmp_path / "copy")
    forget_products(copy)
    sketched, by = ask(copy.stage, target="plain", k=8)
    assert by == "sketch" and not products(copy)
    said = CliRunner().invoke(app, ["query", "plain", "--config", str(copy.config)])
    assert "exact ones are not known yet; --exact computes them" in said.stderr and "(scores: sketch)" in said.stdout
    exact, by = ask(copy.stage, target="plain", k=8, rerank=4.0)
    assert by == "exact" and ask(copy.stage, target="plain", k=8) == (exact, "exact")
    assert [row["id"] for row in exact] == [row["id"] for row in copy.selected("prism")]
    assert [row["score"] for row in sketched] != [row["score"] for row in exact]


def test_more_directions_than_a_pass_takes_are_made_one_pass_after_the_other(project, tmp_path, monkeypatch):
    monkeypatch.setattr(exact_products, "MOST_AT_ONCE", 1)
    copy = project.copy(tmp_path / "copy")
    forget_products(copy)
    copy.configure(selection={"budget": 9}).run()
    assert products(copy) == products(project)
    for strategy in ("prism", "uniform", "less"):
        ids = [row["id"] for row in project.selected(strategy)]
        assert [row["id"] for row in copy.selected(strategy)][:8] == ids


def test_a_query_loads_neither_torch_nor_dagster(project):
    """They take three seconds to import; what a query reads is a vector and an index."""
    code = (
        "import sys; from prism_assets import load_settings, open_stage\n"
        "from prism_assets.selection.query import query_index\n"
        f"rows = query_index(open_stage(load_settings({str(project.config)!r})), target='plain', k=8)\n"
        "print(len(rows), {'torch', 'dagster', 'transformers'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "8 set()"


def test_a_removal_ranks_all_rows_of_its_mixture_by_exact_scores(make_project, tmp_path):
    pairs = [{"prompt": f"q{i}", "chosen": f"right {i}", "rejected": f"wrong {i}"} for i in range(6)]
    one = make_project(tmp_path / "removal", features={"sketch_dim": 16}, selection={"rerank": "all"}, seeds=[0])
    write_lines(one.folder / "pairs.jsonl", pairs[:4])
    write_lines(one.folder / "pairs_eval.jsonl", pairs[4:])
    harm = {"examples": "pairs.jsonl", "eval": "pairs_eval.jsonl", "use": "remove", "budget": 10}
    found, dense = (
        one.copy(tmp_path / name).configure(targets={"harm": harm}, strategies=["prism"], **sections)
        for name, sections in (
            ("found", {}),
            ("dense", {"features": {"sketch_dim": "exact"}, "selection": {"rerank": 0}}),
        )
    )
    tables = []
    for project in (found, dense):
        project.run(["harm"])
        shown = [project.stage.shown(table, join_key("harm", "prism")) for table in ("removed", "selection")]
        tables.append([project.lake.read_table(each).select(["id", "rank", "score"]).to_pylist() for each in shown])
    for ours, theirs in zip(*tables, strict=True):
        assert [row["id"] for row in ours] == [row["id"] for row in theirs]
        assert [row["rank"] for row in ours] == [row["rank"] for row in theirs]
        np.testing.assert_allclose([row["score"] for row in ours], [row["score"] for row in theirs], atol=1e-3)
