"""The noise of a sketch as it is noted of a ranking, against scores without a sketch."""

import math

import numpy as np
import pytest
import torch

from prism_assets.gradients.sketch import Sketch
from prism_assets.selection.selection import _sketch_check
from prism_assets.selection.sketch_noise import sketch_noise

ROWS, COORDINATES = 400, 25_000


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def ranking(dim: int, towards: float, checkpoints: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exact scores, sketched ones and the query, of rows that lean towards or from the target by `towards`."""
    rng = np.random.default_rng([dim, checkpoints])
    rates = np.array([0.7, 0.3][:checkpoints]) if checkpoints > 1 else np.ones(1)
    exact, sketched, query = np.zeros(ROWS), np.zeros(ROWS), []
    lean = rng.normal(size=(ROWS, 1)) * towards
    for checkpoint, rate in enumerate(rates):
        target = unit(rng.normal(size=COORDINATES))
        rows = unit(unit(rng.normal(size=(ROWS, COORDINATES))) + lean * target)
        sketch = Sketch(dim, seed=checkpoint)
        placed = torch.zeros(ROWS, dim, dtype=torch.float64)
        sketch.add_(placed, "weight", torch.from_numpy(rows))
        block = rate * sketch.sketch_vector({"weight": torch.from_numpy(target)}).numpy()
        exact += rate * rows @ target
        sketched += placed.numpy() @ block
        query.append(block)
    return exact, sketched, np.concatenate(query)


@pytest.mark.parametrize("checkpoints", [1, 2])
@pytest.mark.parametrize("dim", [128, 512, 2048])
def test_the_noise_is_that_of_the_sketch(dim, checkpoints):
    exact, sketched, query = ranking(dim, 0.05, checkpoints)
    found = sketch_noise(sketched, query, dim)
    assert found.noise == pytest.approx((sketched - exact).std(), rel=0.12)
    assert found.spread == pytest.approx(sketched.std())
    # The share that is signal is the squared correlation with the exact scores.
    assert found.signal == pytest.approx(np.corrcoef(exact, sketched)[0, 1] ** 2, abs=0.12)


def test_the_advised_dimension_gives_what_it_promises():
    _, sketched, query = ranking(256, 0.1)
    advised = sketch_noise(sketched, query, 256).advised
    assert advised is not None and math.log2(advised).is_integer() and advised > 256
    exact, sketched, _ = ranking(advised, 0.1)
    assert np.corrcoef(exact, sketched)[0, 1] ** 2 > 0.85


def test_of_a_ranking_of_noise_alone_no_dimension_is_advised_but_exact_scores():
    _, sketched, query = ranking(64, 0.0)
    found = sketch_noise(sketched, query, 64)
    assert found.signal < 0.3
    nothing = found._replace(signal=0.0, advised=None)
    check = _sketch_check(nothing.as_notes())
    assert not check.passed and check.facts["advised"] == "selection.rerank: all (exact scores)"
    assert sketch_noise(np.ones(5), np.ones(64), 64).signal == 0


def test_a_check_passes_where_the_gradients_outweigh_the_noise_or_nothing_is_known():
    _, sketched, query = ranking(2048, 0.3)
    assert _sketch_check(sketch_noise(sketched, query, 2048).as_notes()).passed
    assert _sketch_check(None).passed
    _, sketched, query = ranking(64, 0.02)
    failed = _sketch_check({**sketch_noise(sketched, query, 64).as_notes(), "signal": 0.2, "advised": 4096})
    assert not failed.passed and failed.facts["advised"].startswith(
        "features.sketch_dim: 4096, or selection.rerank: all"
    )
