"""Redrawn records: how many of what stand where, and what a split is a function of."""

import random

import pyarrow as pa
import pytest

from prism_assets.experiment.splits import redraw


def records(names, rejected=None, answers=None):
    return pa.table(
        {
            "id": [f"id-{one}" for one in names],
            "conversation_id": [f"talk-{one}" for one in names],
            "rejected": pa.array([rejected] * len(names), pa.string()),
            "answers": pa.array([[answers(one)] if answers else [] for one in names], pa.list_(pa.string())),
        }
    )


TARGETS = records([f"t{number}" for number in range(20)])
HELD_OUT = records([f"h{number}" for number in range(50)], answers=lambda one: f"answer of {one}")


def ids(table):
    return table["id"].to_pylist()


@pytest.mark.parametrize("how", ["apart", "together"])
def test_split_zero_is_the_files_as_they_are(how):
    split = redraw(TARGETS, HELD_OUT, 0, how)
    assert split.targets.equals(TARGETS) and split.held_out.equals(HELD_OUT)


@pytest.mark.parametrize("how", ["apart", "together"])
def test_a_split_has_as_many_records_of_each_role_and_the_splits_differ(how):
    splits = [redraw(TARGETS, HELD_OUT, number, how) for number in range(1, 6)]
    for one in splits:
        assert (one.targets.num_rows, one.held_out.num_rows) == (20, 50)
    assert len({tuple(ids(one.targets)) for one in splits}) == len({tuple(ids(one.held_out)) for one in splits}) == 5
    assert redraw(TARGETS, HELD_OUT, 3, how).targets.equals(splits[2].targets)


def test_apart_each_file_is_drawn_from_itself_with_replacement():
    shares = []
    for number in range(1, 40):
        split = redraw(TARGETS, HELD_OUT, number, "apart")
        assert set(ids(split.targets)) <= set(ids(TARGETS)) and set(ids(split.held_out)) <= set(ids(HELD_OUT))
        shares.append(len(set(ids(split.held_out))) / 50)
    # A bootstrap of n records holds 1 − (1 − 1/n)ⁿ of them.
    assert sum(shares) / len(shares) == pytest.approx(1 - (1 - 1 / 50) ** 50, abs=0.03)


def test_apart_the_targets_know_nothing_of_the_held_out_records():
    other = records([f"x{number}" for number in range(9)])
    for number in range(4):
        assert redraw(TARGETS, other, number, "apart").targets.equals(
            redraw(TARGETS, HELD_OUT, number, "apart").targets
        )


def test_together_every_record_is_taken_once_and_keeps_its_answers():
    from_held_out = []
    for number in range(1, 30):
        split = redraw(TARGETS, HELD_OUT, number, "together")
        assert sorted(ids(split.targets) + ids(split.held_out)) == sorted(ids(TARGETS) + ids(HELD_OUT))
        for row in [*split.targets.to_pylist(), *split.held_out.to_pylist()]:
            name = row["id"].removeprefix("id-")
            assert row["answers"] == ([f"answer of {name}"] if name[0] == "h" else [])
        from_held_out.append(sum(one.startswith("id-h") for one in ids(split.targets)))
    assert sum(from_held_out) / len(from_held_out) == pytest.approx(20 * 50 / 70, abs=1.5)


def test_together_a_record_of_both_files_is_taken_once_with_its_answers():
    both = records(["t0", *(f"h{number}" for number in range(49))], answers=lambda one: f"answer of {one}")
    for number in range(1, 10):
        split = redraw(TARGETS, both, number, "together")
        rows = [*split.targets.to_pylist(), *split.held_out.to_pylist()]
        assert [row["answers"] for row in rows if row["id"] == "id-t0"] == [["answer of t0"]]
        assert split.targets.num_rows == 20 and split.held_out.num_rows == 49


def test_together_a_split_does_not_depend_on_the_order_of_the_files():
    shuffled = list(range(50))
    random.Random(0).shuffle(shuffled)
    given, mixed = (redraw(TARGETS, table, 2, "together") for table in (HELD_OUT, HELD_OUT.take(shuffled)))
    assert set(ids(given.targets)) == set(ids(mixed.targets))


@pytest.mark.parametrize("how", ["apart", "together"])
def test_pairs_stay_whole(how):
    pairs = [records([f"{role}{n}" for n in range(9)], rejected="no") for role in "th"]
    for number in range(1, 4):
        split = redraw(*pairs, number, how)
        assert all(table["rejected"].null_count == 0 for table in split)


def test_together_refuses_what_cannot_be_split():
    with pytest.raises(ValueError, match="too few for 20 targets"):
        redraw(TARGETS, TARGETS, 1, "together")
    with pytest.raises(ValueError, match="plain records and the other pairs"):
        redraw(TARGETS, records(["a"] * 30, rejected="no"), 1, "together")
