"""Anchors of every kind in a run: what is published, what directions are made of, and what is refused."""

import pytest

from conftest import make_rows, write_lines
from prism_assets.errors import RunRefused
from prism_assets.ops.pipeline import steps_of

FOUR = [{**row, "choices": [row["completion"], "zz", "kk"]} for row in make_rows(4, 300, "reverse")]


def targets_of(project, **anchors):
    """Targets of these names, all with the same records."""
    return {
        name: {"examples": "four.jsonl", "eval": "plain/eval.jsonl", **({"anchors": kind} if kind else {})}
        for name, kind in anchors.items()
    }


def directions(project):
    steps = [step for step in steps_of("run") if step.title != "Report"]
    return project.run_steps(steps[: [step.title for step in steps].index("Target directions") + 1])


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("anchors") / "project", strategies=["prism"], seeds=[0])
    write_lines(project.folder / "four.jsonl", FOUR)
    kinds = {kind: kind for kind in ("choices", "generated", "shuffled", "none")}
    project.configure(targets=targets_of(project, plain=None, **kinds))
    directions(project)
    return project


def anchors_of(project, target):
    stage = project.stage
    artifact = stage.shown("target_anchors", target)
    return artifact, stage.lake.read_table(artifact).to_pylist()


def test_plain_targets_without_anchors_are_the_records_themselves(project):
    stage = project.stage
    for target in ("plain", "none"):
        artifact, rows = anchors_of(project, target)
        assert artifact.content_hash == stage.shown("targets", target).content_hash
        assert [row["rejected"] for row in rows] == [None] * 4
        assert stage.shown("target_weights", target).notes["kind"] == "plain"


def test_each_other_choice_makes_a_pair(project):
    artifact, rows = anchors_of(project, "choices")
    assert [(row["completion"], row["rejected"]) for row in rows] == [
        (record["completion"], other) for record in FOUR for other in ("zz", "kk")
    ]
    assert artifact.notes["anchors"] == {"choices": 8}
    weights = project.stage.shown("target_weights", "choices")
    assert weights.notes["kind"] == "pairs" and weights.notes["number_of_targets"] == 8


def test_shuffled_anchors_are_the_answers_of_the_other_records(project):
    _, rows = anchors_of(project, "shuffled")
    assert sorted(row["rejected"] for row in rows) == sorted(record["completion"] for record in FOUR)
    assert all(row["rejected"] != row["completion"] for row in rows)


def test_generated_anchors_are_what_the_warmed_up_model_answers(project):
    import torch

    from prism_assets.corpus.token_tables import from_table, prompt_tokens
    from prism_assets.features.gradient_pass import gradient_pass

    artifact, rows = anchors_of(project, "generated")
    stage = project.stage
    assert sum(artifact.notes["anchors"].values()) + sum(artifact.notes["left_out"].values()) == 4
    assert rows and all(row["anchor"] == "generated" for row in rows)
    examples = dict(
        zip(
            [record["completion"] for record in FOUR],
            from_table(stage.lake.read_table(stage.shown("targets", "generated"))),
            strict=True,
        )
    )
    tokenizer = stage.model.tokenizer()
    with gradient_pass(stage) as work, torch.no_grad():
        model = work.at(work.checkpoints[-1]).model.eval()
        for row in rows:
            example = examples[row["completion"]]
            ids = prompt_tokens(example).tolist()
            written = []
            for _ in range(int(example.loss_mask.sum())):
                token = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
                if token == tokenizer.eos_token_id:
                    break
                written.append(token)
            assert row["rejected"] == tokenizer.decode(written, skip_special_tokens=True).strip()


def test_directions_differ_by_anchor_and_a_changed_kind_is_noticed(project):
    stage = project.stage
    found = {
        target: stage.shown("target_directions", target, "prism").content_hash
        for target in ("plain", "choices", "generated", "shuffled", "none")
    }
    assert found["plain"] == found["none"] and len(set(found.values())) == 4
    assert all(result.computed == 0 for result in directions(project))


def test_what_no_anchor_can_be_made_for_is_refused_with_its_reasons(project, tmp_path):
    one = project.copy(tmp_path / "copy")
    write_lines(one.folder / "four.jsonl", [{**record, "choices": None} for record in FOUR])
    one.configure(targets=targets_of(one, choices="choices"))
    with pytest.raises(RunRefused, match=r"no example of .*four\.jsonl.*: the record has no choices \(4\)"):
        directions(one)
    one.configure(targets=targets_of(one, choices="given"))
    with pytest.raises(RunRefused, match="anchors: given, and the records of .* have no unwanted answer"):
        directions(one)


def test_a_mixed_file_needs_anchors_for_its_plain_records(project, tmp_path):
    one = project.copy(tmp_path / "copy")
    write_lines(one.folder / "four.jsonl", [{**FOUR[0], "rejected": "no"}, *FOUR[1:]])
    one.configure(targets=targets_of(one, mixed=None))
    with pytest.raises(RunRefused, match=r"line 2 is a plain record and line 1 a pair"):
        directions(one)
    one.configure(targets=targets_of(one, mixed="shuffled"))
    directions(one)
    artifact, rows = anchors_of(one, "mixed")
    assert artifact.notes["anchors"] == {"given": 1, "shuffled": 3} and rows[0]["rejected"] == "no"
    one.configure(targets=targets_of(one, mixed=None))  # the file's table is in the lake now
    with pytest.raises(RunRefused, match=r"line 2 is a plain record and line 1 a pair"):
        directions(one)
