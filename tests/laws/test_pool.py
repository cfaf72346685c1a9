"""Choosing runs out of a pool: what a purchase takes away against Bayes by hand, and what may not enter a choice."""

import numpy as np
import pytest

from scaling.laws.answers.design import pool
from scaling.laws.fitting.coordinates import Coordinates, Model
from scaling.laws.forms import catalogue

TRUTH = {"E": 1.5, "A": 300.0, "alpha": 0.32, "B": 500.0, "beta": 0.3}


def made(seed=0, num=40):
    rng = np.random.default_rng(seed)
    n, d = 10 ** rng.uniform(7, 9, num), 10 ** rng.uniform(8.5, 10.5, num)
    loss = catalogue.get("chinchilla").predict(TRUTH, num_params=n, num_tokens=d) * np.exp(0.003 * rng.normal(size=num))
    targets = {"num_params": np.array([3e9, 6e9]), "num_tokens": np.array([1e11, 5e10])}
    return pool.Pool({"num_params": n, "num_tokens": d}, 6 * n * d, targets), loss


def bought(pool_, loss, criterion="designed", share=0.05):
    seen = []

    def reveal(i):
        seen.append(i)
        return loss[i]

    found = list(pool.purchases(pool_, reveal, share * pool_.cost.sum(), criterion=criterion))
    return [i for i, _ in found], [s for _, s in found], seen


def test_losses_that_were_not_bought_enter_no_choice(monkeypatch):
    two = [catalogue.get(name) for name in ("chinchilla_tied", "product")]
    monkeypatch.setattr(pool.Pool, "forms", lambda *_: two)
    own, loss = made(num=20)
    rows, spent, seen = bought(own, loss)
    assert rows == seen
    assert len(set(rows)) == len(rows)
    np.testing.assert_allclose(spent, np.cumsum(own.cost[rows]))
    assert spent[-1] <= 0.05 * own.cost.sum() * (1 + 1e-9)
    others = np.setdiff1d(np.arange(len(loss)), rows)
    changed = loss.copy()
    changed[others] = np.random.default_rng(1).permutation(loss[others]) * 3
    assert bought(own, changed)[0] == rows
    # A loss that was bought does enter.
    changed = loss.copy()
    changed[rows[0]] *= 2
    assert bought(own, changed)[0] != rows


def test_what_a_purchase_takes_away_is_what_bayes_says():
    """One form: covariance after one more row of least squares, by inverting the information; D-optimality by its
    determinant."""
    own, loss = made()
    rows = list(range(12))
    found = pool.ensemble(own, rows, loss[rows]).leading
    known = pool.beliefs(found, own.columns, own.targets, own.far)
    member = found.members[0]
    covariance = member.root @ member.root.T
    slopes = [
        Model(member.model.coordinates, {c: x[c] for c in member.form.columns}, True).derivatives(member.theta[None])[
            1
        ][0]
        for x in (own.columns, own.targets)
    ]
    for i in (0, 20, 39):
        J, s = slopes[0][:, i], member.noise * own.far[i]
        information = np.linalg.inv(covariance)
        after = np.linalg.inv(information + np.outer(J, J) / s**2)
        fall = np.mean(np.einsum("pm,pq,qm->m", slopes[1], covariance - after, slopes[1]))
        assert known.falls(known.start)[i] == pytest.approx(fall, rel=1e-6)
        gain = np.linalg.slogdet(information + np.outer(J, J) / s**2)[1] - np.linalg.slogdet(information)[1]
        assert known.informs(known.start)[i] == pytest.approx(gain, rel=1e-6)
        left = known.variance(known.bought(known.start, i))
        assert known.variance(known.start) - left == pytest.approx(fall, rel=1e-6)


