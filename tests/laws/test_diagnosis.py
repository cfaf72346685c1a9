"""What rows share: labels that are runs and labels that are not, what weights mean, and what the residuals say."""

import numpy as np
import pandas as pd
import pytest

from scaling.bench import coverage
from scaling.laws.analysis import analyse
from scaling.laws.answers import coverage as simulation
from scaling.laws.fitting.estimate import fit
from scaling.laws.forms import catalogue
from scaling.laws.intervals import diagnosis, resampling
from scaling.laws.tables.observations import from_table
from tests.laws import data

OPTIONS = {"laws": ("chinchilla",), "combined": False, "bootstrap": 60}


def grid(sizes=5, horizons=5, noise=0.003, seed=0) -> pd.DataFrame:
    """Every size at every horizon."""
    rng = np.random.default_rng(seed)
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(2e7, 2e9, sizes), np.geomspace(4e8, 4e10, horizons)))
    loss = data.chinchilla(n, d) * np.exp(noise * rng.normal(size=n.size))
    return pd.DataFrame({"num_params": n, "num_tokens": d, "loss": loss})


def same(one, other, where=""):
    """Asserts that two JSON values are one, numbers to seven digits."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other)):
            same(*pair, f"{where}[{i}]")
    elif isinstance(one, float) and "objective" not in where and "cosine" not in where:
        assert one == pytest.approx(other, rel=1e-6, abs=1e-9), where
    elif not isinstance(one, float):
        assert one == other, where


@pytest.mark.parametrize("bootstrap", [0, 40])
def test_the_unit_of_weights_moves_nothing(bootstrap):
    """w → 100 w: delta method, profiles, bootstrap, prediction intervals, allocation, approach 2."""
    table = data.isoflop(budgets=(1e18, 1e19, 1e20, 1e21), sizes=6, noise=0.003)
    table["weight"] = np.random.default_rng(1).uniform(0.5, 2.0, len(table))
    options = OPTIONS | {"bootstrap": bootstrap, "holdout_flops": 3e20}
    one = analyse(table, **options).to_json()
    assert one["forecast"]
    assert one["isoflop"]["a_interval"] or not bootstrap
    same(one, analyse(table.assign(weight=100 * table["weight"]), **options).to_json())


def test_a_weight_is_a_precision():
    """Weighted least squares in closed form: s² (XᵀWX)⁻¹ with s² = Σ w r² / (n - P)."""
    rng = np.random.default_rng(5)
    n = np.geomspace(1e6, 1e9, 25)
    w = rng.uniform(0.1, 10.0, n.size)
    loss = 20 * n**-0.1 * np.exp(0.01 * rng.normal(size=n.size) / np.sqrt(w))
    fitted = fit(from_table(pd.DataFrame({"N": n, "D": 20 * n, "loss": loss, "weight": w})), "kaplan_n", loss="squared")
    X = np.stack([np.ones(n.size), np.log(n)], axis=1)
    inverse = np.linalg.inv(X.T @ (w[:, None] * X))
    beta = inverse @ X.T @ (w * np.log(loss))
    s2 = (w * (np.log(loss) - X @ beta) ** 2).sum() / (n.size - 2)
    value, lower, upper = resampling.delta_interval(fitted, lambda p: np.log(fitted.form.predict(
        {k: v[:, None] for k, v in p.items()}, num_params=np.array([1e6, 1e9]))), 0.9)  # fmt: skip
    ends = np.stack([np.ones(2), np.log([1e6, 1e9])], axis=1)
    half = 1.7138715 * np.sqrt(s2 * np.einsum("ip,pq,iq->i", ends, inverse, ends))  # Student's t, 23 degrees
    np.testing.assert_allclose(value, ends @ beta, rtol=1e-8)
    np.testing.assert_allclose((upper - lower) / 2, half, rtol=1e-6)


LABELS = {
    "project": lambda t: ["gpt"] * len(t),
    "size": lambda t: [f"{n / 1e6:.0f}M" for n in t["num_params"]],
    "repeat": lambda t: [i % 3 for i in range(len(t))],
}


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("column", ["name", "run", "run_name"])
def test_a_label_that_is_no_run_moves_nothing(label, column):
    """The same table without the column is the oracle; the column and its count are named."""
    table = grid()
    labelled = analyse(table.assign(**{column: LABELS[label](table)}), **OPTIONS)
    bare = analyse(table, **OPTIONS)
    assert labelled.to_json()["laws"] == bare.to_json()["laws"]
    assert labelled.to_json()["allocation"] == bare.to_json()["allocation"]
    count = {"project": 1, "size": 5, "repeat": 3}[label]
    assert [w for w in labelled.warnings if w.startswith(f"column {column} has {count} value")]


def test_ten_runs_make_clusters_with_t_of_nine_degrees():
    table = grid(10, 4)
    labels = [f"{n:.4g}" for n in table["num_params"]]
    few = table[table["num_params"] < table["num_params"].max() * 0.999]
    for rows, clusters in ((table, 10), (few, 9)):
        found = analyse(rows.assign(run=[labels[i] for i in rows.index]), **OPTIONS)
        law = found.to_json()["laws"]["chinchilla"]
        said = " ".join(found.warnings)
        assert f"{clusters} values in {len(rows)} rows" in said
        assert (law["interval_method"] == "bootstrap by run") == (clusters >= 10), said
        if clusters >= 10:
            assert law["noise"]["num_clusters"] == 10


def test_wild_draws_are_the_jackknife_of_clusters_and_students_t():
    """Of a linear fit: deletion of each cluster, refitted by lstsq, gives the covariance; G - 1 degrees the tails."""
    rng = np.random.default_rng(2)
    n = np.geomspace(1e6, 1e9, 24)
    groups = np.repeat(np.arange(6), 4)
    loss = 20 * n**-0.1 * np.exp(0.01 * rng.normal(size=6)[groups] + 0.002 * rng.normal(size=24))
    fitted = fit(from_table(pd.DataFrame({"N": n, "D": 20 * n, "loss": loss})), "kaplan_n", loss="squared")
    X = np.stack([np.ones(24), np.log(n)], axis=1)
    whole = np.linalg.lstsq(X, np.log(loss), rcond=None)[0][1]
    left = [np.linalg.lstsq(X[groups != g], np.log(loss)[groups != g], rcond=None)[0][1] for g in range(6)]
    error = np.sqrt(5 / 6 * np.sum((np.array(left) - whole) ** 2))
    draws = resampling.wild(fitted, groups, 50_000, seed=1)
    slope = np.log(
        fitted.form.predict({k: v[:, None] for k, v in draws.params.items()}, num_params=np.array([1.0, np.e]))
    )
    ends = np.quantile(slope[:, 1] - slope[:, 0], [0.05, 0.95])
    np.testing.assert_allclose(ends, whole + np.array([-1, 1]) * 2.0150484 * error, atol=0.03 * error)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_draws_of_uneven_noise_scatter_as_the_estimate_does(loss):
    """σ ∝ L⁴ over a ladder whose few small runs are the noisy ones: the estimates' own scatter is the oracle."""
    n = np.geomspace(1e6, 1e9, 40)
    exact = 20 * n**-0.1
    sigma = 0.02 * (exact / exact.max()) ** 4
    rng = np.random.default_rng(4)
    found, scale, inside = [], [], []
    for seed in range(400):
        table = pd.DataFrame({"N": n, "D": 20 * n, "loss": exact * np.exp(sigma * rng.normal(size=40))})
        fitted = fit(from_table(table), "kaplan_n", loss=loss)
        alpha = resampling.uneven(fitted, 400, seed=seed).params["alpha"]
        found.append(fitted.params["alpha"])
        scale.append(np.std(alpha))
        lo, hi = resampling.interval(alpha, 0.9)
        inside.append(lo <= 0.1 <= hi)
    assert np.sqrt(np.mean(np.square(scale))) == pytest.approx(np.std(found), rel=0.12)
    assert 0.86 <= np.mean(inside) <= 0.94


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["squared", "huber", "lad", "tukey"])
def test_without_refits_laws_move_as_far_as_with_them(loss):
    """Independent rows of one scale: three ways to draw, whose scatter of α is one."""
    fitted = fit(from_table(data.scattered(80, noise=0.01, seed=3)), loss=loss)
    every_row = np.arange(80)
    draws = (
        resampling.bootstrap(fitted, 400),
        resampling.wild(fitted, every_row, 400),
        resampling.uneven(fitted, 400),
    )
    scatter = [np.std(drawn.params["alpha"]) for drawn in draws]
    assert max(scatter) < 1.3 * min(scatter), scatter


