"""Checkpoints of a training in which some adapted layers do not run."""

import torch
from test_sft import fine_tune, make_examples, make_model


def without(model, *, layers):
    """The model, whose MLPs in these layers no longer run: their down_proj is adapted and has no gradient."""
    for layer in layers:
        model.get_base_model().model.layers[layer].mlp.forward = lambda hidden: hidden
    return model


def test_moments_of_layers_that_do_not_run_are_zero():
    model = without(make_model(), layers=[1])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    (checkpoint,) = fine_tune(model, make_examples(4), seed=0, steps=3, batch_size=2).checkpoints
    idle = {name for name in checkpoint.lora_state if "layers.1.mlp" in name}
    assert len(idle) == 2 and set(checkpoint.exp_avg) == set(checkpoint.lora_state) == set(checkpoint.exp_avg_sq)
    for name, moment in checkpoint.exp_avg_sq.items():
        assert moment.shape == checkpoint.lora_state[name].shape
        assert bool(moment.any()) == bool(checkpoint.exp_avg[name].any()) == (name not in idle)
    for name in idle:
        assert torch.equal(checkpoint.lora_state[name], before[name.replace(".weight", ".default.weight")])
    assert checkpoint.optimizer_step == 3
