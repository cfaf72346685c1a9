from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize

from scaling.laws.fitting import estimate, solver, starts
from scaling.laws.fitting.estimate import fit
from scaling.laws.forms import catalogue
from scaling.laws.tables.observations import from_table
from tests import counting
from tests.laws import data


def test_noise_free_chinchilla_is_recovered_to_rounding():
    observations = from_table(data.scattered())
    fitted = fit(observations, "chinchilla", delta=1e-3)
    assert fitted.converged, fitted.reasons
    for name, value in data.HOFFMANN.items():
        assert fitted.params[name] == pytest.approx(value, rel=1e-10)
    # 50 ms on a quiet machine (scaling.bench --laws): some 10,000 calls; this catches a change of order.
    assert counting.calls(lambda: fit(observations, "chinchilla", delta=1e-3)) < 40_000


def test_epoch_optimum():
    fitted = fit(from_table(data.epoch()), "chinchilla", delta=1e-3)
    assert fitted.converged, fitted.reasons
    assert fitted.objective <= 1.0182740178e-3
    published = {"A": 477.83, "B": 2143.42, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}
    for name, value in published.items():
        assert fitted.params[name] == pytest.approx(value, rel=1e-4)
    assert fitted.starts_at_optimum == fitted.num_starts


def test_epoch_least_absolute_deviations():
    fitted = fit(from_table(data.epoch()), "chinchilla", loss="lad")
    for name, value in {"A": 482.00572, "B": 2085.43420, "alpha": 0.34781, "beta": 0.36585}.items():
        assert fitted.params[name] == pytest.approx(value, rel=1e-5, abs=1e-3)
    # A least-absolute-deviations optimum passes through as many points as it has parameters.
    assert np.sort(np.abs(fitted.residuals))[4] < 1e-9


@pytest.mark.parametrize("delta, a", [(1e-5, 0.5126), (1e-3, 0.5139), (1e-2, 0.5184), (0.1, 0.5298)])
def test_epoch_exponent_by_delta(delta, a):
    params = fit(from_table(data.epoch()), "chinchilla", delta=delta).params
    assert params["beta"] / (params["alpha"] + params["beta"]) == pytest.approx(a, abs=5e-5)


def test_squared_loss_agrees_with_scipy():
    table = data.scattered(noise=0.01)
    fitted = fit(from_table(table), "chinchilla", loss="squared")
    n, d = np.log(table["num_params"]), np.log(table["num_tokens"])

    def residual(p):
        return np.log(p[0] + np.exp(p[1] - p[2] * n) + np.exp(p[3] - p[4] * d)) - np.log(table["loss"])

    start = [1.7, np.log(400), 0.34, np.log(400), 0.28]
    best = scipy.optimize.least_squares(residual, start, method="lm", xtol=1e-15, ftol=1e-15, gtol=1e-15)
    assert fitted.objective == pytest.approx(best.cost, rel=1e-9)
    assert fitted.params["alpha"] == pytest.approx(best.x[2], rel=1e-5)


def test_delta_from_the_data_is_near_the_efficient_one():
    fitted = fit(from_table(data.scattered(num=400, noise=0.01)), "chinchilla")
    assert fitted.loss.delta == pytest.approx(1.345 * 0.01, rel=0.15)


def test_weights_count_as_repetitions():
    table = data.scattered(noise=0.01)
    weighted = fit(from_table(table.assign(weight=[1.0, 2.0] * 30)), "chinchilla", delta=1e-3)
    twice = table.iloc[list(range(60)) + list(range(1, 60, 2))]
    repeated = fit(from_table(twice), "chinchilla", delta=1e-3)
    assert weighted.params["alpha"] == pytest.approx(repeated.params["alpha"], rel=1e-8)


def test_a_loss_without_offset_reports_its_bound():
    table = data.scattered(noise=0.002, params=data.HOFFMANN | {"E": 0.0})
    fitted = fit(from_table(table), "chinchilla")
    if fitted.params["E"] == 0.0:
        assert "E" in fitted.at_bound
        assert not fitted.converged
    assert fitted.params["E"] < 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.assign(num_params=1e9), "num_params takes one value only"),
        (lambda t: t.head(5), "5 parameters and 5 observations"),
        (lambda t: t.assign(num_tokens=20 * t["num_params"]), "move together"),
        (lambda t: t.drop(columns="loss"), "column loss is missing"),
        (lambda t: t.assign(loss=-t["loss"]), "write a positive number"),
        (lambda t: t.assign(loss=t["loss"].where(t.index != 3)), "row 3: loss is nan"),
        (lambda t: t.assign(loss="high"), "loss is 'high'"),
        (lambda t: t.assign(num_params=0), "row 0: num_params is 0"),
        (lambda t: t.head(0), "no rows"),
    ],
)
def test_bad_data_say_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        fit(from_table(change(data.scattered())), "chinchilla")