def shared(table, labels, scale, seed):
    """The table's losses with an error for each label added."""
    codes = np.unique(labels, return_inverse=True)[1]
    errors = np.random.default_rng(seed).normal(size=codes.max() + 1)
    return table.assign(loss=table["loss"] * np.exp(scale * errors[codes]))


def test_residuals_name_what_they_share():
    plain = grid(8, 8, noise=0.002)
    cases = {
        "independent": plain,
        "num_params": shared(plain, plain["num_params"], 0.006, 1),
        "cell": shared(pd.concat([plain] * 3, ignore_index=True), np.tile(np.arange(64), 3), 0.006, 2),
    }
    cases["cell"]["loss"] *= np.exp(0.001 * np.random.default_rng(3).normal(size=192))
    level = plain["loss"] / plain["loss"].mean()
    cases["uneven"] = plain.assign(loss=data.chinchilla(plain["num_params"], plain["num_tokens"]) * np.exp(
        0.003 * level**4 * np.random.default_rng(4).normal(size=64)))  # fmt: skip
    budgets = data.isoflop(budgets=np.geomspace(1e18, 1e21, 8), sizes=8, noise=0.002)
    cases["budget"] = shared(budgets, budgets["flops"], 0.006, 5)
    for kind, table in cases.items():
        found = diagnosis.diagnose(fit(from_table(table), "chinchilla"))
        assert found.kind == kind, (kind, found)


