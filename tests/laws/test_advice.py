"""Advice against closed forms and published figures."""

import dataclasses
import math

import numpy as np
import pytest

from scaling.fit import analyse
from scaling.laws.answers import allocation
from scaling.laws.answers.advice import basis, machines, questions
from scaling.laws.answers.advice.budget import Budget
from scaling.laws.answers.allocation import Cost
from scaling.laws.answers.at_best import LawAtBest
from scaling.laws.forms import catalogue
from tests.laws import data

# Of Hoffmann et al. 2022, to the digits that Sardana et al. 2024 use: those in the paper's own source (de Vries 2023).
SARDANA = {"E": 1.69, "A": 406.4, "alpha": 0.336, "B": 410.7, "beta": 0.283}


@pytest.fixture(scope="module")
def found():
    """Runs of a law without noise to speak of, with draws."""
    return analyse(data.scattered(30, noise=0.003), laws=("chinchilla",), bootstrap=60, combined=True)


@pytest.fixture(scope="module")
def exact():
    """Runs of Sardana et al.'s law itself, fitted without draws: its parameters are put in their place."""
    table = data.scattered(30, params=SARDANA)
    made = analyse(table, laws=("chinchilla",), bootstrap=0, combined=False)
    fitted = dataclasses.replace(made.fits["chinchilla"], params=SARDANA)
    return dataclasses.replace(made, fits={"chinchilla": fitted})


def closed_size(C, p):
    """Hoffmann et al. 2022, eq. 4."""
    G = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    return G * (C / 6) ** (p["beta"] / (p["alpha"] + p["beta"]))


@pytest.mark.parametrize("flops", [1e19, 1e21, 1e23])
def test_a_budget_is_allocated_as_allocation_has_it(found, flops):
    answer = questions.of_budget(found, Budget.of_flops(flops))
    form, params = found.fits["chinchilla"].form, found.fits["chinchilla"].params
    best = allocation.optimal_num_params(form, params, np.array([flops]), found.cost)[0]
    assert answer.numbers["num_params"].value == pytest.approx(best, rel=1e-10)
    assert answer.numbers["num_params"].value == pytest.approx(closed_size(flops, params), rel=1e-10)
    assert answer.numbers["num_tokens"].value == pytest.approx(flops / 6 / best, rel=1e-10)


def test_the_flat_region_ends_where_the_loss_is_that_much_worse(found):
    answer, p = questions.of_budget(found, Budget.of_flops(1e21)), found.fits["chinchilla"].params
    least = data.chinchilla(closed_size(1e21, p), 1e21 / 6 / closed_size(1e21, p), p)
    for share in questions.FLAT:
        for word in ("least", "most"):
            n = answer.numbers[f"num_params within {100 * share:g} % of the best loss, {word}"].value
            assert data.chinchilla(n, 1e21 / 6 / n, p) == pytest.approx(least * (1 + share), rel=1e-9)
            assert (n < answer.numbers["num_params"].value) == (word == "least")


@pytest.mark.parametrize("k", [0.3, 0.5, 0.8, 2.0, 3.0])
def test_compute_overhead_of_another_size_is_the_closed_form(k):
    """k_D = (1 - (k_N^-α - 1) (A/B) G^(-α-β))^(-1/β), and the overhead k_N k_D (de Vries 2023)."""
    p = SARDANA
    law = LawAtBest(catalogue.FORMS["chinchilla"], {n: np.array([v]) for n, v in p.items()}, Cost())
    G = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    tokens = (1 - (k ** -p["alpha"] - 1) * p["A"] / p["B"] * G ** (-p["alpha"] - p["beta"])) ** (-1 / p["beta"])
    assert questions.overhead(law, Budget.of_flops(1e21), k)[0] == pytest.approx(k * tokens, rel=1e-10)


def test_a_loss_costs_the_budget_that_gives_it_and_none_below_the_floor(found):
    p = found.fits["chinchilla"].params
    n = closed_size(1e21, p)
    answer = questions.of_loss(found, float(data.chinchilla(n, 1e21 / 6 / n, p)))
    assert answer.numbers["flops"].value == pytest.approx(1e21, rel=1e-8)
    assert answer.numbers["num_params"].value == pytest.approx(n, rel=1e-8)
    unreached = questions.of_loss(found, p["E"] - 0.1)
    assert "cannot be reached" in unreached.notes[0]
    assert set(unreached.numbers) == {"E"}
    near = questions.of_loss(found, p["E"] * 1.0001)
    assert "perhaps out of reach" in near.notes[-1]


