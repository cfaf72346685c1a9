import numpy as np
import pytest

from scaling.laws import allocation, forms
from scaling.laws.allocation import Cost, cost_of, optimal_num_params
from tests.laws import data

FLOPS = np.array([1e18, 1e21, 1e24])


def test_closed_form_is_a_minimum_and_agrees_with_the_numeric_one():
    form = forms.FORMS["chinchilla"]
    closed = optimal_num_params(form, data.HOFFMANN, FLOPS, Cost())
    np.testing.assert_allclose(closed, [data.optimum(C) for C in FLOPS], rtol=1e-12)
    params = {k: np.array([[v]]) for k, v in data.HOFFMANN.items()}
    log = np.log(np.sqrt(FLOPS))
    numeric = np.exp(allocation._minimum(form, params, FLOPS, Cost(), log - 18, log + 18))[0]
    np.testing.assert_allclose(numeric, closed, rtol=1e-6)


@pytest.mark.parametrize("cost", [Cost(1, 3e8, 0.6), Cost(-1, 3e8, 0.6), Cost(factor=1.3)])
def test_root_under_a_head_cost_is_the_minimum(cost):
    form = forms.FORMS["chinchilla"]
    best = optimal_num_params(form, data.HOFFMANN, FLOPS, cost)

    def loss(n):
        return data.chinchilla(n, FLOPS / cost.flops_per_token(n))

    for factor in (0.999, 1.001):
        assert (loss(best) < loss(best * factor)).all()


def test_draws_are_solved_row_by_row():
    draws = {k: np.array([v, 1.05 * v]) for k, v in data.HOFFMANN.items()}
    cost = Cost(1, 3e8, 0.6)
    together = optimal_num_params(forms.FORMS["chinchilla"], draws, FLOPS, cost)
    for i in range(2):
        alone = optimal_num_params(forms.FORMS["chinchilla"], {k: v[i] for k, v in draws.items()}, FLOPS, cost)
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
