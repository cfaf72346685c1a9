"""Every function draws what it was given, on the Axes it was given, so that a person can read it."""

import dataclasses
import math

import matplotlib.colors
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scaling import numbers, records
from scaling.fit import analyse
from scaling.laws.tables.observations import as_counted
from scaling.report import axes, figures, plots, plots_of_fits
from scaling.report.figures import of_training
from scaling.report.figures.drawing import Seen
from tests import synthetic


@pytest.fixture(scope="module")
def runs():
    return synthetic.sweep_records()


@pytest.fixture(scope="module")
def fit(runs):
    return analyse(records.table(runs), records.curves(runs), delta=1e-3, bootstrap=50, source="synthetic").to_json()


@pytest.fixture
def ax():
    with plots.style():
        yield Figure().subplots()


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (512, "512"), (1000, "1K"), (6224, "6.22K"), (999_999, "1M"), (1.25e6, "1.25M"), (7e10, "70B")],
)  # fmt: skip
def test_engineering(value, text):
    assert numbers.compact(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e12, "$10^{12}$"), (3e11, r"$3{\times}10^{11}$"), (2.5e-3, r"$2.5{\times}10^{-3}$"), (9.999e5, "$10^{6}$")],
)
def test_scientific(value, text):
    assert axes.scientific(value) == text


@given(st.floats(-12, 24), st.floats(0.02, 14))
def test_a_logarithmic_axis_has_three_to_eight_ticks_inside_it(low, decades):
    lo, hi = 10.0**low, 10.0 ** (low + decades)
    ticks = axes.LogTicks().tick_values(lo, hi)
    assert 3 <= len(ticks) <= 8
    assert lo <= min(ticks) <= max(ticks) <= hi
    assert ticks == sorted(ticks)


def test_colours_darken_to_lighten_so_that_grey_prints_keep_their_order():
    shade = axes.colours([1e11, 3e11, 1e12, 1e13, 1e15])
    luminance = [np.dot(matplotlib.colors.to_rgb(c), (0.2126, 0.7152, 0.0722)) for c in shade.values()]
    assert (np.diff(luminance) > 0.05).all()
    assert luminance[-1] < 0.75, "lost on white paper"


def test_observations_count_as_the_fit_does(runs):
    table = records.table(runs)
    seen = as_counted(table, {"num_params": "total", "flops": "6ND"})
    assert (seen["num_params"] == table["num_params_total"]).all()
    assert (seen["flops"] == table["flops_6ND"]).all()
    letters = table[["num_params", "num_tokens", "loss"]].set_axis(["N", "D", "L"], axis=1)
    seen = as_counted(letters, {"num_params": "as given", "flops": "6ND"})
    assert (seen["flops"] == 6.0 * table["num_params"] * table["num_tokens"]).all()


def test_isoflop_draws_its_parabolas_through_their_minima(ax):
    x = np.log([1e4, 2e4, 4e4, 8e4])
    budgets = []
    for flops, centre in ((1e12, math.log(3e4)), (4e12, math.log(6e4))):
        quadratic = [2.0 + 0.1 * centre**2, -0.2 * centre, 0.1]
        budgets.append({
            "flops": flops, "num_params": np.exp(x).tolist(), "loss": (2.0 + 0.1 * (x - centre) ** 2).tolist(),
            "quadratic": quadratic, "minimum": {"num_params": math.exp(centre), "loss": 2.0, "bracketed": True},
        })  # fmt: skip
    assert plots.isoflop(ax, budgets) is ax
    stars = [line for line in ax.lines if line.get_marker() == "*"]
    parabolas = [line for line in ax.lines if len(line.get_xdata()) == 200]
    assert len(stars) == len(parabolas) == 2
    for star, parabola, budget in zip(stars, parabolas, budgets):
        assert star.get_xdata()[0] == budget["minimum"]["num_params"]
        assert np.interp(star.get_xdata()[0], parabola.get_xdata(), parabola.get_ydata()) == pytest.approx(
            2.0, abs=1e-4
        )
        assert np.interp(2e4, parabola.get_xdata(), parabola.get_ydata()) == pytest.approx(budget["loss"][1], abs=1e-4)


