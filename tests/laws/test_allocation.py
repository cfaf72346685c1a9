import dataclasses

import numpy as np
import pytest

from scaling.laws.analysis import analyse
from scaling.laws.answers import allocation
from scaling.laws.answers.allocation import Cost, cost_of, no_optimum, optimal_num_params
from scaling.laws.answers.at_best import LawAtBest
from scaling.laws.answers.design import Target
from scaling.laws.forms import catalogue
from scaling.laws.payload import allocation_entry
from scaling.report.figures.of_laws import exponent_rows
from tests.laws import data
from tests.laws.test_catalogue import TRUTH

FLOPS = np.array([1e18, 1e21, 1e24])


def test_closed_form_is_a_minimum_and_agrees_with_the_numeric_one():
    form = catalogue.FORMS["chinchilla"]
    closed = optimal_num_params(form, data.HOFFMANN, FLOPS, Cost())
    np.testing.assert_allclose(closed, [data.optimum(C) for C in FLOPS], rtol=1e-12)
    params = {k: np.array([[v]]) for k, v in data.HOFFMANN.items()}
    numeric = np.exp(allocation._minimum(form, params, FLOPS, Cost()))[0]
    np.testing.assert_allclose(numeric, closed, rtol=1e-6)


@pytest.mark.parametrize("cost", [Cost(1, 3e8, 0.6), Cost(-1, 3e8, 0.6), Cost(factor=1.3)])
def test_root_under_a_head_cost_is_the_minimum(cost):
    form = catalogue.FORMS["chinchilla"]
    best = optimal_num_params(form, data.HOFFMANN, FLOPS, cost)

    def loss(n):
        return data.chinchilla(n, FLOPS / cost.flops_per_token(n))

    for factor in (0.999, 1.001):
        assert (loss(best) < loss(best * factor)).all()


def test_draws_are_solved_row_by_row():
    draws = {k: np.array([v, 1.05 * v]) for k, v in data.HOFFMANN.items()}
    cost = Cost(1, 3e8, 0.6)
    together = optimal_num_params(catalogue.FORMS["chinchilla"], draws, FLOPS, cost)
    for i in range(2):
        alone = optimal_num_params(catalogue.FORMS["chinchilla"], {k: v[i] for k, v in draws.items()}, FLOPS, cost)
        np.testing.assert_allclose(together[i], alone, rtol=1e-12)


def test_cost_is_recognised():
    n, d = np.geomspace(1e4, 1e6, 12), np.geomspace(1e6, 1e7, 12)
    assert cost_of(n, d, 6 * n * d).is_6nd
    for truth in (Cost(1, 1e5, 0.5), Cost(-1, 1e5, 0.5)):
        found = cost_of(n, d, truth.flops_per_token(n) * d)
        assert found.sign == truth.sign
        assert found.scale == pytest.approx(truth.scale, rel=1e-9)
        assert found.gamma == pytest.approx(truth.gamma, rel=1e-9)
        assert found.max_error < 1e-9
    constant = cost_of(n, d, 7.2 * n * d)
    np.testing.assert_allclose(constant.flops_per_token(n), 7.2 * n, rtol=1e-9)


def test_elasticity_is_the_slope():
    cost, n, h = Cost(1, 3e5, 0.5), np.geomspace(1e4, 1e7, 5), 1e-6
    slope = np.log(cost.flops_per_token(n * np.exp(h)) / cost.flops_per_token(n * np.exp(-h))) / (2 * h)
    np.testing.assert_allclose(cost.elasticity(n), slope, rtol=1e-8)


# Every form of N and D, at the values its paper gives it.
SURFACES = {n: p for n, p in TRUTH.items() if set(catalogue.FORMS[n].columns) == {"num_params", "num_tokens"}}
SURFACES = {n: p for n, p in SURFACES.items() if catalogue.FORMS[n].target == "loss"}
# What one unit of N, of D and of C is in new ones: billions, trillions, PF-days, and units that nobody has.
UNITS = [(1e9, 1e9, 1.0), (1e6, 1e12, 8.64e19), (1.0, 1.0, 8.64e19), (1e-9, 1e9, 1e-30), (1e30, 1e30, 1e30)]


def in_units(form, n_unit, d_unit):
    """The same law of sizes and tokens counted in other units."""

    def function(num_params, num_tokens, **params):
        return form.function(num_params * n_unit, num_tokens * d_unit, **params)

    return dataclasses.replace(form, name="other_units", function=function, powers=None)


