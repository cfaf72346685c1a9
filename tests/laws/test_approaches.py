import numpy as np
import pandas as pd
import pytest

from scaling.laws import approaches
from scaling.laws.observations import from_table
from tests.laws import data


def test_parabola_is_exact_on_a_parabola():
    x = np.log(np.geomspace(1e6, 1e8, 6))
    coefficients, vertex, height = approaches.parabola_minimum(x, 2.0 + 0.05 * (x - 16.0) ** 2)
    assert vertex == pytest.approx(16.0, abs=1e-9)
    assert height == pytest.approx(2.0, abs=1e-12)
    np.testing.assert_allclose(np.polyval(coefficients[::-1], x), 2.0 + 0.05 * (x - 16.0) ** 2, rtol=1e-12)


def test_a_parabola_that_opens_downward_has_no_minimum():
    x = np.linspace(0, 1, 5)
    assert np.isnan(approaches.parabola_minimum(x, -(x**2))[1])


def test_interpolated_minimum_of_a_smooth_curve():
    x = np.linspace(-1, 2, 13)
    where, _ = approaches.interpolated_minimum(x, np.cosh(x - 0.31))
    assert where == pytest.approx(0.31, abs=0.02)


def test_isoflop_recovers_the_exponent_where_the_grid_is_centred():
    found = approaches.isoflop(from_table(data.isoflop(width=2.0)), num_bootstrap=50)
    assert found["num_bracketed"] == 4
    # A constant relative offset moves the intercept alone, so a and b are those of the law to rounding.
    assert found["a"] == pytest.approx(0.28 / 0.62, abs=1e-6)
    assert found["b"] == pytest.approx(0.34 / 0.62, abs=1e-6)
    for minimum in found["minima"]:
        assert minimum["num_params"] * minimum["num_tokens"] * 6 == pytest.approx(minimum["flops"], rel=1e-9)


def test_minima_that_are_not_bracketed_are_refused():
    table = data.isoflop(budgets=(1e18, 1e19, 1e20), sizes=13)
    largest = table["flops"] == 1e20
    cut = table[~largest | (table["num_params"] < 0.9 * data.optimum(1e20))]
    found = approaches.isoflop(from_table(cut.loc[cut.index]), num_bootstrap=20)
    assert found["num_bracketed"] == 2
    assert not found["minima"][-1]["bracketed"]
    assert found["minima"][-1]["num_params"] is None


def test_isoflop_intervals_hold_the_truth_under_noise():
    inside = 0
    for seed in range(20):
        table = data.isoflop(noise=0.003, sizes=9, seed=seed)
        lo, hi = approaches.isoflop(from_table(table), num_bootstrap=300, seed=seed)["a_interval"]
        inside += lo <= 0.28 / 0.62 <= hi
    assert inside >= 16


def test_no_profile_gives_nothing():
    assert approaches.isoflop(from_table(data.scattered())) is None


def test_envelope_of_curves_on_a_known_law():
    sizes = np.geomspace(1e6, 1e9, 40)
    rows = []
    for i, n in enumerate(sizes):
        d = np.geomspace(1e8, 2e11, 60)
        rows.append(pd.DataFrame({"run_id": f"{i}", "num_params": n, "num_tokens": d, "flops": 6 * n * d}))
    curves = pd.concat(rows, ignore_index=True)
    curves["loss"] = data.chinchilla(curves["num_params"], curves["num_tokens"])
    final = curves.groupby("run_id").tail(1).rename(columns={"run_id": "run"})
    inner = curves.assign(flops_exact=curves["flops"])
    found = approaches.envelope(from_table(final), inner)
    # Beyond 6 × 2e11 × N of a size its own curve has ended: only the range where every size is still running counts.
    points = [p for p in found["points"] if 2e17 < p["flops"] < 1e20]
    C, N = np.array([[p["flops"], p["num_params"]] for p in points]).T
    assert np.polyfit(np.log(C), np.log(N), 1)[0] == pytest.approx(0.28 / 0.62, abs=0.01)
    assert found["num_runs"] > 10
    assert "not annealed" in found["note"]


def test_frontier_keeps_what_no_cheaper_run_beats():
    table = pd.DataFrame({"num_params": [1e6, 2e6, 3e6, 4e6], "num_tokens": 1e9, "loss": [3.0, 2.5, 2.7, 2.4]})
    assert approaches.frontier(from_table(table), "num_params").tolist() == [0, 1, 3]
