"""Curvature on the target side, against dense linear algebra on explicit gradients."""

import numpy as np
import pytest
import torch

from prism_assets.corpus.token_tables import from_table
from prism_assets.errors import SettingsError, TooLittleMemory
from prism_assets.features.gradient_pass import gradient_pass
from prism_assets.ops.pipeline import steps_of
from prism_assets.selection.curvature import chosen_damping, datainf_inverse
from prism_assets.selection.direction_artifacts import load_direction
from prism_assets.selection.ekfac import DAMPINGS as EKFAC_DAMPINGS
from prism_assets.selection.ekfac import chosen_damping as ekfac_damping
from prism_assets.selection.ekfac import ekfac, inverse, require_memory


def cosine(left, right):
    return left @ right / np.linalg.norm(left) / np.linalg.norm(right)


# -- formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.01, 0.1, 10.0])
def test_datainf_is_the_mean_of_dense_inverses_layer_by_layer(damping):
    rng = np.random.default_rng(0)
    shapes = {"a": (2, 3), "b": (4,)}
    rows = {name: rng.normal(size=(7, *shape)) for name, shape in shapes.items()}
    vector = {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()}

    def batches():
        for start in (0, 3, 6):  # the last batch has one row
            yield {name: torch.from_numpy(value[start : start + 3]) for name, value in rows.items()}

    found, opposite = datainf_inverse([vector, {name: -one for name, one in vector.items()}], batches, 7, damping)
    for name, shape in shapes.items():
        flat, target = rows[name].reshape(7, -1), vector[name].numpy().ravel()
        lam = damping * (flat**2).mean()
        inverses = [np.linalg.inv(np.outer(one, one) + lam * np.eye(flat.shape[1])) for one in flat]
        np.testing.assert_allclose(found[name].numpy().ravel(), np.mean(inverses, axis=0) @ target, rtol=1e-9)
        assert found[name].shape == shape
        assert torch.equal(found[name], -opposite[name])


def test_a_layer_without_gradients_is_left_out():
    zeros = {"a": torch.zeros(3, 2), "b": torch.ones(3, 2)}
    (found,) = datainf_inverse([{"a": torch.ones(2), "b": torch.ones(2)}], lambda: iter([zeros]), 3, 0.1)
    assert found["a"].tolist() == [0, 0] and torch.isfinite(found["b"]).all()


def dense_quality(own, other, target, damping):
    """(tᵀx)²/(xᵀFx) with x = (F_A + λI)⁻¹ t, everything dense."""
    x = target
    if np.isfinite(damping):
        x = np.linalg.solve(own.T @ own / len(own) + damping * np.eye(len(target)), target)
    return np.log((target @ x) ** 2 / (x @ (other.T @ other / len(other)) @ x))


@pytest.mark.parametrize("noise", [0.05, 1.0, 30.0])
def test_the_damping_is_the_one_that_serves_the_other_half_best(noise):
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(24, 3)) @ rng.normal(size=(3, 30)) + noise * rng.normal(size=(24, 30))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    target = rng.normal(size=30)
    grid = (1e-4, 1e-2, 1.0, float("inf"))
    expected = {
        damping: sum(dense_quality(*halves, target, damping) for halves in
                     ((rows[::2], rows[1::2]), (rows[1::2], rows[::2])))
        for damping in grid
    }  # fmt: skip
    assert chosen_damping(rows, target, grid) == max(expected, key=expected.get)


def test_strong_curvature_in_common_asks_for_little_damping_and_noise_for_much():
    rng = np.random.default_rng(4)
    common = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 50))
    common /= np.linalg.norm(common, axis=1, keepdims=True)
    target = rng.normal(size=50)
    noise = rng.normal(size=(40, 50))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    assert chosen_damping(common, target) < chosen_damping(noise, target)
    assert chosen_damping(common[:1], target) == float("inf")