@pytest.mark.parametrize("name", SURFACES)
def test_optimum_moves_with_the_units(name):
    """Under C = 6 N D and with a head; in closed form where there is one, against the search where not."""
    form, params = catalogue.FORMS[name], SURFACES[name]
    flops = np.array([1e17, 1e20, 1e23])
    for cost in (Cost(tokens_per_param=(1.0, 300.0)), Cost(1, 3e7, 0.6, tokens_per_param=(1.0, 300.0)), Cost()):
        best = optimal_num_params(form, params, flops, cost)
        for n_unit, d_unit, c_unit in UNITS:
            low, high = cost.tokens_per_param or (1.0, 1.0)
            scaled = dataclasses.replace(
                cost,
                scale=cost.scale / n_unit,
                factor=n_unit * d_unit / c_unit,
                tokens_per_param=(low * n_unit / d_unit, high * n_unit / d_unit),
            )
            moved = optimal_num_params(in_units(form, n_unit, d_unit), params, flops / c_unit, scaled)
            if name == "product" and cost.sign:
                continue  # its search finds where the head's share alone turns, which the form itself refuses
            np.testing.assert_allclose(moved * n_unit, best, rtol=1e-5)


@pytest.mark.parametrize("unit", [1e9, 1e-9])
def test_closed_form_moves_with_the_units(unit):
    """N, D in other units are amplitudes in others: A N^-α is the same number."""
    p = data.HOFFMANN
    moved = p | {"A": p["A"] * unit ** -p["alpha"], "B": p["B"] * unit ** -p["beta"]}
    for C in (1e-40, 1.0, 1e20, 1e60):  # nothing clips it
        found = optimal_num_params(catalogue.FORMS["chinchilla"], moved, np.array([C / unit**2]), Cost())
        np.testing.assert_allclose(found * unit, [data.optimum(C)], rtol=1e-12)


@pytest.mark.parametrize("name", SURFACES)
def test_optimum_is_the_lowest_of_a_fine_grid_near_the_rows(name):
    """Brute force between one and ten thousand tokens per parameter."""
    for cost in (Cost(tokens_per_param=(1.0, 1e4)), Cost(1, 3e7, 0.6, tokens_per_param=(1.0, 1e4))):
        for C in (1e18, 1e20, 1e22):
            n = np.sqrt(C / 6) * np.geomspace(1e-3, 1e2, 20_001)
            ratio = C / cost.flops_per_token(n) / n
            n = n[(ratio > 1.0) & (ratio < 1e4)]
            loss = catalogue.FORMS[name].predict(SURFACES[name], num_params=n, num_tokens=C / cost.flops_per_token(n))
            i = loss.argmin()
            best = optimal_num_params(catalogue.FORMS[name], SURFACES[name], np.array([C]), cost)[0]
            if name == "product":
                assert best in (0.0, np.inf)
            else:
                assert 0 < i < len(n) - 1
                assert best == pytest.approx(n[i], rel=1e-3)


def test_farseer_far_from_its_rows_is_not_an_optimum():
    """At 17 tokens the form is lower than anywhere: the first search's answer was its bracket's end."""
    form, params = catalogue.FORMS["farseer"], TRUTH["farseer"]
    assert form.predict(params, num_params=1e18, num_tokens=17.0) < 0.2
    best = optimal_num_params(form, params, np.array([1e20]), Cost())[0]
    assert best == pytest.approx(2.413e8, rel=1e-3)  # a grid of 20,001 sizes: above


def test_no_optimum_says_where_the_loss_falls():
    form = catalogue.FORMS["product"]
    for (a, b), size, words in (((0.3, 0.2), np.inf, "more parameters"), ((0.2, 0.3), 0.0, "fewer parameters")):
        best = optimal_num_params(form, {"K": 1.0, "a": a, "b": b}, FLOPS, Cost())
        assert (best == size).all()
        assert words in no_optimum(form, best, FLOPS)
        # The same by search, under a law that does not say what it is.
        plain = dataclasses.replace(form, name="mine", powers=None)
        assert (optimal_num_params(plain, {"K": 1.0, "a": a, "b": b}, FLOPS, Cost()) == size).all()
    assert no_optimum(form, np.array([1e9, 1e10, 1e11]), FLOPS) is None


