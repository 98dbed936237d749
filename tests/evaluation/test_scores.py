"""Scores of held-out records with choices, against transformers' own forward pass on one sequence at a time."""

import numpy as np
import pytest
import torch

from conftest import make_rows, write_lines
from prism_assets.corpus.encoding import encoder_of
from prism_assets.corpus.records import Message
from prism_assets.evaluation import scores
from prism_assets.ops.pipeline import steps_of

CHOICES = ["abc", "ihgfedcba"]


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("scores") / "project", strategies=["prism"], seeds=[0])
    rows = make_rows(4, 900, "reverse")
    # The right one first, last, and not at all; the third record is plain.
    records = [
        {**rows[0], "choices": [rows[0]["completion"], *CHOICES]},
        {**rows[1], "choices": [*CHOICES, rows[1]["completion"]]},
        rows[2],
    ]
    write_lines(project.folder / "plain" / "eval.jsonl", records)
    steps = steps_of("run")
    project.run_steps(steps[: [step.title for step in steps].index("Targets") + 1])
    return project, records


def likelihood(model, encoder, record, completion):
    """Σ log p of the completion's tokens, its end token too."""
    turns = (Message("user", record["prompt"]), Message("assistant", completion))
    example = encoder.encode(turns)
    ids = torch.from_numpy(np.asarray(example.input_ids)).long()[None]
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(float(log_probs[where - 1, ids[0, where]]) for where in np.flatnonzero(example.loss_mask))


@pytest.mark.parametrize("reused", [True, False])
def test_a_choice_is_right_where_it_is_the_likeliest_and_the_own_completion_is_run_once(project, monkeypatch, reused):
    project, records = project
    stage = project.stage
    table = stage.lake.read_table(stage.shown("eval_examples", "plain"))
    if not reused:
        monkeypatch.setattr(scores, "_equal", lambda one, other: False)
    counted = []
    with stage.adapted() as model:
        from prism_assets.gradients.engine import GradientEngine

        plain = GradientEngine.mean_log_probs

        def counting(self, examples):
            counted.append(len(examples))
            return plain(self, examples)

        monkeypatch.setattr(GradientEngine, "mean_log_probs", counting)
        columns, means = scores.score_records(stage, model, table)
        encoder = encoder_of(stage)
        expected = []
        for record in records:
            options = record.get("choices", [])
            values = [likelihood(model, encoder, record, option) for option in options]
            right = options.index(record["completion"]) if options else None
            expected.append(None if right is None else int(np.argmax(values)) == right)
    assert columns["choice_correct"].to_pylist() == expected
    assert means["choice_accuracy"] == np.mean([one for one in expected if one is not None])
    assert counted == [3, 4 if reused else 6]