# -- in a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(make_project, tmp_path_factory):
    project = make_project(
        tmp_path_factory.mktemp("curvature") / "project",
        strategies=["prism"],
        seeds=[0],
        features={"sketch_dim": "exact", "optimizer": "sgd"},
        warmup={"checkpoints": 2},
    )
    upto_directions(project)
    return project


def upto_directions(project):
    steps = steps_of("run")
    return project.run_steps(steps[: [step.title for step in steps].index("Target directions") + 1])


def vectors_of(project):
    artifact = project.stage.shown("target_directions", "plain", "prism")
    return artifact, load_direction(project.lake, artifact).vectors


def flat(vector):
    return torch.cat([vector[name].double().flatten() for name in sorted(vector)]).numpy()


def test_datainf_in_a_run_is_that_of_explicit_gradients(project, tmp_path):
    one = project.copy(tmp_path / "copy").configure(curvature={"kind": "datainf"})
    upto_directions(one)
    artifact, corrected = vectors_of(one)
    assert artifact.notes["dampings"] == [0.1, 0.1]
    stage = one.stage
    sample = from_table(stage.lake.read_table(stage.shown("warmup_sample")))
    _, raw = vectors_of(project)
    with gradient_pass(stage) as work:
        for k, checkpoint in enumerate(work.checkpoints):
            engine = work.at(checkpoint)
            rows = [engine.weighted_gradient([example], np.ones(1)).gradient for example in sample]
            expected = {}
            for name, tensor in raw[k].items():
                layer = np.stack([row[name].double().numpy().ravel() for row in rows])
                lam = 0.1 * (layer**2).mean()
                target = tensor.double().numpy().ravel()
                # (g gᵀ + λI)⁻¹ t by a dense solve for each row.
                solved = [np.linalg.solve(np.outer(g, g) + lam * np.eye(len(g)), target) for g in layer]
                expected[name] = torch.from_numpy(np.mean(solved, axis=0)).view(tensor.shape)
            assert cosine(flat(corrected[k]), flat(expected)) > 1 - 1e-6
            assert cosine(flat(corrected[k]), flat(raw[k])) < 0.99


def test_adams_diagonal_on_the_target_side(project, tmp_path):
    one = project.copy(tmp_path / "copy").configure(curvature={"kind": "adam"})
    upto_directions(one)
    _, raw = vectors_of(project)
    _, corrected = vectors_of(one)
    with gradient_pass(one.stage) as work:
        for k, checkpoint in enumerate(work.checkpoints):
            moments = checkpoint.exp_avg_sq
            expected = {
                name: tensor / ((moments[name] / (1 - checkpoint.betas[1] ** checkpoint.optimizer_step)).sqrt()
                                + checkpoint.eps)
                for name, tensor in raw[k].items()
            }  # fmt: skip
            assert cosine(flat(corrected[k]), flat(expected)) > 1 - 1e-9


def test_the_chosen_damping_is_noted_and_the_run_finds_its_results_again(project, tmp_path):
    one = project.copy(tmp_path / "copy").configure(curvature={"kind": "fisher"})
    upto_directions(one)
    artifact, _ = vectors_of(one)
    assert len(artifact.notes["dampings"]) == 2
    assert artifact.header["settings"]["curvature"] == {"kind": "fisher", "damping": "auto"}
    assert all(result.computed == 0 for result in upto_directions(one))


def test_adam_does_not_count_twice(project, tmp_path):
    copy = project.copy(tmp_path / "copy").configure(features={"optimizer": "adam"}, curvature={"kind": "adam"})
    with pytest.raises(SettingsError, match="it would count twice"):
        copy.settings  # noqa: B018


# -- EK-FAC ------------------------------------------------------------------------------------------------------