def test_a_minimum_that_is_not_bracketed_is_not_drawn(ax):
    unknown = {"num_params": None, "num_tokens": None, "loss": None, "bracketed": False}
    budget = {"flops": 1e12, "num_params": [1e4, 2e4], "loss": [3.0, 2.0], "quadratic": None, "minimum": unknown}
    plots.isoflop(ax, [budget])
    assert not [line for line in ax.lines if line.get_marker() == "*"]
    assert "minimum" not in [t.get_text() for t in ax.get_legend().get_texts()]


def test_allocation_leaves_out_minima_that_are_not_bracketed(ax):
    known = {"flops": 1e12, "num_params": 1e4, "num_tokens": 2e5, "bracketed": True, "num_params_interval": [8e3, 2e4]}
    unknown = {"flops": 4e12, "num_params": None, "num_tokens": None, "bracketed": False, "num_params_interval": None}
    plots.allocation(ax, "num_params", minima=[known, unknown])
    [points] = ax.containers
    assert points.lines[0].get_xdata().tolist() == [1e12]
    [bars] = points.lines[2]
    assert np.allclose(bars.get_segments()[0][:, 1], [8e3, 2e4])


def test_the_frontier_is_dashed_where_nothing_was_fitted(ax):
    frontier = [{"flops": 10.0**k, "num_params": 10.0 ** (k / 2), "num_tokens": 1e9} for k in range(18, 23)]
    plots.allocation(ax, "tokens_per_param", frontier, fitted_flops=(1e18, 1e20))
    dashed, solid = ax.lines
    assert dashed.get_linestyle() == "--"
    assert solid.get_xdata().tolist() == [1e18, 1e19, 1e20]
    assert solid.get_ydata()[0] == pytest.approx(1.0)


