"""The sketch keeps inner products, is the same everywhere, and never depends on what else is sketched."""

import numpy as np
import pytest
import torch

from prism_assets.gradients.sketch import ExactFeatures, Sketch

SHAPES = {"q.lora_A.weight": (4, 200), "q.lora_B.weight": (130, 4), "k.lora_A.weight": (4, 33)}


def sketch_matrix(dim, seed, shapes=SHAPES):
    """S [K, D], read off column by column from unit vectors; coordinates in the order of `shapes`."""
    columns = []
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        out = torch.zeros(size, dim, dtype=torch.float64)
        Sketch(dim, seed).add_(out, name, torch.eye(size, dtype=torch.float64).view(size, *shape))
        columns.append(out)
    return torch.cat(columns).T.numpy()


@pytest.mark.parametrize("dim", [16, 128, 1024])
def test_every_column_has_one_entry_of_plus_or_minus_one(dim):
    matrix = sketch_matrix(dim, seed=3)
    assert (np.count_nonzero(matrix, axis=0) == 1).all()
    assert (np.abs(matrix).sum(axis=0) == 1).all()
    assert 0.4 < (matrix.sum(axis=0) > 0).mean() < 0.6


def test_coordinates_of_one_block_never_share_a_place():
    matrix = sketch_matrix(128, seed=3, shapes={"w": (4, 200)})
    places = np.abs(matrix).argmax(axis=0)
    for start in range(0, 800, 128):
        block = places[start : start + 128]
        assert len(set(block)) == len(block)


def test_adding_parameters_one_by_one_is_the_product_with_the_matrix():
    generator = torch.Generator().manual_seed(0)
    gradients = {n: torch.randn(5, *s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
    sketch, out = Sketch(64, seed=9), torch.zeros(5, 64, dtype=torch.float64)
    for name, value in gradients.items():
        sketch.add_(out, name, value)
    flat = torch.cat([value.flatten(1) for value in gradients.values()], dim=1).numpy()
    np.testing.assert_allclose(out.numpy(), flat @ sketch_matrix(64, seed=9).T, atol=1e-12)
    one = sketch.sketch_vector({name: value[2] for name, value in gradients.items()})
    np.testing.assert_allclose(one.numpy(), out[2].numpy(), atol=1e-12)


@pytest.mark.parametrize("dim", [64, 256])
def test_inner_products_are_unbiased_with_error_of_at_most_one_over_root_k(dim):
    rng = np.random.default_rng(1)
    size = 3000
    x, y = rng.standard_normal(size), rng.standard_normal(size)
    x[::97] *= 30  # a few heavy coordinates, at equal distances, as outlier channels make them
    y[::97] *= 30
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    y = 0.3 * x + np.sqrt(1 - 0.3**2) * (y - x * (x @ y)) / np.linalg.norm(y - x * (x @ y))
    errors = []
    for seed in range(400):
        sketch = Sketch(dim, seed)
        sketched = [sketch.sketch_vector({"w": torch.from_numpy(v).view(30, 100)}).numpy() for v in (x, y)]
        errors.append(sketched[0] @ sketched[1] - x @ y)
    errors = np.array(errors)
    assert np.abs(errors.mean()) <= 3 * errors.std() / np.sqrt(len(errors))
    # The exact bound has the factor 1 + <x, y>^2 = 1.09 under the root; 1.1 leaves the estimate some room.
    assert np.sqrt((errors**2).mean()) <= 1.1 / np.sqrt(dim)
    assert np.sqrt((errors**2).mean()) >= 0.7 / np.sqrt(dim)  # an error far below would mean that nothing is sketched


def test_the_map_is_pinned_so_that_stored_rows_stay_comparable():
    """Independent reimplementation of the published recipe: Philox keyed by SHA-256, order and lowest bits of
    words."""
    import hashlib

    dim, name, size = 8, "layer.lora_A.weight", 20
    key = hashlib.sha256(f"5\n{dim}\n{name}".encode()).digest()[:16]
    words = [int(w) for w in np.random.Philox(key=int.from_bytes(key, "little")).random_raw(24)]
    values = np.arange(1.0, size + 1)
    expected = np.zeros(dim)
    for block in range(3):
        block_words = words[block * dim : (block + 1) * dim]
        ranked = sorted(range(dim), key=block_words.__getitem__)
        for place in range(dim):
            if block < 2:  # whole blocks: output place reads coordinate ranked[place], sign of the place
                expected[place] += (1 if block_words[place] & 1 else -1) * values[block * dim + ranked[place]]
            elif block * dim + place < size:  # the rest: coordinate goes to place ranked[coordinate]
                expected[ranked[place]] += (1 if block_words[place] & 1 else -1) * values[block * dim + place]
    found = Sketch(dim, seed=5).sketch_vector({name: torch.from_numpy(values).view(4, 5)})
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_name_and_seed_change_the_map_and_other_parameters_do_not():
    value = torch.randn(1, 700, generator=torch.Generator().manual_seed(0))[0]
    first = Sketch(64, 0).sketch_vector({"a": value})
    assert torch.equal(first, Sketch(64, 0).sketch_vector({"a": value}))
    assert not torch.equal(first, Sketch(64, 1).sketch_vector({"a": value}))
    assert not torch.equal(first, Sketch(64, 0).sketch_vector({"b": value}))
    used = Sketch(64, 0)
    used.sketch_vector({"b": value, "c": value[:30]})
    assert torch.equal(first, used.sketch_vector({"a": value}))


def test_exact_features_are_the_parameters_side_by_side():
    exact = ExactFeatures(SHAPES)
    assert exact.dim == 4 * 200 + 130 * 4 + 4 * 33
    vector = {name: torch.randn(*shape) for name, shape in reversed(SHAPES.items())}
    expected = torch.cat([vector[name].flatten() for name in SHAPES])
    assert torch.equal(exact.sketch_vector(vector), expected)


def test_a_sketch_of_no_dimensions_is_refused():
    with pytest.raises(ValueError, match="positive dimension"):
        Sketch(0, seed=1)