def tokens_of(engine, examples):
    """Of each parameter what it multiplies [n, q] and the gradients of its outputs [n, p], for every token of the
    examples, by hooks on PEFT's own modules."""
    found: dict = {}
    modules = {name.removesuffix(".weight"): name for name in engine.parameters}
    for example in examples:
        handles, seen = [], {}
        for path, module in engine.model.named_modules():
            if path in modules:

                def keep(module, inputs, output, name=modules[path], seen=seen):
                    output.retain_grad()
                    seen[name] = (inputs[0].detach(), output)

                handles.append(module.register_forward_hook(keep))
        ids = torch.from_numpy(np.asarray(example.input_ids)).long()[None]
        with torch.enable_grad():
            log_probs = engine.model(input_ids=ids).logits[0].log_softmax(-1)
            supervised = np.flatnonzero(example.loss_mask)
            sum(log_probs[where - 1, ids[0, where]] for where in supervised).backward()
        for handle in handles:
            handle.remove()
        for name, (inputs, output) in seen.items():
            sides = found.setdefault(name, ([], []))
            counted = (output.grad[0] != 0).any(-1)
            sides[0].append(output.grad[0][counted])
            sides[1].append(inputs[0][counted])
    return {name: tuple(torch.cat(side) for side in sides) for name, sides in found.items()}