def test_contours_carry_the_losses_of_the_law(ax, runs):
    table = as_counted(records.table(runs), {"num_params": "non_embedding", "flops": "exact"})
    plots.surface(ax, table[table["status"] == "completed"], synthetic.law)
    [contours] = [c for c in ax.collections if hasattr(c, "levels")]
    for level, path in zip(contours.levels, contours.get_paths()):
        points = path.vertices[:: max(1, len(path.vertices) // 7)]
        assert np.allclose(synthetic.law(points[:, 0], points[:, 1]), level, rtol=2e-3)
        assert level == float(f"{level:.3g}"), "a round loss"


def test_residuals_of_the_truth_are_the_noise(ax, runs):
    table = as_counted(records.table(runs), {"num_params": "non_embedding", "flops": "exact"})
    plots.residuals(ax, table, synthetic.law(table["num_params"], table["num_tokens"]))
    drawn = np.concatenate([c.get_offsets()[:, 1] for c in ax.collections])
    fitted = table[(table["status"] == "completed")]
    expected = 100 * (fitted["loss"] / synthetic.law(fitted["num_params"], fitted["num_tokens"]) - 1)
    assert np.allclose(sorted(drawn), sorted(expected))


def test_residuals_of_many_sizes_are_drawn_at_once(ax):
    """A call a size is quadratic: minutes at ten thousand sizes."""
    n = np.geomspace(1e7, 1e10, 400)
    loss = synthetic.law(n, 20 * n)
    table = pd.DataFrame({"num_params": n, "num_tokens": 20 * n, "flops": 120 * n**2, "loss": loss * 1.01})
    plots.residuals(ax, table.assign(holdout=n > 5e9), loss)
    assert len(ax.collections) == 1
    drawn = ax.collections[0]
    assert len(drawn.get_offsets()) == 400
    white = (drawn.get_facecolors()[:, :3] == 1).all(axis=1)
    assert white.tolist() == (n > 5e9).tolist()


def repeated_table():
    rows = [(1e4, u, u * e, e, 2 + 1e3 / u / e) for u in (1e5, 1e6) for e in (1, 4, 16)]
    columns = ("num_params", "unique_tokens", "num_tokens", "epochs", "loss")
    return pd.DataFrame(rows, columns=columns).assign(label="run", flops=1e12)


def test_repetition_has_the_runs_and_the_law_of_each_amount(ax):
    plots.repetition(ax, repeated_table(), lambda num_params, num_tokens, unique_tokens: 2 + 1e3 / num_tokens)
    drawn = [np.array(line.get_xydata()) for line in ax.lines]
    assert len(drawn) == 4
    for points, law in zip(drawn[::2], drawn[1::2]):
        assert points[:, 0].tolist() == [1, 4, 16]
        np.testing.assert_allclose(law[[0, -1], 0], [1, 16])
        np.testing.assert_allclose(np.interp(points[:, 0], law[:, 0], law[:, 1]), points[:, 1], rtol=1e-5)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["$U$ = 100K", "$U$ = 1M"]


def test_repetition_is_drawn_where_tokens_were_repeated():
    table = repeated_table()
    with plots.style():
        assert "repetition" in [d.name for d in figures.draw(table, {})]
        assert "repetition" not in [d.name for d in figures.draw(table[table["epochs"] == 1], {})]


def test_forecast_puts_interval_and_truth_at_the_size(ax):
    rows = [
        {"run_id": "a", "flops": 1e12, "num_params": 1e4, "predicted": 2.1, "interval": [1.9, 2.2], "actual": 2.0},
        {"run_id": "b", "flops": 1e12, "num_params": 2e4, "predicted": 1.5, "interval": [1.4, 1.6], "actual": None},
    ]
    plots.forecast(ax, rows)
    [bars] = ax.collections
    assert [s[:, 1].tolist() for s in bars.get_segments()] == [[1.9, 2.2], [1.4, 1.6]]
    assert ax.lines[-1].get_xdata().tolist() == [1e4, 2e4]
    assert ax.lines[-1].get_ydata()[0] == 2.0
    assert math.isnan(ax.lines[-1].get_ydata()[1])


def test_relative_forecast_is_of_the_loss_that_training_gave(ax):
    row = {"run_id": "a", "flops": 1e12, "num_params": 1e4, "predicted": 2.1, "interval": [1.9, 2.2], "actual": 2.0}
    plots.forecast(ax, [row, {**row, "num_params": 2e4, "actual": None}], relative=True)
    [bars] = ax.collections
    assert np.allclose([s[:, 1] for s in bars.get_segments()], [[-5, 10]])
    predicted, actual = ax.lines
    assert predicted.get_ydata() == pytest.approx([5.0])
    assert actual.get_ydata() == pytest.approx([0.0])


def test_few_cells_are_forecast_a_row_each_with_the_same_numbers(ax):
    row = {"run_id": "a", "flops": 1e12, "num_params": 1e4, "predicted": 2.1, "interval": [1.9, 2.2], "actual": 2.0}
    plots.forecast_rows(ax, [{**row, "flops": 2e12, "actual": None}, row], relative=True)
    [bar] = ax.collections
    assert np.allclose([s[:, 0] for s in bar.get_segments()], [[-5, 10]])
    predicted, actual = ax.lines
    assert (predicted.get_xdata(), actual.get_xdata()) == (pytest.approx([5.0]), pytest.approx([0.0]))
    # The other's place stays empty: beside axes of losses a row is the same cell on both.
    assert [t.get_text() for t in ax.get_yticklabels()] == ["10K, $10^{12}$", "10K, $2{\\times}10^{12}$"]


def test_a_few_forecasts_name_what_was_found_though_the_first_was_not(ax):
    row = {"run_id": "a", "flops": 1e12, "num_params": 1e4, "predicted": 2.1, "interval": [1.9, 2.2], "actual": 2.0}
    first = {**row, "actual": None}
    plots.forecast_rows(ax, [first, {**row, "flops": 2e12}])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["forecast, 90 % interval", "actual"]
    assert ax.lines[-1].get_ydata().tolist() == [1]


def test_a_diverged_rate_is_a_cross_and_an_edge_an_open_star(ax):
    cell = {"name": "1M", "num_tokens": 1e6, "rates": [0.1, 0.2, 0.4], "losses": [2.0, 2.5, None], "best": 0.1}
    plots.learning_rate(ax, [{**cell, "interior": False}])
    [star] = [line for line in ax.lines if line.get_marker() == "*"]
    [cross] = [line for line in ax.lines if line.get_marker() == "x"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (0.1, 2.0)
    assert star.get_markerfacecolor() == "white"
    assert cross.get_xdata()[0] == 0.4


def _boxes(texts, renderer):
    return [t.get_window_extent(renderer) for t in texts if t.get_text().strip() and t.get_visible()]


@pytest.mark.slow
def test_no_label_is_clipped_or_overlaps_another(runs, fit):
    table = records.table(runs)
    names = []
    with plots.style():
        for drawing in figures.draw(table, fit, runs):
            names.append(drawing.name)
            canvas = FigureCanvasAgg(drawing.figure)
            canvas.draw()
            page = drawing.figure.bbox.padded(1.0)
            for ax in drawing.figure.axes:
                for axis in (ax.xaxis, ax.yaxis):
                    boxes = _boxes([t for t in axis.get_ticklabels() if t.get_window_extent().width], canvas.renderer)
                    inside = [b for b in boxes if ax.bbox.padded(40).overlaps(b)]
                    for i, first in enumerate(inside):
                        assert not any(first.overlaps(second) for second in inside[i + 1 :]), drawing.name
                    assert not inside or 3 <= len(inside) <= 10, f"{drawing.name}: {len(inside)} ticks"
                for box in _boxes([ax.title, ax.xaxis.label, ax.yaxis.label], canvas.renderer):
                    assert page.x0 <= box.x0 <= box.x1 <= page.x1, drawing.name
                    assert page.y0 <= box.y0 <= box.y1 <= page.y1, drawing.name
    assert names == [
        "isoflop", "surface", "power_laws", "exponents", "profiles", "clouds", "forecast", "forecast_growth",
        "allocation", "residuals", "curves",
    ]  # fmt: skip


def test_axes_say_how_parameters_and_compute_are_counted(tmp_path, runs, fit):
    only = {key: fit[key] for key in ("convention", "allocation", "frontier", "isoflop")}
    with plots.style():
        drawings = {d.name: d.figure for d in figures.draw(records.table(runs), only)}
    figures._name_convention(drawings["allocation"], fit)
    left = drawings["allocation"].axes[0]
    assert left.get_xlabel() == "training compute $C$ (FLOPs, rule exact)"
    assert left.get_ylabel() == "non-embedding parameters $N$"


def test_the_same_data_give_the_same_bytes(tmp_path, runs):
    once, twice = (figures.write(tmp_path / name, records.table(runs[:3]), {}, runs[:3]) for name in "ab")
    assert [s.name for s in once] == ["curves"]
    for a, b in zip(once, twice):
        assert a.svg.read_bytes() == b.svg.read_bytes()
        assert a.png.read_bytes() == b.png.read_bytes()


def test_loss_by_place_is_a_line_for_the_longest_run_of_each_size_and_family(runs):
    places = {"until": [8, 16, 64], "loss": [3.0, 2.5, None], "standard_error": [0.1, 0.1, None]}
    other = {**runs[0].config, "model": {**runs[0].config["model"], "family": "recurrent"}}
    some = [dataclasses.replace(run, loss_by_position=places) for run in runs[:6]]
    some.append(dataclasses.replace(some[0], run_id="f" * 12, config=other))
    table = records.positions([*some, dataclasses.replace(runs[6], loss_by_position=None)])
    assert set(table["run_id"]) == {run.run_id for run in some}
    with plots.style():
        drawing = of_training.positions(Seen(records.table(some), {}, some))
    [ax] = drawing.figure.axes
    longest = {}
    for run in some:
        key = (run.config["model"].get("family", "transformer"), run.num_params["non_embedding"])
        longest[key] = max(run.num_tokens, longest.get(key, 0))
    assert len(ax.lines) == len(longest)
    assert {line.get_linestyle() for line in ax.lines} == {"-", "--"}
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [8, 16, 64])
    assert records.positions(runs[:2]).empty


@pytest.mark.parametrize("middle", [1.12, 1.0, 3.0, 0.02])
def test_a_multipliers_axis_can_be_read_however_narrow_it_is(middle):
    point = {"value": middle, "interval": [0.9 * middle, 1.1 * middle], "extrapolated": False}
    points = [{**point, "flops": flops} for flops in (1e11, 1e12)]
    compared = {"pairs": [{"group": "a", "over": "b", "points": points}], "axis": "flops", "level": 0.9}
    ax = plots_of_fits.multipliers(Figure().subplots(), compared)
    low, high = ax.get_ylim()
    assert sum(low <= tick <= high for tick in ax.get_yticks()) >= 3
