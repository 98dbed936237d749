"""Each preconditioner against the optimiser that it stands for."""

import pytest
import torch

from prism_assets.gradients.preconditioner import Moments, Preconditioner

LEARNING_RATE, BETAS, EPS, STEPS = 1e-3, (0.8, 0.95), 1e-6, 4
SHAPES = {"m.lora_A.weight": (3, 5), "m.lora_B.weight": (4, 3), "n.lora_A.weight": (3, 5)}


def trained_optimizer(steps=STEPS, seed=0):
    """AdamW after a few steps on random loss gradients: (parameters by name, optimiser)."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {n: torch.nn.Parameter(torch.randn(*s, generator=generator).double()) for n, s in SHAPES.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=0.0)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).double() * 1e-2
        optimizer.step()
    return parameters, optimizer


def moments_of(parameters, optimizer):
    """The optimiser's two accumulators by parameter name."""
    states = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    return {name: Moments(state["exp_avg"], state["exp_avg_sq"]) for name, state in states.items()}


def ascent_gradients(seed=7):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(*s, generator=generator).double() * 1e-2 for n, s in SHAPES.items()}


def test_adam_step_is_the_next_step_of_a_real_adamw():
    parameters, optimizer = trained_optimizer()
    preconditioner = Preconditioner.build(
        "adam_step", moments_of(parameters, optimizer), step=STEPS, betas=BETAS, eps=EPS
    )
    gradients = ascent_gradients()
    rows = {name: preconditioner.apply(name, g.unsqueeze(0))[0] for name, g in gradients.items()}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.grad = -gradients[name]  # the loss is minus the log-probability
    optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(LEARNING_RATE * rows[name], parameter.detach() - before[name], rtol=1e-9, atol=1e-15)


def test_adam_scales_by_the_bias_corrected_root_of_the_second_moment():
    moments = moments_of(*trained_optimizer(steps=2))
    preconditioner = Preconditioner.build("adam", moments, step=2, betas=BETAS, eps=EPS)
    gradients = ascent_gradients()
    for name, gradient in gradients.items():
        second = moments[name].exp_avg_sq / (1 - BETAS[1] ** 2)
        expected = gradient / (second**0.5 + EPS)
        torch.testing.assert_close(preconditioner.apply(name, gradient[None])[0], expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(preconditioner.diagonal(name) * gradient, expected, rtol=1e-12, atol=0)


def test_adam_less_is_the_published_form_with_the_sign_of_ascent():
    moments = moments_of(*trained_optimizer())
    preconditioner = Preconditioner.build("adam_less", moments, step=STEPS, betas=BETAS, eps=EPS)
    for name, gradient in ascent_gradients().items():
        loss_gradient = -gradient
        average = BETAS[0] * moments[name].exp_avg + (1 - BETAS[0]) * loss_gradient
        average_square = BETAS[1] * moments[name].exp_avg_sq + (1 - BETAS[1]) * loss_gradient**2
        expected = -average / torch.sqrt(average_square + 1e-8)
        torch.testing.assert_close(preconditioner.apply(name, gradient[None])[0], expected, rtol=1e-12, atol=1e-15)


def test_sgd_leaves_the_gradient_alone():
    gradient = torch.randn(2, 3, 5)
    assert torch.equal(Preconditioner.build("sgd").apply("m.lora_A.weight", gradient), gradient)


def test_rows_of_a_batch_are_preconditioned_each_on_its_own():
    moments = moments_of(*trained_optimizer())
    for kind in ("adam", "adam_step", "adam_less"):
        preconditioner = Preconditioner.build(kind, moments, step=STEPS, betas=BETAS, eps=EPS)
        batch = torch.randn(4, 3, 5, dtype=torch.float64)
        together = preconditioner.apply("m.lora_A.weight", batch)
        alone = torch.cat([preconditioner.apply("m.lora_A.weight", row[None]) for row in batch])
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=0)


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
