import numpy as np
import pandas as pd
import pytest

from scaling.laws.curves.as_published import fit_as_published
from scaling.laws.curves.forms import Curves, annealing_law, multi_power_law
from scaling.laws.fitting.coordinates import Coordinates, Model
from scaling.laws.fitting.estimate import fit
from tests import published

WARMUP, PEAK, FLOOR = 2160, 3e-4, 3e-5
LUO = {"L0": 3.04, "A": 0.525, "alpha": 0.508, "B": 363.788, "C": 2.066, "beta": 0.583, "gamma": 0.641}


def schedule(name: str, total: int) -> np.ndarray:
    """The rate of every step of a published curve, from its name."""
    t = np.arange(1, total + 1)
    kind, *numbers = name.split("_")
    numbers = [int(n) for n in numbers]
    rate = np.full(total, PEAK)
    if kind == "cosine":
        u = np.clip((t - WARMUP) / (numbers[0] - WARMUP), 0, 1)
        rate = FLOOR + 0.5 * (PEAK - FLOOR) * (1 + np.cos(np.pi * u))
    elif kind in ("wsd", "wsdld"):
        u = np.clip((t - numbers[0]) / (numbers[1] - numbers[0]), 0, 1)
        rate = PEAK * (FLOOR / PEAK) ** u if kind == "wsd" else PEAK + (FLOOR - PEAK) * u
    elif kind == "wsdcon":
        rate = np.where(t <= 8000, PEAK, numbers[0] * 1e-5)
    return np.where(t <= WARMUP, PEAK * t / WARMUP, rate)


def made_up(names=("constant_24000", "cosine_24000", "wsdcon_9"), blocks=200, every=1000) -> Curves:
    steps = np.arange(WARMUP, 20000, every)
    table = pd.DataFrame([{"run": n, "step": s, "loss": 3.0} for n in names for s in steps])
    return Curves(table, {n: schedule(n, 24000) for n in names}, blocks=blocks)


def with_losses(curves: Curves, form, params) -> Curves:
    curves.loss = form.predict(params, **{c: curves.columns[c] for c in form.columns})
    return curves


def test_multi_power_law_against_its_definition():
    curves = made_up(blocks=10**6)
    got = multi_power_law(curves).predict(LUO, point=curves.columns["point"], lr_sum=curves.lr_sum)
    p = LUO
    for i in (3, 25, 40):
        rates = schedule(curves.run[i], 24000)[: curves.step[i]]
        reduction = sum(
            (rates[k - 1] - rates[k]) * (1 - (p["C"] * rates[k] ** -p["gamma"] * rates[k:].sum() + 1) ** -p["beta"])
            for k in range(1, len(rates))
            if rates[k] != rates[k - 1]
        )
        want = p["L0"] + p["A"] * rates.sum() ** -p["alpha"] - p["B"] * reduction
        assert got[i] == pytest.approx(want, abs=1e-9)


def test_blocks_are_accurate():
    exact, coarse = (
        multi_power_law(c).predict(LUO, point=c.columns["point"], lr_sum=c.lr_sum)
        for c in (made_up(blocks=10**6), made_up(blocks=1000))
    )
    assert np.abs(exact - coarse).max() < 5e-5


def test_gradient_against_central_differences():
    curves = made_up(every=3000)
    form = multi_power_law(curves)
    columns = {c: curves.columns[c] for c in form.columns}
    model = Model(Coordinates(form, columns, curves.loss), columns)
    theta = model.coordinates.encode(LUO)[None]
    _, jacobian, _ = model.derivatives(theta)
    for j in range(theta.shape[1]):
        step = np.zeros(theta.shape[1])
        step[j] = 1e-6
        difference = (model.value(theta + step) - model.value(theta - step))[0] / 2e-6
        np.testing.assert_allclose(jacobian[0, j], difference, rtol=1e-6, atol=1e-9)


