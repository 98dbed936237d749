"""What a report says of rows, against the artefacts that it was made from."""

import json

import numpy as np
import pytest

from prism_assets.report import rows
from prism_assets.report.content import rows_content, target_content
from prism_assets.report.gradient_map import gradient_map, principal_plane
from prism_assets.report.page import build_report
from prism_assets.report.rows import MOST_ROWS, around_the_cut, listed_rows, overlaps, taken_by_all
from prism_assets.selection.pool import indexed_pool
from prism_assets.selection.query import query_index


@pytest.fixture(scope="module")
def stage(two_versions):
    return two_versions.stage


@pytest.fixture(scope="module")
def taken(stage):
    return taken_by_all(stage, "plain")


def selected(two_versions, strategy):
    return {row["id"]: row for row in two_versions.selected(strategy)}


def test_every_selected_row_is_listed_once_with_what_each_strategy_makes_of_it(two_versions, stage, taken):
    found = listed_rows(stage, taken)
    listed = {row["id"]: row for row in found["rows"]}
    assert len(listed) == len(found["rows"]) <= MOST_ROWS
    for strategy in stage.settings.strategies:
        wanted = selected(two_versions, strategy)
        assert found["totals"][strategy] == len(wanted)
        ours = {name: row for name, row in listed.items() if strategy in row["taken"]}
        assert ours.keys() == wanted.keys()
        for name, row in ours.items():
            assert row["taken"][strategy] == [wanted[name]["rank"], wanted[name]["score"]]
            assert (row["prompt"], row["source"]) == (wanted[name]["prompt"], wanted[name]["source"])
            assert row["tokens"] == wanted[name]["completion_tokens"]


def test_a_list_that_is_cut_off_keeps_the_first_rows_and_what_others_make_of_them(
    two_versions, stage, taken, monkeypatch
):
    monkeypatch.setattr(rows, "MOST_ROWS", 2 * len(taken))
    monkeypatch.setattr(rows, "LONGEST_TEXT", 4)
    found = listed_rows(stage, taken)
    assert len(found["rows"]) <= 2 * len(taken) and found["totals"]["prism"] == 8
    assert all("…" in row["prompt"] for row in found["rows"])
    for strategy in stage.settings.strategies:
        wanted = selected(two_versions, strategy)
        ranks = {row["id"]: row["taken"][strategy][0] for row in found["rows"] if strategy in row["taken"]}
        assert ranks == {name: wanted[name]["rank"] for name in ranks} and {1, 2} <= set(ranks.values())
        assert all((row["id"] in wanted) == (strategy in row["taken"]) for row in found["rows"])


def test_overlaps_are_those_of_the_selections(two_versions, stage, taken):
    found = overlaps(stage, taken)
    assert len(found) == 6
    for one in found:
        first, second = (set(selected(two_versions, one[side])) for side in ("first", "second"))
        assert (one["both"], one["only_first"], one["only_second"]) == (
            len(first & second),
            len(first - second),
            len(second - first),
        )


def test_the_rows_around_a_cut_are_those_of_the_longer_ranking(stage, taken):
    for one in taken:
        cut = around_the_cut(stage, one)
        assert [row["rank"] for row in cut["last"]] == [4, 5, 6, 7, 8]
        if one.strategy == "random":
            assert cut["left"] == [] and cut["why_not"]
            continue
        longer = query_index(stage, target="plain", strategy=one.strategy, k=13)
        shown = [*cut["last"], *cut["left"]]
        assert [row["id"] for row in shown] == [row["id"] for row in longer[3:]]
        assert [row["rank"] for row in shown] == [row["rank"] for row in longer[3:]]
        assert [row["score"] for row in shown] == pytest.approx([row["score"] for row in longer[3:]], abs=1e-7)


def test_the_map_is_the_same_again_and_marks_what_was_taken(two_versions, stage, taken):
    found = gradient_map(stage, taken)
    assert found == gradient_map(stage, taken_by_all(stage, "plain"))
    pool = indexed_pool(stage)
    assert len(found["points"]) == pool.size == found["pool"]  # all of this small pool
    for strategy in stage.settings.strategies:
        marked = sum(strategy in point["taken"] for point in found["points"])
        assert marked == len(set(selected(two_versions, strategy)) & set(pool.ids))


def test_a_report_made_again_is_the_same_byte_for_byte(stage):
    def page() -> str:
        target = {**target_content(stage, "plain").data, **rows_content(stage, "plain")}
        return build_report({"format": 1, "targets": {"plain": json.loads(json.dumps(target))}})

    first = page()
    assert first == page() and "data-target-1" in first


def test_the_plane_is_that_of_the_largest_singular_values():
    vectors = np.random.default_rng(1).normal(size=(40, 300)).astype(np.float32) * np.linspace(
        3, 0.1, 300, dtype=np.float32
    )
    plane = principal_plane(vectors)
    left, values, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    expected = left[:, :2] * values[:2]
    assert np.abs(plane.points) == pytest.approx(np.abs(expected), abs=1e-3)
    assert plane.shares == pytest.approx(list(values[:2] ** 2 / (values**2).sum()), rel=1e-4)
    flipped = principal_plane(np.concatenate([vectors, -vectors]))
    assert np.isfinite(flipped.points).all() and principal_plane(np.ones((3, 4), np.float32)).shares == [0.0, 0.0]


def test_positions_of_rows_are_their_places_again(stage):
    pool = indexed_pool(stage)
    shards, numbers = zip(*pool.places(np.arange(pool.size)), strict=True)
    order = np.random.default_rng(0).permutation(pool.size)
    found = pool.positions([shards[at] for at in order], [numbers[at] for at in order])
    assert found.tolist() == order.tolist()
    assert pool.positions(["nowhere", shards[0]], [0, 10_000]).tolist() == [-1, -1]
    assert pool.position(shards[0], numbers[0]) == 0 and pool.position("nowhere", 0) is None
