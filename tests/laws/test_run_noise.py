"""Noise between repeats: pooled where they say no more, log-linear where they do; fits and bootstrap follow it."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

import scaling
from scaling.fit import main
from scaling.laws.analysis import analyse
from scaling.laws.fitting import run_noise
from scaling.laws.fitting.estimate import fit
from scaling.laws.intervals import diagnosis, resampling
from scaling.laws.tables.observations import from_table
from tests.laws import data


def rows(sizes=6, horizons=5, repeats=2, sigma=lambda n, d: 0.003, seed=0, every=1):
    """A grid of cells, every ``every``-th repeated, with noise of log loss σ(N, D)."""
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, sizes), np.geomspace(1e9, 1e11, horizons)))
    count = np.where(np.arange(len(n)) % every == 0, repeats, 1)
    n, d = np.repeat(n, count), np.repeat(d, count)
    exact = data.chinchilla(n, d)
    scale = np.broadcast_to(sigma(n, d), n.shape)
    loss = exact * np.exp(scale * np.random.default_rng(seed).normal(size=len(n)))
    return from_table(pd.DataFrame({"num_params": n, "num_tokens": d, "loss": loss}))


def test_one_repeated_cell_is_its_own_variance():
    """One cell has no slope to tell: σ is the textbook standard deviation of its log losses, whatever N and D."""
    observations = rows(repeats=4, every=1000)
    found = run_noise.measure(observations)
    expected = np.log(observations.loss[:4]).std(ddof=1)
    assert (found.num_cells, found.num_runs, found.dof) == (1, 4, 3)
    assert found.slopes == {}
    assert found.pooled == pytest.approx(expected, rel=1e-12)
    assert np.sqrt(found.variance({"num_params": 1e12, "num_tokens": 1.0})) == pytest.approx(expected, rel=1e-8)


def test_cells_that_agree_have_the_pooled_variance():
    """Every pair of repeats differs by as much: no slope, and σ² = Σ (n - 1) s² / Σ (n - 1)."""
    observations = rows(repeats=2)
    exact = data.chinchilla(observations.columns["num_params"], observations.columns["num_tokens"])
    sign = np.tile([1.0, -1.0], len(exact) // 2)
    found = run_noise.measure(replace(observations, loss=exact * np.exp(0.002 * sign)))
    assert found.pooled == pytest.approx(0.002 * np.sqrt(2), rel=1e-9)
    assert np.allclose(list(found.slopes.values()), 0, atol=1e-8)
    assert np.allclose(np.sqrt(found.variance(observations.columns)), found.pooled, rtol=1e-6)


def test_a_weight_is_a_precision_known_beforehand():
    """σ²/w for rows of weight w: twins of weight 4 that differ by half as much are as noisy; the unit of w is none."""
    observations = rows(repeats=2)
    even = np.repeat(np.arange(len(observations) // 2), 2) % 2 == 0
    exact = data.chinchilla(observations.columns["num_params"], observations.columns["num_tokens"])
    sign = np.tile([1.0, -1.0], len(exact) // 2) * np.where(even, 0.001, 0.002)
    weight = np.where(even, 4.0, 1.0)
    found = run_noise.measure(replace(observations, loss=exact * np.exp(sign), weight=weight))
    assert np.allclose(list(found.slopes.values()), 0, atol=1e-6)
    assert run_noise.measure(
        replace(observations, loss=exact * np.exp(sign), weight=100 * weight)
    ).pooled == pytest.approx(found.pooled)
    # At mean weight: .001² · 4 over the mean of the weights.
    assert found.pooled == pytest.approx(np.sqrt(2 * 0.002**2 / weight.mean()), rel=1e-9)


def test_the_mode_is_the_penalised_likelihood_of_a_gamma():
    """At one τ against SciPy's own gamma density and minimiser."""
    rng = np.random.default_rng(3)
    dof = rng.integers(1, 5, 40).astype(float)
    X = np.stack([np.ones(40), rng.normal(size=40), rng.normal(size=40)], axis=1)
    truth = np.array([-11.0, 0.8, -0.3])
    variance = np.exp(X @ truth) * rng.chisquare(dof) / dof

    def minus_log_posterior(beta):
        scale = 2 * np.exp(X @ beta) / dof
        return -stats.gamma.logpdf(variance, dof / 2, scale=scale).sum() - stats.norm.logpdf(beta[1:], 0, 0.7).sum()

    beta, covariance, _ = run_noise._mode(X, 1, variance, dof, 0.7, np.array([-10.0, 0.0, 0.0]))
    expected = optimize.minimize(minus_log_posterior, np.array([-10.0, 0.0, 0.0]), method="Nelder-Mead",
                                 options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 4000})  # fmt: skip
    assert np.allclose(beta, expected.x, atol=1e-6)
    assert np.all(np.abs(beta - truth) < 4 * np.sqrt(np.diagonal(covariance)))