def test_disagreement_of_forms_is_variance():
    own, loss = made()
    rows = list(range(12))
    found = pool.ensemble(own, rows, loss[rows])
    assert len(found.members) > 1
    assert found.weights.sum() == pytest.approx(1.0)
    values, spreads = zip(*(m.at(own.targets) for m in found.members))
    mean = found.weights @ np.array(values)
    second = [(v - mean) ** 2 + (s**2).sum(axis=1) for v, s in zip(values, spreads)]
    known = pool.beliefs(found, own.columns, own.targets, own.far)
    assert known.variance(known.start) == pytest.approx(float(np.mean(found.weights @ np.array(second))), rel=1e-9)


def test_prior_rows_are_the_derivatives_of_the_prior():
    own, loss = made()
    form = catalogue.get("chinchilla")
    coordinates = Coordinates(form, own.everything, loss)
    prior = pool.Prior(coordinates, loss)
    model = pool.WithPrior(Model(coordinates, own.columns), 0.01 * own.far, prior)
    theta = (prior.mean + 0.1)[None]
    value, jacobian, second = model.derivatives(theta)
    rng = np.random.default_rng(0)
    c, v = rng.normal(size=(2, *value.shape))
    hessian = second(c, v)[0]
    for j in range(theta.shape[1]):
        step = np.zeros_like(theta)
        step[0, j] = 1e-5
        up, down = model.derivatives(theta + step), model.derivatives(theta - step)
        np.testing.assert_allclose(jacobian[0, j], (up[0] - down[0])[0] / 2e-5, rtol=1e-5, atol=1e-5)
        curved = (jacobian[0] * c[0]) @ jacobian[0, j] + ((up[1] - down[1])[0] / 2e-5) @ v[0]
        np.testing.assert_allclose(hessian[:, j], curved, rtol=1e-4, atol=1e-3 * np.abs(hessian).max())


def test_one_run_is_enough_to_begin():
    own, loss = made()
    found = pool.ensemble(own, [0], loss[:1])
    assert np.isfinite(found.predict(own.targets)).all()


def test_a_start_of_the_cheapest():
    own = pool.Pool({"x": np.ones(4)}, np.array([3.0, 1.0, 94.0, 2.0]), {"x": np.ones(1)})
    assert pool.start(own, 0.02, 3) == [1]
    assert pool.start(own, 0.05, 3) == [1, 3]
    assert pool.start(own, 0.06, 3) == [1, 3, 0]
    assert pool.start(own, 0.06, 2) == [1, 3]
    assert pool.start(own, 0.001, 3) == [1]


def test_a_criterion_that_is_not_there():
    own, loss = made()
    with pytest.raises(ValueError, match="criterion is 'a-optimal': write one of designed, v-optimal, d-optimal"):
        list(pool.purchases(own, loss.__getitem__, 1.0, criterion="a-optimal"))


def test_a_budget_is_not_wasted_on_a_ratio():
    """Independent candidates, one target: .9 of its variance hangs on run 0 at cost 10, .1 on run 1 at cost 1. By fall
    over cost run 1 comes first and nothing is left for the other; the plan begins with run 0."""
    rows = np.eye(2)
    known = pool.PooledBeliefs(np.sqrt([[0.9, 0.1]]), rows, np.full(2, 1e-6), 0.0, {})
    cost, all_of_them = np.array([10.0, 1.0]), np.ones(2, dtype=bool)
    assert np.argmax(known.falls(known.start) / cost) == 1
    assert pool._first_of_best_plan(known, known.start, cost, all_of_them, 10.0, 1.0) == 0


def test_a_signed_target_is_predicted_in_levels_whatever_its_signs():
    """One form of the catalogue is fitted in levels: so are those of any columns beside it, or levels meet logs."""
    form = next(f for f in catalogue.FORMS.values() if f.signed)
    rng = np.random.default_rng(0)
    columns = {c: 10 ** rng.uniform(7, 9, 6) for c in form.columns}
    own = pool.Pool(columns, np.ones(6), columns, form.target)
    assert {f.signed for f in own.forms(False)} == {True}
