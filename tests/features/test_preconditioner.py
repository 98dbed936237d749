"""Each preconditioner against the optimiser that it stands for, and moments from wherever they are kept."""

import pytest
import torch

from prism_assets.features.preconditioner import (
    Moments,
    Preconditioner,
    canonical_name,
    moments_from_optimizer_state,
    moments_from_tensors,
    moments_from_trainer_checkpoint,
    moments_to_tensors,
)

LEARNING_RATE, BETAS, EPS = 1e-3, (0.8, 0.95), 1e-6
SHAPES = {"m.lora_A.weight": (3, 5), "m.lora_B.weight": (4, 3), "n.lora_A.weight": (3, 5)}


def trained_optimizer(steps=4, seed=0):
    """AdamW after a few steps on random loss gradients: (parameters by name, optimiser)."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        n: torch.nn.Parameter(torch.randn(*s, generator=generator).double()) for n, s in SHAPES.items()
    }
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0
    )
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).double() * 1e-2
        optimizer.step()
    return parameters, optimizer


def ascent_gradients(seed=7):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*s, generator=generator).double() * 1e-2 for n, s in SHAPES.items()}


def test_adam_step_is_the_next_step_of_a_real_adamw():
    parameters, optimizer = trained_optimizer()
    loaded = moments_from_optimizer_state(optimizer.state_dict(), SHAPES)
    preconditioner = Preconditioner.build(
        "adam_step", loaded.moments, step=loaded.step, betas=loaded.betas, eps=loaded.eps
    )
    gradients = ascent_gradients()
    rows = {name: preconditioner.apply(name, g.unsqueeze(0))[0] for name, g in gradients.items()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.grad = -gradients[name]  # the loss is minus the log-probability
    optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            LEARNING_RATE * rows[name], parameter.detach() - before[name], rtol=1e-9, atol=1e-15
        )


def test_adam_scales_by_the_bias_corrected_root_of_the_second_moment():
    _, optimizer = trained_optimizer(steps=2)
    loaded = moments_from_optimizer_state(optimizer.state_dict(), SHAPES)
    preconditioner = Preconditioner.build("adam", loaded.moments, step=2, betas=BETAS, eps=EPS)
    gradients = ascent_gradients()
    for name, gradient in gradients.items():
        second = loaded.moments[name].exp_avg_sq / (1 - BETAS[1] ** 2)
        expected = gradient / (second**0.5 + EPS)
        torch.testing.assert_close(
            preconditioner.apply(name, gradient[None])[0], expected, rtol=1e-12, atol=0
        )
        torch.testing.assert_close(preconditioner.diagonal(name) * gradient, expected, rtol=1e-12, atol=0)


def test_adam_less_is_the_published_form_with_the_sign_of_ascent():
    _, optimizer = trained_optimizer()
    loaded = moments_from_optimizer_state(optimizer.state_dict(), SHAPES)
    preconditioner = Preconditioner.build("adam_less", loaded.moments, step=loaded.step, betas=BETAS, eps=EPS)
    for name, gradient in ascent_gradients().items():
        loss_gradient = -gradient
        average = BETAS[0] * loaded.moments[name].exp_avg + (1 - BETAS[0]) * loss_gradient
        average_square = BETAS[1] * loaded.moments[name].exp_avg_sq + (1 - BETAS[1]) * loss_gradient**2
        expected = -average / torch.sqrt(average_square + 1e-8)
        torch.testing.assert_close(
            preconditioner.apply(name, gradient[None])[0], expected, rtol=1e-12, atol=1e-15
        )


def test_sgd_leaves_the_gradient_alone():
    gradient = torch.randn(2, 3, 5)
    assert torch.equal(Preconditioner.build("sgd").apply("m.lora_A.weight", gradient), gradient)


def test_rows_of_a_batch_are_preconditioned_each_on_its_own():
    _, optimizer = trained_optimizer()
    loaded = moments_from_optimizer_state(optimizer.state_dict(), SHAPES)
    for kind in ("adam", "adam_step", "adam_less"):
        preconditioner = Preconditioner.build(kind, loaded.moments, step=loaded.step, betas=BETAS, eps=EPS)
        batch = torch.randn(4, 3, 5, dtype=torch.float64)
        together = preconditioner.apply("m.lora_A.weight", batch)
        alone = torch.cat([preconditioner.apply("m.lora_A.weight", row[None]) for row in batch])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


def test_moments_survive_their_flat_form():
    _, optimizer = trained_optimizer()
    moments = moments_from_optimizer_state(optimizer.state_dict(), SHAPES).moments
    again = moments_from_tensors(moments_to_tensors(moments))
    assert again.keys() == moments.keys()
    for name in moments:
        assert torch.equal(again[name].exp_avg, moments[name].exp_avg)
        assert torch.equal(again[name].exp_avg_sq, moments[name].exp_avg_sq)
    tensors = moments_to_tensors(moments)
    del tensors["exp_avg_sq.m.lora_B.weight"]
    with pytest.raises(ValueError, match="m.lora_B.weight are incomplete"):
        moments_from_tensors(tensors)


def test_optimizer_state_is_mapped_by_the_names_it_carries_not_by_position():
    parameters, _ = trained_optimizer()
    swapped = dict(
        reversed(parameters.items())
    )  # m.lora_A and n.lora_A have one shape: position alone would confuse
    names = [(name.replace(".weight", ".default.weight"), parameter) for name, parameter in swapped.items()]
    optimizer = torch.optim.AdamW(names, lr=LEARNING_RATE)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, float(parameter.shape[0]))
    parameters["n.lora_A.weight"].grad.fill_(9.0)
    optimizer.step()
    loaded = moments_from_optimizer_state(optimizer.state_dict(), SHAPES)
    assert torch.allclose(loaded.moments["n.lora_A.weight"].exp_avg, torch.tensor(0.9, dtype=torch.float64))
    assert torch.allclose(loaded.moments["m.lora_A.weight"].exp_avg, torch.tensor(0.3, dtype=torch.float64))
    assert loaded.step == 1


def test_a_trainer_checkpoint_is_read_without_unpickling_objects(tmp_path):
    _, optimizer = trained_optimizer(steps=3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = moments_from_trainer_checkpoint(tmp_path, SHAPES)
    assert (loaded.step, loaded.betas, loaded.eps) == (3, BETAS, EPS)
    state = optimizer.state_dict()["state"]
    for index, name in enumerate(SHAPES):
        assert torch.equal(loaded.moments[name].exp_avg, state[index]["exp_avg"])
    with pytest.raises(FileNotFoundError, match="optimizer.pt"):
        moments_from_trainer_checkpoint(tmp_path / "nowhere", SHAPES)


def test_an_optimizer_of_another_adapter_is_refused():
    _, optimizer = trained_optimizer()
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="holds 3 parameters, the adapter has 2"):
        moments_from_optimizer_state(state, dict(list(SHAPES.items())[:2]))
    with pytest.raises(ValueError, match=r"exp_avg of m.lora_B.weight has shape \(3, 5\)"):
        moments_from_optimizer_state(state, SHAPES, ["m.lora_B.weight", "m.lora_A.weight", "n.lora_A.weight"])
    with pytest.raises(ValueError, match="no Adam moments for m.lora_A.weight"):
        moments_from_optimizer_state(
            torch.optim.AdamW(list(trained_optimizer()[0].values())).state_dict(), SHAPES
        )


def test_unusable_settings_are_refused_with_advice():
    good = {"m.lora_A.weight": Moments(torch.zeros(3, 5), torch.ones(3, 5))}
    with pytest.raises(ValueError, match="choose one of sgd, adam, adam_step, adam_less"):
        Preconditioner.build("adamw", good, step=1)
    with pytest.raises(ValueError, match="needs the optimiser's moments"):
        Preconditioner.build("adam", None, step=1)
    with pytest.raises(ValueError, match="at least one optimiser step"):
        Preconditioner.build("adam", good, step=0)
    bad = {"m.lora_A.weight": Moments(torch.zeros(3, 5), torch.full((3, 5), float("nan")))}
    with pytest.raises(ValueError, match="m.lora_A.weight are not finite"):
        Preconditioner.build("adam", bad, step=1)
    with pytest.raises(ValueError, match="no frozen diagonal"):
        Preconditioner.build("adam_step", good, step=1).diagonal("m.lora_A.weight")
    preconditioner = Preconditioner.build("adam", good, step=1)
    with pytest.raises(ValueError, match="no optimiser moments for m.lora_B.weight"):
        preconditioner.check({"m.lora_A.weight": (3, 5), "m.lora_B.weight": (4, 3)})
    with pytest.raises(ValueError, match=r"shape \(3, 5\), the parameter has \(2, 5\)"):
        preconditioner.check({"m.lora_A.weight": (2, 5)})


def test_canonical_names_drop_the_adapter():
    assert canonical_name("base.q_proj.lora_A.default.weight") == "base.q_proj.lora_A.weight"
    assert canonical_name("base.q_proj.lora_B.weight") == "base.q_proj.lora_B.weight"