def test_asymmetric_loss_is_a_quantile():
    observations = from_table(data.scattered(num=400, noise=0.01))
    for tau in (0.2, 0.8):
        fitted = fit(observations, "chinchilla", loss="asymmetric", tau=tau, delta=1e-5)
        assert (fitted.residuals > 0).mean() == pytest.approx(tau, abs=0.015)


def test_a_variance_function_is_weighted_least_squares():
    """log L = log A - α log N, noise ∝ N^-1/2: the textbook's weighted solution."""
    rng = np.random.default_rng(5)
    n = np.geomspace(1e6, 1e9, 40)
    spread = (n / 1e8) ** -0.25
    loss = 50 * n**-0.1 * np.exp(0.01 * spread * rng.normal(size=40))
    table = data.pd.DataFrame({"num_params": n, "num_tokens": 1e9, "loss": loss})
    fitted = fit(from_table(table), "kaplan_n", loss="squared", variance=lambda c: c["num_params"] ** -0.5)
    X = np.stack([np.ones(40), -np.log(n)], axis=1) / spread[:, None]
    want = np.linalg.lstsq(X, np.log(loss) / spread, rcond=None)[0]
    assert fitted.params["alpha"] == pytest.approx(want[1], rel=1e-9)
    assert fitted.noise_at(num_params=1e6) / fitted.noise_at(num_params=1e8) == pytest.approx(100**0.25)


def test_unknown_loss_and_delta():
    observations = from_table(data.scattered())
    with pytest.raises(ValueError, match="write one of huber"):
        fit(observations, loss="l3")
    with pytest.raises(ValueError, match="write a positive number"):
        fit(observations, delta=-1.0)


def test_duplicate_rows_warn():
    table = data.scattered()
    (warning,) = from_table(table.iloc[[0, 0, 1, 2]]).warnings
    assert "repeat another row" in warning


def test_fit_does_not_mutate_the_form():
    before = dict(catalogue.FORMS["chinchilla"].parameters)
    fit(from_table(data.scattered(noise=0.01)), "chinchilla")
    assert catalogue.FORMS["chinchilla"].parameters == before
    assert starts.MAX_STARTS >= 36


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chinchilla", "kaplan_joint", "kaplan_c_offset", "product"])
def test_starts_on_a_sample_find_the_optimum_of_all_rows(name, monkeypatch):
    """With many rows the search begins on a sample of them: optimum, δ and evidence are those of a search on all."""
    table = data.scattered(num=1500, noise=0.01)
    table = from_table(table.assign(flops=6 * table["num_params"] * table["num_tokens"]))
    assert len(table) > estimate.MANY_ROWS
    fast = fit(table, name)
    monkeypatch.setattr(estimate, "MANY_ROWS", 10_000)
    slow = fit(table, name)
    assert fast.objective == pytest.approx(slow.objective, rel=1e-9)
    assert fast.loss.delta == pytest.approx(slow.loss.delta, rel=1e-6)
    assert fast.converged == slow.converged
    assert fast.num_starts == slow.num_starts
    assert 2 <= fast.starts_at_optimum <= fast.num_starts
    for key, value in slow.params.items():
        assert fast.params[key] == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_farseers_optimum_from_a_sample(monkeypatch):
    table = from_table(data.scattered(num=1500, noise=0.01))
    fast = fit(table, "farseer")
    monkeypatch.setattr(estimate, "MANY_ROWS", 10_000)
    assert fast.objective == pytest.approx(fit(table, "farseer").objective, rel=1e-7)


def test_one_singular_matrix_costs_the_other_lanes_nothing():
    """Leaving a row out can leave a matrix singular to the last digit, for which NumPy refuses the whole stack."""
    rng = np.random.default_rng(0)
    matrices, right = rng.normal(size=(5, 3, 3)), rng.normal(size=(5, 3))
    matrices[2] = 0.0
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.solve(matrices, right[:, :, None])
    solved = solver.solve_each(matrices, right)
    assert np.isnan(solved[2]).all()
    for i in (0, 1, 3, 4):
        np.testing.assert_allclose(matrices[i] @ solved[i], right[i], atol=1e-12)


def test_a_step_where_the_hessian_is_singular_still_descends():
    problem = SimpleNamespace(held=lambda lanes: np.zeros((2, 2), bool), lower=np.full(2, -9.0), upper=np.full(2, 9.0))
    hessian = np.array([np.diag([-1e-14, 1.0]), np.diag([1.0, 1.0])])  # and 1e-14 of the identity is added to each
    lanes = SimpleNamespace(theta=np.zeros((2, 2)), gradient=np.array([[1.0, 2.0]] * 2), hessian=hessian,
                            gauss=np.array([np.eye(2)] * 2))  # fmt: skip
    stepped = solver._step(problem, lanes, np.zeros(2))
    assert stepped[0, 0] == -9.0  # flat there: as far as it may go
    assert stepped[0, 1] == pytest.approx(-2.0)
    assert stepped[1] == pytest.approx([-1.0, -2.0])
