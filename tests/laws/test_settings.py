"""Laws of other columns than size and data: against their papers' optima, limits and fits, and through ``fit_law``."""

import numpy as np
import pytest

import scaling
from scaling.laws.fitting.estimate import fit
from scaling.laws.forms import catalogue, settings
from scaling.laws.tables.observations import Observations
from tests import published
from tests.laws.test_catalogue import TRUTH, observations

STEP_LAW = TRUTH["lr_batch_valley"]


@pytest.mark.parametrize(("n", "d"), [(6e7, 2e9), (1.07e9, 1e11)])
def test_the_valley_is_deepest_where_step_law_says(n, d):
    form = catalogue.get("lr_batch_valley")
    rates, batches = np.geomspace(1e-5, 1e-1, 4001), np.geomspace(1, 1e5, 4001)
    best_lr, best_batch = 1.782 * n**-0.713 * d**0.307, 0.573 * d**0.571 / 2048
    over_lr = form.predict(STEP_LAW, num_params=n, num_tokens=d, peak_lr=rates, batch_size=best_batch)
    over_batch = form.predict(STEP_LAW, num_params=n, num_tokens=d, peak_lr=best_lr, batch_size=batches)
    assert rates[np.argmin(over_lr)] == pytest.approx(best_lr, rel=3e-3)
    assert batches[np.argmin(over_batch)] == pytest.approx(best_batch, rel=3e-3)
    chinchilla = {k: STEP_LAW[k] for k in ("E", "A", "alpha", "B", "beta")}
    at_best = form.predict(STEP_LAW, num_params=n, num_tokens=d, peak_lr=best_lr, batch_size=best_batch)
    assert at_best == pytest.approx(
        catalogue.get("chinchilla").predict(chinchilla, num_params=n, num_tokens=d), rel=1e-12
    )


def test_rate_and_steps_balance_at_the_least_loss():
    """f F x^-f = g G x^g at the optimum over the rate."""
    p = TRUTH["lr_batch_steps"]
    n, d, batch = 2e8, 1e10, 256.0
    left, added = p["F"] * (d / batch) ** -p["f"] * n ** -p["p"], p["G"] * batch ** -p["h"] * n ** -p["q"]
    best = (p["f"] * left / (p["g"] * added)) ** (1 / (p["f"] + p["g"]))
    rates = np.geomspace(best / 30, best * 30, 3001)
    loss = catalogue.get("lr_batch_steps").predict(p, num_params=n, num_tokens=d, peak_lr=rates, batch_size=batch)
    assert rates[np.argmin(loss)] == pytest.approx(best, rel=3e-3)


def test_parallel_streams_of_one_are_no_streams_and_independent_ones_average():
    n = np.array([5e8, 4e9])
    plain = 1.29 + 195.0 * n**-0.3
    for name in ("parallel_streams", "parallel_average"):
        np.testing.assert_allclose(catalogue.get(name).predict(TRUTH[name], num_params=n, parallel_size=1), plain)
    independent = catalogue.get("parallel_average").predict(
        TRUTH["parallel_average"] | {"rho": 0.0}, num_params=n, parallel_size=8
    )
    np.testing.assert_allclose(independent - 1.29, (plain - 1.29) / 8)


@pytest.mark.parametrize(("corpus", "k"), [("pile", 0.33), ("stack", 0.39)])
def test_parallel_streams_as_published(corpus, k):
    """Chen et al. 2025, figure 2: k of their 24 runs a corpus, by Huber's loss with δ = 1e-3 of log losses."""
    table = published.table("design_parallel.csv").query("group == @corpus").drop(columns=["split", "cost", "group"])
    table = table.assign(num_tokens=42e9)
    fitted = scaling.fit_law(table, "parallel_streams", delta=1e-3)
    assert fitted.params["k"] == pytest.approx(k, abs=0.006)


def test_overfitting_law_is_chinchilla_without_overfitting_and_bounded_with_it():
    p = TRUTH["repeated_overfit"]
    columns = {"num_params": np.array([1e8, 1e10]), "num_tokens": np.array([1e10, 1e11]), "unique_tokens": 1e9}
    form = catalogue.get("repeated_overfit")
    plain = p["E"] + p["a"] * columns["num_params"] ** -p["alpha"] + p["b"] * columns["num_tokens"] ** -p["beta"]
    np.testing.assert_allclose(form.predict(p | {"c": 0.0, "L_0": 1e9}, **columns), plain, rtol=1e-6)
    np.testing.assert_allclose(form.predict(p | {"c": 1e12}, **columns), p["L_0"], rtol=1e-6)


def test_laws_of_rate_and_batch_fit_every_run_of_a_table():
    """A table's own names: ``batch`` is batch_size; runs that differ in these columns are no tries of one cell."""
    import pandas as pd

    data = observations("lr_batch_powers")
    form = catalogue.get("lr_batch_powers")
    loss = form.predict(TRUTH[form.name], **{c: data.columns[c] for c in form.columns})
    table = pd.DataFrame({c: data.columns[c] for c in form.columns} | {"loss": loss})
    fitted = scaling.fit_law(table.rename(columns={"batch_size": "batch"}), form.name)
    assert fitted.num_observations == len(table)
    assert fitted.params["g"] == pytest.approx(TRUTH[form.name]["g"], rel=1e-6)


def test_a_law_of_a_negative_quantity():
    import pandas as pd

    data = observations("vocabulary_effective")
    form = catalogue.get("vocabulary_effective")
    table = pd.DataFrame({c: data.columns[c] for c in form.columns} | {form.target: data.loss})
    assert (data.loss < 0).all()
    fitted = scaling.fit_law(table, form.name)
    assert fitted.params["E"] == pytest.approx(-5.5, rel=1e-6)
    with pytest.raises(ValueError, match="loss is"):  # only a law that says so may have one
        scaling.fit_law(
            table.rename(columns={form.target: "loss"}).assign(num_params=1e8, num_tokens=1e9), "chinchilla"
        )


@pytest.mark.parametrize("name", ["additive", "joint", "surface"])
def test_laws_of_any_columns_come_back(name):
    rng = np.random.default_rng(0)
    columns = {"width": 10 ** rng.uniform(1, 3, 60), "rank": 10 ** rng.uniform(0, 2, 60)}
    form = settings.any_columns({c: float(np.log(x).mean()) for c, x in columns.items()})[name]
    truth = {
        "additive": {"E": 1.0, "A0": 3.0, "a0": 0.4, "A1": 0.3, "a1": -0.2},
        "joint": {"E": 1.0, "A": 3.0, "a0": 0.4, "a1": -0.2},
        "surface": {"E": 1.0, "A": 0.5, "b0": -0.3, "b1": 0.1, "c00": 0.02, "c01": -0.03, "c11": 0.05},
    }[name]
    loss = form.predict(truth, **columns)
    rows = Observations(columns, loss, np.ones(60), np.arange(60).astype(str), np.full(60, np.nan))
    fitted = fit(rows, form)
    for parameter, value in truth.items():
        assert fitted.params[parameter] == pytest.approx(value, rel=1e-5)
