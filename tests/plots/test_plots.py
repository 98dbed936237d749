import base64
import io

import numpy as np
import pytest
from PIL import Image

from prism_assets import plots
from prism_assets.plots.canvas import SOURCE_COLORS, STRATEGY_COLORS
from prism_assets.selection import histogram

LARGEST = 60_000
NAN = float("nan")
LONG_NAMES = [f"a/very long $name_{i}$ with <markup> & ডেটা\nand a second line {i}" for i in range(20)]


def entry(mean, std=0.01, seeds=3):
    return {"mean": mean, "std": std, "seeds": seeds}


def image_of(png: bytes) -> np.ndarray:
    """RGB values of `png` [height, width, 3], after checking that it can be embedded anywhere."""
    assert png.startswith(b"\x89PNG\r\n") and len(png) < LARGEST
    image = Image.open(io.BytesIO(png))
    assert 500 <= image.width <= 1000 and 120 <= image.height <= 1400
    return np.asarray(image.convert("RGB")).astype(int)


def near(image: np.ndarray, color: str, tolerance: int = 40) -> np.ndarray:
    """Mask [height, width] of the pixels close to `color` (#rrggbb)."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return np.abs(image - wanted).max(axis=-1) < tolerance


def test_the_cut_off_stands_where_the_budget_ends():
    scores = np.linspace(-1, 1, 2001)
    columns = []
    for selected in (100, 1000):
        image = image_of(plots.score_histogram(histogram.score_histogram(scores, selected=selected)))
        purple = near(image, STRATEGY_COLORS["prism"]).sum(axis=0)
        columns.append(int(purple.argmax()) / image.shape[1])
    assert columns[0] - columns[1] > 0.3  # a smaller budget cuts further right, here by 0.9 of 2 units


def test_prism_weights_are_drawn_above_and_below_the_uniform_line():
    values = np.array([0.7, 0.2, 0.1])
    image = image_of(plots.target_weights([{"prism": value, "uniform": 1 / 3} for value in values[[1, 2, 0]]]))
    bars = near(image, STRATEGY_COLORS["prism"], 20)[:, : int(0.7 * image.shape[1])]  # not the legend
    line = int(near(image, STRATEGY_COLORS["uniform"], 20).sum(axis=1).argmax())
    tops = np.flatnonzero(bars.any(axis=1))
    assert tops.min() < line < tops.max()
    heights = bars.sum(axis=0)
    assert heights[: len(heights) // 3].max() > 2.5 * heights[-len(heights) // 4 :].max()  # sorted, 0.7 against 0.2


def test_composition_shows_a_larger_share_as_a_longer_bar():
    image = image_of(plots.composition({"x": 50, "y": 50}, {"prism": {"x": 90, "y": 10}}))
    first = near(image, SOURCE_COLORS[0], 10).sum(axis=1)
    first = first[first > 30]  # not the legend
    assert first.max() / first.min() == pytest.approx(90 / 50, rel=0.2)


@pytest.mark.parametrize("number", [1, 20])
def test_few_and_many_strategies_and_sources_with_awkward_names(number):
    names = LONG_NAMES[:number]
    counts = {name: 3 * position + 1 for position, name in enumerate(names)}
    image_of(plots.composition(counts, {name: counts for name in names}))
    strategies = {
        name: {
            "target_preference": entry(0.1 * position),
            "mean_log_prob": entry(-position),
            "exact_match": entry(0),
        }
        for position, name in enumerate(names)
    }
    image_of(plots.strategies_comparison(strategies, {"target_preference": 0.5, "mean_log_prob": NAN}))
    gains = {name: {"predicted": 1e-9, "measured": -2e-9, "held_out_mean_log_prob": 1e5} for name in names}
    image_of(plots.first_order_gains({"step": 0.01, **gains}))


def test_a_gain_that_bends_away_is_drawn_below_its_prediction():
    def rows_of(bend):
        steps = [
            {"size": 2**k, "predicted": 0.01 * 2**k, "measured": 0.01 * 2**k / (1 + bend * 2**k)} for k in range(6)
        ]
        image = image_of(plots.growing_steps({"probe_step": 1.0, "needed": 4.0, "prism": steps, "uniform": []}))
        right_end = slice(int(0.4 * image.shape[1]), int(0.49 * image.shape[1]))  # of the first of two panels
        return near(image, STRATEGY_COLORS["prism"], 30)[:, right_end].any(axis=1)

    straight, bent = (np.flatnonzero(rows_of(bend)) for bend in (0.0, 0.2))
    # On the right the two lines lie on each other, or apart by a part of the height.
    assert np.ptp(bent) > np.ptp(straight) + 20


def test_each_row_is_a_point_at_its_prediction_and_measurement():
    rows = [{"predicted": float(k), "measured": float(k)} for k in range(5)]
    image = image_of(plots.predicted_and_measured(rows, title="t", xlabel="x"))
    heights, columns = np.nonzero(near(image, "#7c67df", 25))
    assert np.corrcoef(columns, heights)[0, 1] < -0.95  # up and to the right; image rows count downwards


def test_missing_values_leave_gaps_not_errors():
    strategies = {
        "prism": {"target_preference": entry(0.6), "exact_match": None},
        "uniform": {"target_preference": entry(0.4, std=None, seeds=1), "exact_match": None},
        "less": {"target_preference": entry(NAN)},
        "random": {},
    }
    image = image_of(plots.strategies_comparison(strategies, None))
    assert near(image, STRATEGY_COLORS["prism"]).any() and near(image, STRATEGY_COLORS["uniform"]).any()
    assert not near(image, STRATEGY_COLORS["less"]).any()
    image_of(plots.target_weights([{"prism": NAN, "uniform": None}, {"prism": 1.0, "uniform": 1.0}]))
    image_of(plots.first_order_gains({"step": None, "prism": {"predicted": None, "measured": NAN}, "uniform": {}}))
    image_of(plots.composition({}, {"prism": {"x": 0}, "less": {"x": NAN, "y": 2}}))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.score_histogram({}),
        lambda: plots.score_histogram({"edges": [0, 1], "counts": [0], "cutoff": None}),
        lambda: plots.target_weights([]),
        lambda: plots.composition({}, {}),
        lambda: plots.strategies_comparison({}),
        lambda: plots.first_order_gains({}),
        lambda: plots.growing_steps(
            {"probe_step": 0.1, "needed": 0.2, "prism": [{"size": 1, "predicted": -1, "measured": 0}]}
        ),
        lambda: plots.predicted_and_measured([{"predicted": None, "measured": 1.0}], title="", xlabel=""),
    ],
)
def test_a_plot_with_nothing_to_show_is_still_a_plot(draw):
    image_of(draw())


def test_extreme_scales_stay_small_and_readable():
    generator = np.random.default_rng(0)
    scores = np.concatenate([generator.normal(size=200_000) * 1e-12, [1e9]])
    image_of(plots.score_histogram(histogram.score_histogram(scores, selected=1)))
    weights = generator.dirichlet(np.full(5000, 0.01))
    image_of(plots.target_weights([{"prism": weight, "uniform": 1 / 5000} for weight in weights]))
    image_of(plots.composition({f"source/{i}": i + 1 for i in range(3000)}, {"prism": {"source/0": 1e12}}))


def test_the_same_data_give_the_same_bytes():
    data = {"prism": {"target_preference": entry(0.6)}}
    assert plots.strategies_comparison(data) == plots.strategies_comparison(data)


def test_markdown_image_carries_the_bytes_and_no_markup_from_its_label():
    png = plots.target_weights([{"prism": 1.0, "uniform": 1.0}])
    markdown = plots.as_markdown_image(png, "weights](evil)\n[x")
    assert markdown.startswith("![weightsevilx](data:image/png;base64,") and markdown.endswith(")")
    assert base64.b64decode(markdown.split("base64,")[1][:-1]) == png


def difference(mean, half, values=()):
    interval = None if half is None else (mean - half, mean + half)
    return {"target_preference": {"mean": mean, "std": half, "interval": interval, "n": 3, "values": [mean, *values]}}


def test_a_difference_stands_on_its_side_of_zero_with_a_bar_as_long_as_its_interval():
    lengths, sides = [], []
    for half in (0.1, 0.5):
        image = image_of(
            plots.paired_differences(
                {"prism": {"random": difference(1.0, half)}, "less": {"random": difference(-1.0, half)}}
            )
        )
        columns = [np.flatnonzero(near(image, STRATEGY_COLORS[name], 20).any(axis=0)) for name in ("prism", "less")]
        sides.append(columns[0].mean() > columns[1].mean())
        lengths.append(np.ptp(columns[0]))
    assert all(sides) and lengths[1] > 2 * lengths[0]


def test_differences_without_interval_or_value_are_drawn_or_left_out():
    image_of(plots.paired_differences({}))
    names = {name: {"random": difference(0.1, None)} for name in LONG_NAMES}
    image_of(plots.paired_differences({**names, "x": {"random": {"target_preference": None}}}))


def test_stages_that_cost_more_have_longer_bars():
    image = image_of(plots.stage_costs({"prism": {"direction": 1.0, "fine-tuning": 9.0}, "random": {}}, unit="CPU"))
    widths = [near(image, SOURCE_COLORS[number], 10).sum(axis=1).max() for number in (0, 1)]
    assert widths[1] == pytest.approx(9 * widths[0], rel=0.1)
    image_of(plots.stage_costs({}, unit="GPU"))