def test_many_repeats_find_the_slopes():
    """σ ∝ N^-.25 D^-.1: log σ² has slopes -.5 and -.2, within their own standard deviations."""
    observations = rows(repeats=12, sigma=lambda n, d: 0.004 * (n / 1e8) ** -0.25 * (d / 1e10) ** -0.1)
    found = run_noise.measure(observations)
    assert found.dof == 330
    for column, slope in (("num_params", -0.5), ("num_tokens", -0.2)):
        assert abs(found.slopes[column] - slope) < 3 * found.slope_sd[column] < 0.3
    at = {"num_params": 1e8, "num_tokens": 1e10}
    assert np.sqrt(found.variance(at)) == pytest.approx(0.004, rel=0.1)
    edge, beyond = ({"num_params": n, "num_tokens": 1e10} for n in (1e9, 1e15))
    assert found.variance(edge) == found.variance(beyond)


def test_few_repeats_tend_to_one_sigma():
    """Over 30 tables with constant noise and four twins σ stays near one number; the raw cells' scatter fifty-fold."""
    apart, raw = [], []
    for seed in range(30):
        observations = rows(every=8, seed=seed)
        told = run_noise.measure(observations).to_json(observations)
        apart.append(told["sigma"][1] / told["sigma"][0])
        cell = run_noise.cells_of(observations)
        twins = [np.log(observations.loss[cell == j]).std() for j in np.flatnonzero(np.bincount(cell) > 1)]
        raw.append(max(twins) / min(twins))
    assert np.median(apart) < 1.6 < 3 < np.median(raw)


def test_residuals_tell_of_slopes_and_not_of_the_level():
    """Where the law misses by more than repeats scatter, σ stays that of the repeats."""
    observations = rows(repeats=3, every=3, sigma=lambda n, d: 0.001, seed=1)
    cell = run_noise.cells_of(observations)
    missed = np.exp(0.01 * np.random.default_rng(2).normal(size=cell.max() + 1))[cell]
    observations = replace(observations, loss=observations.loss * missed)
    found = run_noise.measure(observations, fit(observations, "chinchilla"))
    assert found.pooled == pytest.approx(0.001, rel=0.5)
    assert found.to_json(observations)["sigma"][1] < 0.003


def test_measured_noise_is_least_squares_by_its_weights():
    """A log-linear law: (XᵀWX)⁻¹XᵀWy with W = 1/σ² of the measured σ."""
    n = np.repeat(np.geomspace(1e6, 1e9, 12), 3)
    rng = np.random.default_rng(4)
    loss = 30.0 * n**-0.1 * np.exp(0.01 * (n / 1e8) ** -0.3 * rng.normal(size=len(n)))
    table = pd.DataFrame({"num_params": n, "num_tokens": 20 * n, "loss": loss})
    observations = from_table(table)
    measured, said = run_noise.asked("measured", observations, [], {})
    fitted = fit(observations, "kaplan_n", loss="squared", variance=measured.variance)
    w = 1 / measured.variance(observations.columns)
    X = np.stack([np.ones_like(n), -np.log(n)], axis=1)
    beta = np.linalg.solve((X.T * w) @ X, X.T @ (w * np.log(loss)))
    assert fitted.params["alpha"] == pytest.approx(beta[1], rel=1e-7)
    assert "12 repeated cells, 36 runs (24 degrees of freedom)" in said[0]
    assert max(w) / min(w) > 10


