import numpy as np
import pytest

from scaling.laws.fitting.estimate import fit
from scaling.laws.intervals import resampling
from scaling.laws.tables.observations import from_table
from tests import counting
from tests.laws import data


@pytest.mark.slow
def test_epoch_bootstrap():
    """The published standard errors, by the published resampling; every replicate at its optimum."""
    fitted = fit(from_table(data.epoch()), "chinchilla", delta=1e-3)
    resample = np.random.RandomState(42)
    counts = np.stack([np.bincount(resample.choice(240, 240), minlength=240) for _ in range(4000)])
    draws = resampling.bootstrap(fitted, counts=counts)
    published = {"A": 124.52, "B": 1293.28, "E": 0.02566, "alpha": 0.01540, "beta": 0.02060}
    for name, value in published.items():
        assert np.std(draws.params[name]) == pytest.approx(value, rel=0.01)
    a = draws.params["beta"] / (draws.params["alpha"] + draws.params["beta"])
    np.testing.assert_allclose(resampling.interval(a), [0.4807, 0.5561], atol=5e-4)
    assert draws.converged == 1.0
    # 0.6 s on a quiet machine (scaling.bench --laws): some 11 calls a replicate, because many are fitted at once.
    assert counting.calls(lambda: resampling.bootstrap(fitted, counts=counts)) < 30 * len(counts)


def test_delta_method_agrees_with_ordinary_least_squares():
    # log L = log A - α log N is linear: the textbook covariance is the oracle.
    rng = np.random.default_rng(1)
    n = np.geomspace(1e6, 1e9, 25)
    table = data.pd.DataFrame(
        {"num_params": n, "num_tokens": 1e9, "loss": 50 * n**-0.1 * np.exp(0.01 * rng.normal(size=25))}
    )
    fitted = fit(from_table(table), "kaplan_n", loss="squared")
    X = np.stack([np.ones(25), np.log(n)], axis=1)
    beta, rss, *_ = np.linalg.lstsq(X, np.log(table["loss"]), rcond=None)
    error = np.sqrt((rss[0] / 23 * np.linalg.inv(X.T @ X))[1, 1])
    assert fitted.params["alpha"] == pytest.approx(-beta[1], rel=1e-9)
    assert np.sqrt(resampling.covariance(fitted)[1, 1]) == pytest.approx(error, rel=1e-8)
    _, lo, hi = resampling.delta_interval(fitted, lambda p: p["alpha"], 0.9)
    assert (hi - lo) / 2 == pytest.approx(1.7138715 * error, rel=1e-6)  # Student's t, 23 degrees of freedom


def test_clustered_bootstrap_draws_whole_runs():
    table = data.scattered(40, noise=0.01)
    table["run"] = np.repeat(np.arange(10), 4)
    observations = from_table(table)
    counts = resampling.resamples(len(observations), 50, clusters=observations.run).reshape(50, 10, 4)
    assert (counts == counts[:, :, :1]).all()
    assert (counts.sum(axis=(1, 2)) == 40).all()


def test_draws_are_reproducible():
    fitted = fit(from_table(data.scattered(noise=0.01)), "chinchilla")
    first, second = (resampling.bootstrap(fitted, 50, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.theta, second.theta)