def test_joint_law_in_closed_form_is_its_minimum_by_search():
    form, params = catalogue.FORMS["kaplan_joint"], TRUTH["kaplan_joint"]
    searched = search(form, params, Cost())
    np.testing.assert_allclose(optimal_num_params(form, params, FLOPS, Cost()), searched, rtol=1e-6)
    a, b = allocation.exponents(form, params)
    assert a == pytest.approx(np.polyfit(np.log(FLOPS), np.log(searched), 1)[0], rel=1e-6)
    assert a + b == 1


def search(form, params, cost):
    """N* by a search that knows nothing of the form."""
    plain = dataclasses.replace(form, name="mine", function=lambda n, d, **p: form.function(n, d, **p), powers=None)
    return optimal_num_params(plain, params, FLOPS, cost)


@pytest.mark.parametrize(
    "name, changed",
    [
        *(("joined", {"gamma": gamma}) for gamma in (0.3, 1.0, 2.5)),
        *(("saturating", {"L_0": ceiling}) for ceiling in (3.0, 8.0)),
    ],
)
@pytest.mark.parametrize("cost", [Cost(), Cost(1, 3e8, 0.6)])
def test_powers_that_join_or_saturate_have_their_optimum_and_its_inverse(name, changed, cost):
    """Against a search for N*, against L itself for the least loss, what it takes, and what a wrong size takes."""
    form, params = catalogue.FORMS[name], TRUTH[name] | changed
    best = optimal_num_params(form, params, FLOPS, cost)
    np.testing.assert_allclose(best, search(form, params, cost), rtol=1e-6)
    law = LawAtBest(form, {k: np.array([v]) for k, v in params.items()}, cost)
    log_c, loss = np.log(FLOPS), form.predict(params, num_params=best, num_tokens=FLOPS / cost.flops_per_token(best))
    np.testing.assert_allclose(law.loss(log_c)[0], loss, rtol=1e-12)
    np.testing.assert_allclose(law.log_paid(loss[None], log_c[None] + 1)[0], log_c, rtol=1e-10)
    paid = np.exp(law.log_paid_at_size(loss[None], np.log(2 * best)))[0]
    again = form.predict(params, num_params=2 * best, num_tokens=paid / cost.flops_per_token(2 * best))
    np.testing.assert_allclose(again, loss, rtol=1e-12)
    slope = (law.excess(log_c + 1e-6)[0] - law.excess(log_c - 1e-6)[0]) / 2e-6
    np.testing.assert_allclose(law.excess(log_c)[1], slope, rtol=1e-6)
    floor, ceiling = params["E"], params.get("L_0", np.inf)
    outside = law.log_paid(np.array([[floor - 0.1, floor, ceiling, ceiling + 0.1]]), log_c[None, :1])
    np.testing.assert_array_equal(outside, [[np.inf, np.inf, -np.inf, -np.inf]])


def test_powers_that_join_are_added_at_one_and_kaplans_without_a_floor():
    n, d = np.meshgrid(np.geomspace(1e6, 1e10, 5), np.geomspace(1e9, 1e12, 5))
    joined, kaplan = catalogue.FORMS["joined"], TRUTH["kaplan_joint"]
    added = joined.predict(data.HOFFMANN | {"gamma": 1.0}, num_params=n, num_tokens=d)
    np.testing.assert_allclose(added, data.chinchilla(n, d), rtol=1e-14)
    of = {"alpha": kaplan["alpha_N"], "beta": kaplan["alpha_D"], "gamma": kaplan["alpha_D"], "E": 0.0}
    of |= {"A": kaplan["N_c"] ** kaplan["alpha_N"], "B": kaplan["D_c"] ** kaplan["alpha_D"]}
    np.testing.assert_allclose(
        joined.predict(of, num_params=n, num_tokens=d),
        catalogue.FORMS["kaplan_joint"].predict(kaplan, num_params=n, num_tokens=d), rtol=1e-12,
    )  # fmt: skip


def test_a_law_with_a_parameter_held_has_its_closed_form():
    form = catalogue.FORMS["chinchilla"].fix(E=1.69, alpha=0.34)
    free = {k: v for k, v in data.HOFFMANN.items() if k in form.parameters}
    np.testing.assert_allclose(
        optimal_num_params(form, free, FLOPS, Cost()), [data.optimum(C) for C in FLOPS], rtol=1e-12
    )
    assert allocation.exponents(form, free)[0] == pytest.approx(0.28 / 0.62)
    joined, params = catalogue.FORMS["joined"], TRUTH["joined"]
    fixed = LawAtBest(joined.fix(E=1.5), {k: np.array([v]) for k, v in params.items() if k != "E"}, Cost())
    free = LawAtBest(joined, {k: np.array([v]) for k, v in (params | {"E": 1.5}).items()}, Cost())
    np.testing.assert_allclose(fixed.loss(np.log(FLOPS)), free.loss(np.log(FLOPS)), rtol=1e-13)
    held = joined.fix(gamma=params["gamma"], E=params["E"])
    rest = {k: v for k, v in params.items() if k in held.parameters}
    np.testing.assert_allclose(optimal_num_params(held, rest, FLOPS, Cost()), search(joined, params, Cost()), rtol=1e-6)


