import numpy as np
import pytest
import scipy.optimize
from scipy import stats

from scaling.laws.fitting.estimate import fit
from scaling.laws.intervals import profile as profiles
from scaling.laws.intervals.profile import profile
from scaling.laws.tables.observations import from_table
from tests.laws import data


@pytest.fixture(scope="module")
def line():
    """log L = log A - α log N: linear, so profile and textbook intervals are the same."""
    rng = np.random.default_rng(1)
    n = np.geomspace(1e6, 1e9, 25)
    loss = 50 * n**-0.1 * np.exp(0.01 * rng.normal(size=25))
    table = data.pd.DataFrame({"num_params": n, "num_tokens": 1e9, "loss": loss})
    X = np.stack([np.ones(25), np.log(n)], axis=1)
    beta, rss, *_ = np.linalg.lstsq(X, np.log(loss), rcond=None)
    return fit(from_table(table), "kaplan_n", loss="squared"), X, beta, float(rss[0]) / 23


def test_profile_of_a_parameter_is_students_interval_on_a_line(line):
    fitted, X, beta, variance = line
    error = np.sqrt(variance * np.linalg.inv(X.T @ X)[1, 1])
    half = stats.t.ppf(0.95, 23) * error
    found = profile(fitted, "alpha", 0.90)
    np.testing.assert_allclose(found.interval, [-beta[1] - half, -beta[1] + half], rtol=2e-4)


def test_profile_with_noise_is_the_prediction_interval_on_a_line(line):
    fitted, X, beta, variance = line
    row = np.array([1.0, np.log(1e11)])
    center = row @ beta
    half = stats.t.ppf(0.95, 23) * np.sqrt(variance * (1 + row @ np.linalg.inv(X.T @ X) @ row))

    def log_loss(p):
        return np.log(fitted.form.predict(p, num_params=1e11))

    found = profile(fitted, log_loss, 0.90, noise=np.sqrt(variance))
    np.testing.assert_allclose(found.interval, [center - half, center + half], rtol=1e-3)


def test_profile_is_a_constrained_minimum():
    """Each point against SciPy, minimising over the other four parameters with α held."""
    fitted = fit(from_table(data.scattered(40, noise=0.01)), "chinchilla", loss="squared")
    found = profile(fitted, "alpha")
    n, d = np.log(fitted.observations.columns["num_params"]), np.log(fitted.observations.columns["num_tokens"])
    y = np.log(fitted.observations.loss)
    scale = profiles.deviance_scale(fitted)
    for k in (4, 13, 20):
        alpha = found.grid[k]

        def residual(p, alpha=alpha):
            return np.log(p[0] + np.exp(p[1] - alpha * (n - 19)) + np.exp(p[2] - p[3] * (d - 24))) - y

        best = scipy.optimize.least_squares(residual, [1.7, -0.5, -1.0, 0.3], xtol=1e-14, ftol=1e-14, gtol=1e-14)
        assert found.deviance[k] == pytest.approx(2 * (best.cost - fitted.objective) / scale, rel=1e-5, abs=1e-6)


def test_interval_widens_with_its_level():
    fitted = fit(from_table(data.scattered(40, noise=0.01)), "chinchilla")
    narrow, wide = (profile(fitted, "beta", level) for level in (0.5, 0.95))
    assert wide.lower < narrow.lower < fitted.params["beta"] < narrow.upper < wide.upper


def test_words():
    fitted = fit(from_table(data.scattered(40, noise=0.01)), "chinchilla")
    assert profile(fitted, "alpha").describe("α").startswith("α: the data allow 0.")
    with pytest.raises(ValueError, match="it has E, A"):
        profile(fitted, "gamma")