def test_multi_power_law_is_recovered():
    curves = made_up(every=2000, blocks=100)
    with_losses(curves, multi_power_law(curves), LUO)
    fitted = fit(curves.observations(), multi_power_law(curves), delta=1e-3)
    assert fitted.converged, fitted.reasons
    for name, value in LUO.items():
        assert fitted.params[name] == pytest.approx(value, rel=1e-6)


def test_annealing_law_is_recovered():
    truth = {"L0": 2.6, "A": 0.6, "alpha": 0.45, "C": 0.5}
    curves = made_up()
    with_losses(curves, annealing_law, truth)
    fitted = fit(curves.observations(), annealing_law, delta=1e-3)
    assert fitted.converged, fitted.reasons
    for name, value in truth.items():
        assert fitted.params[name] == pytest.approx(value, rel=1e-8)


def test_schedules_from_the_points_themselves():
    table = pd.DataFrame({"run": "a", "step": [1, 10, 20], "loss": 3.0, "learning_rate": [0.1, 1.0, 0.5]})
    curves = Curves(table)
    assert curves.lr_sum[1] == pytest.approx(np.linspace(0.1, 1.0, 10).sum())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.drop(columns="step"), "column step is missing"),
        (lambda t: t.assign(loss=0.0), "not a positive number"),
        (lambda t: t.assign(run="other"), "no schedule for run other"),
        (lambda t: t.assign(step=10), "schedule of 5 steps"),
    ],
)
def test_bad_curves_say_what_is_wrong(change, message):
    table = pd.DataFrame({"run": "a", "step": [1, 2], "loss": 3.0})
    with pytest.raises(ValueError, match=message):
        Curves(change(table), {"a": np.ones(5)})


# Luo et al. 2025: their fits' parameters to three digits, and mean absolute errors over test curves.
LUO_FITS = {
    25: (LUO, 0.00376),
    100: (dict(zip(LUO, (2.651, 0.601, 0.453, 437.946, 2.132, 0.598, 0.655))), 0.00435),
    400: (dict(zip(LUO, (2.375, 0.654, 0.429, 523.425, 2.025, 0.594, 0.635))), 0.00484),
}
LUO_R2 = {25: 0.9988, 100: 0.9983, 400: 0.9978}
# Tissue's law on the same split, as reference figures have it.
TISSUE_MAE = {25: 0.00456, 100: 0.00467, 400: 0.00646}


def split(size):
    table = published.table("mpl_lr_annealing_curves.csv").query("model_M == @size").rename(columns={"curve": "run"})
    schedules = {run: schedule(run, 80000) for run in table["run"].unique()}
    return [Curves(table[table["split"] == part], schedules, blocks=300) for part in ("train", "test")]


def mean_absolute_error(curves, form, params):
    error = np.abs(form.predict(params, **{c: curves.columns[c] for c in form.columns}) - curves.loss)
    return np.mean([error[curves.run == run].mean() for run in dict.fromkeys(curves.run)])


def huber(curves, form, params):
    r = np.abs(np.log(form.predict(params, **{c: curves.columns[c] for c in form.columns}) / curves.loss))
    return np.where(r < 1e-3, 0.5 * r**2, 1e-3 * (r - 5e-4)).sum()


# Parameters as the authors' code has them, to eight digits: L0, A, α, B.
LUO_EXACT = {
    25: (3.04045406, 0.52468604, 0.50786857, 363.78751622),
    100: (2.6514477, 0.60115152, 0.45295811, 437.9464276),
    400: (2.37474466, 0.65421216, 0.42878731, 523.42464371),
}