def test_size_and_data_are_two_sides_of_one_optimum(found):
    p = found.fits["chinchilla"].params
    tokens = questions.of_num_params(found, 1e9).numbers["num_tokens"].value
    # α A N^-α = β B D^-β
    closed = (p["beta"] * p["B"] / (p["alpha"] * p["A"]) * 1e9 ** p["alpha"]) ** (1 / p["beta"])
    assert tokens == pytest.approx(closed, rel=1e-9)
    assert questions.of_data(found, tokens).numbers["num_params"].value == pytest.approx(1e9, rel=1e-9)


def test_sardana_figure_1(exact):
    """13B quality and 2T inference tokens: a 7B trained longer saves 1.7e22 FLOPs, 17 % (2401.00448, figure 1)."""
    answer = machines.of_inference(exact, 2e12, num_params=13e9)
    before = answer.numbers["compute-optimal model's lifetime cost"].value
    law = basis.Basis(exact).best
    at = basis.log_flops_where(law, 13e9, 50.0, of_size=True)
    of_7b = np.exp(law.log_paid_at_size(law.loss(at), np.log([7e9])))[0, 0] + 2 * 7e9 * 2e12
    assert (before - of_7b) == pytest.approx(1.7e22, abs=0.05e22)
    assert 1 - of_7b / before == pytest.approx(0.17, abs=0.005)
    # The least of all is no more than that of 7B, and is where a fine grid has it.
    sizes = np.geomspace(1e9, 13e9, 20001)
    cost = np.exp(law.log_paid_at_size(law.loss(at), np.log(sizes)[None]))[0] + 2 * sizes * 2e12
    assert answer.numbers["lifetime cost"].value == pytest.approx(cost.min(), rel=1e-7)
    assert answer.numbers["num_params"].value == pytest.approx(sizes[cost.argmin()], rel=1e-3)


def test_without_inference_the_compute_optimal_model_is_the_cheapest(found):
    answer = machines.of_inference(found, 1.0, budget=Budget.of_flops(1e21))
    best = closed_size(1e21, found.fits["chinchilla"].params)
    assert answer.numbers["num_params"].value == pytest.approx(best, rel=1e-5)
    dear = machines.Prices(decoding=lambda n: np.full_like(n, 50.0), unit="dollars")
    costly = machines.of_inference(found, 1e10, budget=Budget.of_flops(1e21), prices=dear).numbers["num_params"].value
    assert costly < machines.of_inference(found, 1e10, budget=Budget.of_flops(1e21)).numbers["num_params"].value < best


def test_scarce_devices_tend_to_the_compute_optimal_answer(found):
    p, errors = found.fits["chinchilla"].params, []
    for devices in (64.0, 8.0, 1.0):
        cluster = machines.Cluster(devices, lambda n: np.full_like(n, 4e14), device_batch=2048.0)
        seconds = 1e21 / 4e14 / devices  # the same compute each time
        answer = machines.of_deadline(found, seconds, cluster, critical_batch=1e6)
        assert answer.numbers["flops"].value == pytest.approx(1e21, rel=1e-9)
        n = closed_size(1e21, p)
        errors.append(answer.numbers["loss"].value / data.chinchilla(n, 1e21 / 6 / n, p) - 1)
        # S B = S_min B_crit (1 + B/B_crit)
        read, worth = answer.numbers["num_tokens"].value, answer.numbers["tokens they are worth"].value
        assert read / worth == pytest.approx(1 + devices * 2048 / 1e6, rel=1e-9)
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.1)
    assert 0 < errors[2] < 3e-4


@pytest.mark.parametrize("devices", [64, 244.140625, 1000])
def test_a_batch_is_charged_for_beside_those_of_the_fitted_runs(devices):
    """Runs of L(N, D/(1 + B/B_crit)) at half of B_crit: at their batch the law itself, at another the truth."""
    critical, own = 1e6, 0.5
    table = data.scattered(30)
    read = table["num_tokens"] * (1 + own)
    runs = table.assign(num_tokens=read, flops=6 * table["num_params"] * read, batch_tokens=own * critical)
    found = analyse(runs, laws=("chinchilla",), bootstrap=0, combined=False)
    cluster = machines.Cluster(devices, lambda n: np.full_like(n, 4e14), device_batch=2048.0)
    numbers = machines.of_deadline(found, 1e21 / 4e14 / devices, cluster, critical_batch=critical).numbers
    n, d, batch = (numbers[name].value for name in ("num_params", "num_tokens", "batch"))
    truth = data.chinchilla(n, d / (1 + batch / critical), data.HOFFMANN)
    assert numbers["loss"].value == pytest.approx(truth, rel=1e-6)
    around = n * np.exp(np.linspace(-0.5, 0.5, 101))
    by_truth = data.chinchilla(around, 1e21 / 6 / around / (1 + batch / critical), data.HOFFMANN)
    assert around[by_truth.argmin()] == pytest.approx(n, rel=0.011)