@pytest.fixture(scope="module")
def small():
    """A tiny model in float64 with a LoRA that does something, and examples."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from prism_assets.corpus.encoder import TokenizedExample
    from prism_assets.gradients.engine import GradientEngine

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=23, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.4,
    )  # fmt: skip
    lora = LoraConfig(r=2, lora_alpha=6, target_modules="all-linear")
    model = get_peft_model(LlamaForCausalLM(config).double(), lora).double().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2)
    rng = np.random.default_rng(0)
    examples = []
    for length in (7, 4, 9, 5, 6):
        mask = np.zeros(length, bool)
        mask[-2:] = True
        examples.append(TokenizedExample(rng.integers(0, 23, length).astype(np.int32), mask))
    return GradientEngine(model), examples


def test_kronecker_factors_are_the_second_moments_that_hooks_see(small):
    engine, examples = small
    factors = engine.kronecker_factors(examples)
    assert set(factors) == set(engine.parameter_shapes)
    for name, (gradients, inputs) in tokens_of(engine, examples).items():
        left, right = factors[name]
        assert left.shape == (engine.parameter_shapes[name][0],) * 2
        # The scale alpha/r stands with the gradient here and may stand with the input there: eigenvectors are the same.
        for found, rows in ((left, gradients), (right, inputs)):
            expected = rows.T @ rows
            torch.testing.assert_close(found / found.trace(), expected / expected.trace(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_ekfac_is_a_dense_inverse_in_the_eigenbasis(small, damping):
    engine, examples = small
    curvature = ekfac(engine.kronecker_factors(examples), lambda: engine.per_example_gradients(examples))
    generator = torch.Generator().manual_seed(1)
    vector = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in engine.parameter_shapes.items()
    }
    found = inverse(vector, curvature, damping)
    rows = [engine.weighted_gradient([example], np.ones(1)).gradient for example in examples]
    for name, (gradients, inputs) in tokens_of(engine, examples).items():
        u, v = (np.linalg.eigh((side.T @ side).numpy())[1] for side in (gradients, inputs))
        basis = np.kron(u, v)  # of the row-major flattening
        flat = np.stack([row[name].double().numpy().ravel() for row in rows]) @ basis
        halves = [(flat[half::2] ** 2).mean(axis=0) for half in (0, 1)]
        values = np.mean(halves, axis=0)
        dense = basis @ np.diag(values) @ basis.T + damping * values.mean() * np.eye(len(values))
        expected = np.linalg.solve(dense, vector[name].numpy().ravel())
        np.testing.assert_allclose(found[name].numpy().ravel(), expected, rtol=1e-6, atol=1e-9 * abs(expected).max())


def test_of_uncorrelated_factors_ekfac_has_the_eigenvalues_of_the_exact_second_moment():
    """G = s aᵀ with independent s and a: their Kronecker product is the second moment, so the inverse is exact."""
    rng = np.random.default_rng(2)
    s, a = (rng.normal(size=(4000, side)) @ rng.normal(size=(side, side)) for side in (2, 3))
    rows = torch.from_numpy(np.einsum("np,nq->npq", s, a))
    factors = {"w": (torch.from_numpy(s.T @ s), torch.from_numpy(a.T @ a))}
    curvature = ekfac(factors, lambda: [(list(range(len(rows))), {"w": rows})])
    vector = torch.from_numpy(rng.normal(size=(2, 3)))
    found = inverse({"w": vector}, curvature, 1e-6)["w"].numpy().ravel()
    flat = rows.flatten(1).numpy()
    assert cosine(found, np.linalg.solve(flat.T @ flat, vector.numpy().ravel())) > 0.99


def test_little_damping_where_both_halves_agree_and_much_where_they_do_not():
    rng = np.random.default_rng(5)

    def sample(number, spread):
        scales = np.exp(spread * rng.normal(size=(3, 40)))
        return torch.from_numpy(rng.normal(size=(number, 3, 40)) * scales)

    def damping(rows):
        eye = {"w": (torch.eye(3, dtype=torch.float64), torch.eye(40, dtype=torch.float64))}
        return ekfac_damping(ekfac(eye, lambda: [(list(range(len(rows))), {"w": rows})]))

    # Many rows whose coordinates differ a hundredfold against four rows whose coordinates do not differ at all.
    assert damping(sample(2000, 2.0)) < damping(sample(4, 0.0))


def test_a_matrix_without_gradients_is_left_out_and_a_sample_of_one_is_both_halves():
    eye = torch.eye(2)
    curvature = ekfac({"w": (eye, eye)}, lambda: [([0], {"w": torch.zeros(1, 2, 2)})])
    assert inverse({"w": torch.ones(2, 2)}, curvature, 0.1)["w"].abs().sum() == 0
    assert ekfac_damping(curvature) in EKFAC_DAMPINGS
    with pytest.raises(ValueError, match="at least one example"):
        ekfac({"w": (eye, eye)}, lambda: [])


def test_matrices_that_do_not_fit_are_refused_with_figures_before_any_pass():
    with pytest.raises(TooLittleMemory, match=r"2 parameter matrices take 0\.8 GiB and 0\.5 GiB are left"):
        require_memory({"a": (8, 14_336), "b": (64, 8)}, 2**29)
    require_memory({"a": (8, 100)}, 2**29)


def test_ekfac_in_a_run_corrects_with_what_the_formulas_give(project, tmp_path):
    one = project.copy(tmp_path / "copy").configure(curvature={"kind": "ekfac"})
    upto_directions(one)
    artifact, corrected = vectors_of(one)
    _, raw = vectors_of(project)
    stage = one.stage
    sample = from_table(stage.lake.read_table(stage.shown("warmup_sample")))
    with gradient_pass(stage) as work:
        for k, checkpoint in enumerate(work.checkpoints):
            engine = work.at(checkpoint)
            curvature = ekfac(engine.kronecker_factors(sample), lambda e=engine: e.per_example_gradients(sample))
            damping = ekfac_damping(curvature)
            assert artifact.notes["dampings"][k] == damping
            expected = inverse(raw[k], curvature, damping)
            assert cosine(flat(corrected[k]), flat(expected)) > 1 - 1e-5
            assert cosine(flat(corrected[k]), flat(raw[k])) < 0.99


def test_ekfac_is_refused_for_rows_that_adam_has_scaled(project, tmp_path):
    with pytest.raises(SettingsError, match="ekfac needs features.optimizer sgd, not adam"):
        copy = project.copy(tmp_path / "copy").configure(curvature={"kind": "ekfac"}, features={"optimizer": "adam"})
        assert copy.settings