def test_a_cost_in_other_units_is_not_used():
    n, d = np.geomspace(1e7, 1e9, 12), np.geomspace(1e9, 1e10, 12)
    assert "1.2e-20" in cost_of(n, d, 6 * n * d / 8.64e19).problem
    assert cost_of(n, d, 6 * n * d * (1 + (3e7 / n) ** 0.6)).problem is None
    shuffled = cost_of(n, d, np.random.default_rng(0).permutation(6 * n * d))
    assert "no function of N times D" in shuffled.problem
    one_off = 6 * n * d
    one_off[3] *= 1.3
    assert cost_of(n, d, one_off).max_error > 0.1
    assert cost_of(n, d, one_off).problem is None


def test_an_optimum_far_from_the_rows_is_said():
    form, cost = catalogue.FORMS["chinchilla"], Cost(tokens_per_param=(5.0, 40.0))
    near = np.sqrt(FLOPS / 6 / 20)
    assert allocation.far_from_rows(form, near, FLOPS, cost) is None
    assert "has 0.02 tokens per parameter, the rows 5 to 40" in allocation.far_from_rows(
        form, near * np.sqrt(1e3), FLOPS, cost
    )


@pytest.fixture(scope="module")
def bent():
    """Forty-eight runs whose powers join at γ = .4, noise .3 %."""
    runs = data.isoflop(budgets=np.geomspace(1e18, 1e20, 6), sizes=8)
    form, truth = catalogue.FORMS["joined"], data.HOFFMANN | {"gamma": 0.4}
    loss = form.predict(truth, num_params=runs["num_params"], num_tokens=runs["num_tokens"])
    return runs.assign(loss=loss * np.exp(0.003 * np.random.default_rng(0).normal(size=len(loss))))


@pytest.mark.parametrize("bootstrap", [0, 60])
def test_every_law_of_size_and_data_says_its_exponent(bent, bootstrap):
    found = analyse(bent, laws=("chinchilla", "joined", "kaplan_n"), bootstrap=bootstrap, combined=False)
    p, told = found.fits["joined"].params, allocation_entry(found)["by_law"]
    assert list(told) == ["joined"]
    assert told["joined"]["a"] == pytest.approx(p["beta"] / (p["alpha"] + p["beta"]), rel=1e-12)
    for name in ("a", "a_local"):
        low, high = told["joined"][f"{name}_interval"]
        assert low < 0.28 / 0.62 < high, "the planted one"
    rows = exponent_rows(found.to_json())
    assert rows[-1]["name"] == "3  joined, fitted range"
    assert rows[-1]["a"] == told["joined"]["a_local"]


def test_a_ceiling_out_of_sight_leaves_hoffmanns_law_and_its_intervals():
    """Runs far below any ceiling hold L_0 as high as it can be: nothing of it is known, and all of the rest."""
    runs = data.isoflop(budgets=np.geomspace(1e18, 1e20, 4), sizes=6, noise=0.003)
    plain, below = (analyse(runs, laws=(law,), bootstrap=60, combined=False) for law in ("chinchilla", "saturating"))
    assert below.fits["saturating"].at_bound == ("L_0",)
    assert below.fits["saturating"].ends_its_domain
    ends = [Target.of("a").interval(found, 0.9) for found in (plain, below)]
    assert ends[1] == pytest.approx(ends[0], abs=0.25 * np.ptp(ends[0]))


def test_a_sum_that_misses_a_bend_names_the_law_that_may_have_it(bent):
    alone = analyse(bent, laws=("chinchilla",), bootstrap=0, combined=False)
    assert any("the form misses a bend" in line for line in alone.warnings)
    assert any(line.endswith("--law chinchilla joined saturating") for line in alone.warnings)
    both = analyse(bent, laws=("chinchilla", "joined"), bootstrap=0, combined=False)
    assert not any("--law chinchilla joined" in line for line in both.warnings)
    assert not any(line.startswith("joined: its residuals follow") for line in both.warnings)