def test_fits_at_constant_are_what_they_were():
    observations = rows(every=3)
    table = pd.DataFrame({**observations.columns, "loss": observations.loss})
    plain, constant = scaling.fit_law(table), scaling.fit_law(table, noise="constant")
    assert np.array_equal(plain.theta, constant.theta)
    assert plain.spread is None
    measured = scaling.fit_law(table, noise="measured")
    assert measured.spread is not None
    assert not np.array_equal(plain.theta, measured.theta)
    with pytest.raises(ValueError, match="noise is 'equal': write one of constant, measured"):
        scaling.fit_law(table, noise="equal")


def test_without_repeats_noise_is_constant_and_that_is_said():
    observations = rows(every=1000, repeats=1)
    table = pd.DataFrame({**observations.columns, "loss": observations.loss})
    plain, asked = (analyse(table, laws=["chinchilla"], bootstrap=0, noise=n) for n in ("constant", "measured"))
    assert asked.run_noise is None
    assert np.array_equal(plain.fits["chinchilla"].theta, asked.fits["chinchilla"].theta)
    assert any("no cell is repeated" in w for w in asked.warnings)
    copies = pd.concat([table, table])
    assert run_noise.measure(from_table(copies)) is None


def test_repeats_of_a_cell_are_drawn_as_one():
    """Of each resample, all rows of a cell are there equally often."""
    observations = rows(every=3)
    fitted = fit(observations, "chinchilla")
    noise = diagnosis.Noise(cells=run_noise.cells_of(observations))
    told = diagnosis.diagnose(fitted)
    assert told.groups is not None or np.array_equal(told.cells, noise.cells)
    expected = resampling.bootstrap(fitted, 20, clusters=noise.cells)
    assert np.array_equal(diagnosis.resample(fitted, noise, 20).theta, expected.theta)
    assert told.to_json()["num_clusters"] == 30


def test_groups_have_noise_of_their_own():
    """Twins of the second group are four times as noisy: the comparison weighs its rows less, and says so."""
    quiet, loud = rows(repeats=3, seed=5), rows(repeats=3, seed=6, sigma=lambda n, d: 0.012)
    parts = [
        pd.DataFrame({c: o.columns[c] for c in ("num_params", "num_tokens")} | {"loss": o.loss, "kind": name})
        for name, o in (("quiet", quiet), ("loud", loud))
    ]
    found = scaling.compare(pd.concat(parts), "kind", noise="measured", bootstrap=0)
    sigma = np.sqrt(found.run_noise.variance(found.joint.observations.columns))
    assert sigma[-1] / sigma[0] == pytest.approx(4, rel=0.35)
    assert any("run-to-run noise measured" in w for w in found.warnings)
    assert not found.sharing.rejected


def test_the_unit_of_a_groups_noise_has_no_part_in_the_test_of_shared_exponents():
    """Two groups alike: the laws apart in their own unit of noise are put back on the joint fit's."""
    parts = []
    for name, o in (("a", rows(repeats=2, seed=7)), ("b", rows(repeats=2, seed=8))):
        parts.append(
            pd.DataFrame({c: o.columns[c] for c in ("num_params", "num_tokens")} | {"loss": o.loss, "kind": name})
        )
    table = pd.concat(parts)
    options = {"bootstrap": 0, "loss": "squared"}
    constant = scaling.compare(table, "kind", **options)
    measured = scaling.compare(table, "kind", noise="measured", **options)
    assert measured.sharing.statistic == pytest.approx(constant.sharing.statistic, abs=0.5)


def test_the_command_says_what_was_measured(tmp_path, capsys):
    observations = rows(every=2)
    table = pd.DataFrame({**observations.columns, "loss": observations.loss})
    table.to_csv(tmp_path / "runs.csv")
    given = [str(tmp_path / "runs.csv"), "--law", "chinchilla", "--no-figures", "--bootstrap", "50", "--one-law"]
    assert main([*given, "--noise", "measured"]) == 0
    assert "run-to-run noise measured from 15 repeated cells, 30 runs" in capsys.readouterr().out
    told = json.loads((tmp_path / "fit.json").read_text())["run_noise"]
    assert told["num_cells"] == 15
    assert told["sigma"][0] <= told["pooled"] * 1.5
    assert main([*given, "--noise", "some"]) == 2
    assert "noise is 'some': write one of constant, measured" in capsys.readouterr().err