def their_schedule(name: str) -> np.ndarray:
    """The authors' own: step s has the rate of s + 1 updates, a warm-up from 0, decays that never reach the floor."""
    kind, *numbers = name.split("_")
    numbers = [int(n) for n in numbers]
    total = 16000 if kind == "wsdcon" else numbers[-1]
    step = np.arange(total)
    rate = np.full(total, PEAK)
    if kind == "cosine":
        rate = FLOOR + 0.5 * (PEAK - FLOOR) * (1 + np.cos(np.pi * (step - WARMUP) / (total - WARMUP)))
    elif kind in ("wsd", "wsdld"):
        u = np.clip((step - numbers[0]) / (total - numbers[0]), 0, 1)
        rate = PEAK ** (1 - u) * FLOOR**u if kind == "wsd" else PEAK * (1 - u) + FLOOR * u
    elif kind == "wsdcon":
        rate = np.where(step < 8000, PEAK, numbers[0] * 1e-5)
    rate[:WARMUP] = np.linspace(0, PEAK, WARMUP)
    return rate


def their_split(size):
    """Train and test curves as the authors count steps, and the schedules behind them."""
    table = published.table("mpl_lr_annealing_curves.csv").query("model_M == @size").rename(columns={"curve": "run"})
    schedules = {run: their_schedule(run) for run in table["run"].unique()}
    table = table.assign(step=table["step"] + 1)
    return *(Curves(table[table["split"] == part], schedules, blocks=300) for part in ("train", "test")), schedules


@pytest.mark.parametrize("size", LUO_FITS)
def test_published_multi_power_law_predicts_as_published(size):
    """Their parameters, through our form: their mean absolute error and R² over the test curves, to the last digit."""
    params = LUO_FITS[size][0] | dict(zip(LUO, LUO_EXACT[size]))
    _, test, _ = their_split(size)
    form = multi_power_law(test)
    assert mean_absolute_error(test, form, params) == pytest.approx(LUO_FITS[size][1], abs=6e-6)
    predicted = form.predict(params, **{c: test.columns[c] for c in form.columns})
    unexplained = [
        np.mean((predicted - test.loss)[rows] ** 2) / np.var(test.loss[rows])
        for rows in (test.run == run for run in dict.fromkeys(test.run))
    ]
    assert 1 - np.mean(unexplained) == pytest.approx(LUO_R2[size], abs=6e-5)


@pytest.mark.parametrize("size", LUO_FITS)
def test_annealing_law_on_published_curves(size):
    train, test = split(size)
    fitted = fit(train.observations(), annealing_law, delta=1e-3)
    assert fitted.converged, fitted.reasons
    assert mean_absolute_error(test, annealing_law, fitted.params) <= TISSUE_MAE[size] * 1.06


@pytest.mark.slow
@pytest.mark.parametrize("size", LUO_FITS)
def test_multi_power_law_on_published_curves(size):
    """The published fits are not optima of their own objective: the optimum has less than half of it.

    It predicts the sharp decays better and the longest cosine worse, so the published mean error over test curves
    is not reached; the figures are in the README.
    """
    train, test = split(size)
    form = multi_power_law(train)
    fitted = fit(train.observations(), form, delta=1e-3)
    assert fitted.objective < 0.6 * huber(train, form, LUO_FITS[size][0])
    assert mean_absolute_error(test, multi_power_law(test), fitted.params) < 1.35 * LUO_FITS[size][1]


@pytest.mark.slow
@pytest.mark.parametrize("size", LUO_FITS)
def test_the_published_procedure_gives_the_published_fit(size):
    """Their start, their hundred steps of AdamW: their parameters and their test errors."""
    train, test, schedules = their_split(size)
    rate = np.array([schedules[run][step - 1] for run, step in zip(train.run, train.step)])
    found = fit_as_published(train, rate)
    for name, value in zip(LUO, LUO_EXACT[size]):
        assert found.params[name] == pytest.approx(value, rel=2e-4)
    # B, of some hundreds, moved by less than its start's fortieth part: the simpler law's B is the published one.
    assert found.params["B"] == pytest.approx(found.start["B"], rel=0.045)
    assert found.steps < 120
    error = mean_absolute_error(test, multi_power_law(test), found.params)
    print(f"{size}M: {found.steps} steps, objective {found.objective:.4g}, mean absolute test error {error:.5f}")
    assert error == pytest.approx(LUO_FITS[size][1], abs=5e-5)
