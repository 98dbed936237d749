"""A training's steps are those of TRL's SFTTrainer on the same rows, up to rounding."""

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from test_sft import fine_tune, make_examples, make_model, number_tokenizer, with_random_b

from prism_assets.gradients.engine import GradientEngine


def test_three_steps_leave_the_parameters_that_trl_s_trainer_leaves(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    examples = make_examples()
    ours, theirs, untouched = (with_random_b(make_model()) for _ in range(3))
    # All rows are in every step, so the order in which a trainer draws them does not matter.
    settings = dict(learning_rate=5e-3, weight_decay=0.0)
    fine_tune(
        ours,
        examples,
        engine=GradientEngine(ours, token_budget=40),
        steps=3,
        batch_size=len(examples),
        warmup_ratio=0,
        scheduler="constant",
        **settings,
    )
    data = datasets.Dataset.from_dict(
        {
            "input_ids": [example.input_ids.tolist() for example in examples],
            "labels": [np.where(example.loss_mask, example.input_ids, -100).tolist() for example in examples],
        }
    )
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=len(examples),
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )
    trl.SFTTrainer(theirs, arguments, train_dataset=data, processing_class=number_tokenizer()).train()

    def flat(model) -> torch.Tensor:
        state = get_peft_model_state_dict(model)
        return torch.cat([state[name].flatten() for name in sorted(state)]).double()

    moved = flat(theirs) - flat(untouched)
    assert float((flat(ours) - flat(theirs)).norm() / moved.norm()) < 1e-3
    assert float(moved.abs().max()) > 1e-2