def test_the_terminal_page_and_json_say_which_and_why():
    table = shared(grid(8, 6, noise=0.001), np.repeat(np.arange(8), 6), 0.0, 0)
    table = shared(table, table["num_params"], 0.006, 1)
    found = analyse(table, **OPTIONS)
    law = found.to_json()["laws"]["chinchilla"]
    assert law["interval_method"] == "bootstrap by num_params"
    assert law["noise"]["kind"] == "num_params"
    assert law["noise"]["num_clusters"] == 8
    assert any("residuals of one num_params go together" in w and "8 clusters" in w for w in found.warnings)


def test_drawn_errors_are_shared_as_named():
    """The law divided out, errors of one group correlate by .8, and their scale grows as L⁴."""
    design, form = coverage.designs()["5 budgets × 8 sizes"], catalogue.FORMS["chinchilla"]
    rng = np.random.default_rng(0)
    for kind in simulation.NOISES:
        drawn = [simulation.synthetic(design, form, data.HOFFMANN, 0.01, rng, kind=kind) for _ in range(1500)]
        columns = {c: drawn[0].columns[c] for c in form.columns}
        exact = form.predict(data.HOFFMANN, **columns)
        errors = np.log(np.stack([d.loss for d in drawn]) / exact)
        assert np.mean(errors**2) == pytest.approx(1e-4, rel=0.03)
        correlation = np.corrcoef(errors.T)
        keys = {"sizes": columns["num_params"], "budgets": np.round(np.log(drawn[0].columns["flops"]), 6),
                "seeds": np.arange(len(exact)) // 3}.get(kind, np.arange(len(exact)))  # fmt: skip
        expected = np.where(keys[:, None] == keys, 0.8, 0.0)
        np.fill_diagonal(expected, 1.0)
        np.testing.assert_allclose(correlation, expected, atol=0.13)
        growth = np.polyfit(np.log(exact), np.log(errors.std(axis=0)), 1)[0]
        rise = {"loss": 4.0, "fivefold": np.log(5) / np.ptp(np.log(exact))}
        assert growth == pytest.approx(rise.get(kind, 0.0), abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loss", "sizes", "seeds"])
def test_coverage_under_noise_that_exists(kind):
    """Nominal 90 %, of a and N*, chosen by the residuals: 85 % or more less the scatter of 60 draws (4.6 %)."""
    design = coverage.designs()["8 sizes × 5 horizons"]
    found = simulation.coverage(
        design, catalogue.FORMS["chinchilla"], data.HOFFMANN, noise=coverage.NOISE, kind=kind, num_draws=60,
        flops=10 * design.columns["flops"].max(), methods=(simulation.CHOSEN,),
    )  # fmt: skip
    for quantity in ("a", "num_params"):
        assert found[simulation.CHOSEN][quantity]["coverage"] >= 0.80, (kind, quantity)


def test_draws_by_steps_stay_on_a_curved_law():
    """Of powers that join, whose parameters lie along bent ridges: rows of .7 % noise in all are predicted to 2 %,
    about the fit itself. Straight steps predict them to 16 %."""
    law = {"E": 0.0, "A": 7.3, "alpha": 0.17, "B": 15.7, "beta": 0.177, "gamma": 0.41}
    n, c = (x.ravel() for x in np.meshgrid(np.geomspace(2e3, 2e5, 8), np.geomspace(3e10, 2.4e12, 6), indexing="ij"))
    rng = np.random.default_rng(3)
    loss = catalogue.FORMS["joined"].predict(law, num_params=n, num_tokens=c / (6 * n))
    loss = loss * np.exp(0.004 * rng.normal(size=8)[np.repeat(np.arange(8), 6)] + 0.006 * rng.normal(size=48))
    fitted = fit(from_table(pd.DataFrame({"N": n, "D": c / (6 * n), "loss": loss})), "joined")
    draws = resampling.wild(fitted, np.repeat(np.arange(8), 6), 2000)
    said = np.log(fitted.form.predict({k: v[:, None] for k, v in draws.params.items()}, num_params=n,
                                      num_tokens=c / (6 * n)))  # fmt: skip
    at = np.log(fitted.form.predict(fitted.params, num_params=n, num_tokens=c / (6 * n)))
    low, middle, high = np.quantile(said, [0.05, 0.5, 0.95], axis=0)
    half = np.median(0.5 * (high - low))
    assert half < 0.02
    assert np.abs(middle - at).max() < 0.5 * half