def test_money_buys_the_quality_that_serving_is_asked_for(found):
    """One token served costs nothing: the cheapest model is the one that the time alone is best for."""

    def rate(n):
        return 1e14 * (n / 1e9) ** 0.2

    def price(n):
        return 1 / rate(n)

    budget, prices = Budget.of_time(1e7, rate, ""), machines.Prices(price, price, price)
    numbers = machines.of_inference(found, 1.0, budget=budget, prices=prices).numbers
    assert numbers["lifetime cost"].value == pytest.approx(1e7, rel=1e-6)
    assert numbers["its share saved"].value == pytest.approx(0, abs=1e-4)


def test_a_loss_out_of_reach_is_served_by_no_model(found):
    answer = machines.of_inference(found, 1e12, loss=found.fits["chinchilla"].params["E"] - 0.1)
    assert answer.numbers == {}
    assert "cannot be reached" in answer.notes[0]


def test_a_loss_above_the_ceiling_asks_for_nothing():
    """Of a law whose ceiling its runs tell: any run has such a loss. Just below it there is an answer."""
    runs = data.isoflop(budgets=np.geomspace(1e15, 1e18, 5), sizes=6)
    truth = data.HOFFMANN | {"L_0": 5.0}
    loss = catalogue.FORMS["saturating"].predict(truth, num_params=runs["num_params"], num_tokens=runs["num_tokens"])
    noise = np.exp(0.003 * np.random.default_rng(0).normal(size=len(runs)))
    below = analyse(runs.assign(loss=loss * noise), laws=("saturating",), bootstrap=60, combined=False)
    ceiling = below.fits["saturating"].params["L_0"]
    assert ceiling == pytest.approx(5.0, rel=0.05)
    answer = questions.of_loss(below, ceiling + 0.1)
    assert "any run reaches a loss of" in answer.notes[0]
    assert "draws have E" not in answer.notes[0]
    assert set(answer.numbers) == {"E"}
    assert "any run reaches a loss of" in machines.of_inference(below, 1e12, loss=ceiling + 0.1).notes[0]
    near = questions.of_loss(below, ceiling * 0.9999).numbers
    assert all(math.isfinite(near[name].value) for name in ("flops", "num_params", "num_tokens"))


def test_a_doubling_is_worth_what_the_law_says(found):
    p, n = found.fits["chinchilla"].params, closed_size(1e21, found.fits["chinchilla"].params)
    d = 1e21 / 6 / n
    answer = questions.value(found, 1e21)
    at = data.chinchilla(n, d, p)
    assert answer.numbers["loss less by twice N"].value == pytest.approx(at - data.chinchilla(2 * n, d, p), rel=1e-9)
    assert answer.numbers["loss less by twice D"].value == pytest.approx(at - data.chinchilla(n, 2 * d, p), rel=1e-9)
    bits = answer.in_unit(1 / math.log(2), "bits")
    assert bits.numbers["loss less by twice N"].value == answer.numbers["loss less by twice N"].value / math.log(2)


def test_intervals_are_the_frontiers_and_end_two_decades_out(found):
    frontier = found.to_json()["frontier"][0]
    answer = questions.of_budget(found, Budget.of_flops(frontier["flops"]))
    for name in ("num_params", "num_tokens", "tokens_per_param"):
        assert answer.numbers[name].interval == tuple(frontier[f"{name}_interval"])
    # A run's own noise is drawn for all runs that are asked of at once.
    assert answer.numbers["loss"].interval == pytest.approx(frontier["loss_interval"], rel=0.01)
    top = found.observations.columns["flops"].max()
    near, far = (questions.of_budget(found, Budget.of_flops(top * 10**x)) for x in (1.99, 2.01))
    assert near.numbers["loss"].interval is not None
    assert all(number.interval is None for number in far.numbers.values())
    assert len(far.numbers["loss"].by_form) > 1
    assert "no interval is worth it" in far.notes[0]


def test_repetition_is_not_covered_without_its_law(found):
    answer = questions.of_data(found, 4e10, 1e10)
    assert answer.numbers["epochs"].value == 4
    assert "repetition is not covered" in answer.notes[-1]
