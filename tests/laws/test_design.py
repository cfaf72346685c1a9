"""The next run against linear algebra on the full Jacobian, brute force over subsets, and a solver of its own."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import optimize

from scaling.bench import designed
from scaling.fit import analyse
from scaling.laws.answers import allocation
from scaling.laws.answers.design import Candidates, Target, mending, orders, propose
from scaling.laws.answers.design.beliefs import believe
from scaling.laws.fitting.coordinates import Model
from scaling.laws.forms import catalogue
from scaling.laws.intervals import resampling
from scaling.laws.intervals.profile import profile
from scaling.laws.tables.observations import from_table
from tests.laws import data


@pytest.fixture(scope="module")
def found():
    return analyse(data.scattered(24, noise=0.004), laws=("chinchilla",), bootstrap=50)


def grid(sizes=4, horizons=3):
    n, d = np.meshgrid(np.geomspace(1e7, 1e10, sizes), np.geomspace(1e9, 1e12, horizons))
    n, d = n.ravel(), d.ravel()
    return bought(n, d)


def bought(n, d, **options):
    flops = 6 * n * d
    labels = tuple(f"{a:.3g} on {b:.3g}" for a, b in zip(n, d))
    cost = options.pop("cost", lambda rows: float(flops[list(rows)].sum()))
    return Candidates({"num_params": n, "num_tokens": d, "flops": flops}, labels, cost)


def slopes(fitted, columns):
    """(∂ log loss / ∂θ of new rows (n, P), that of the fitted rows (m, P)), by central differences."""
    model = Model(fitted.coordinates, columns)

    def of(model):
        step = 1e-6 * np.eye(len(fitted.theta))
        return np.stack([(model.value((fitted.theta + s)[None]) - model.value((fitted.theta - s)[None]))[0] / 2e-6
                         for s in step], axis=1)  # fmt: skip

    return of(model), of(fitted.problem.model)


def variance(fitted, columns, quantity, rows, sigma):
    """Of a quantity after rows are added, by inverting the information of the whole Jacobian."""
    new, old = slopes(fitted, columns)
    J = np.concatenate([old, new[list(rows)]])
    slope = resampling.gradient(fitted, quantity)
    return sigma**2 * slope @ np.linalg.inv(J.T @ J) @ slope


@pytest.mark.parametrize("text", ["a", "E", "allocation@1e22"])
def test_a_row_added_is_one_more_row_of_least_squares(found, text):
    alone = dataclasses.replace(found, combination=None)
    target, candidates = Target.of(text), grid()
    fitted = found.fits["chinchilla"]
    quantity, sigma = target.quantity(fitted.form, found.cost), resampling.noise_scale(fitted)
    known = believe(alone, candidates.columns, target)
    S, rows = known.start, []
    for i in (3, 7, 3, 11):
        exact = variance(fitted, candidates.columns, quantity, rows, sigma)
        assert known.variance(S) == pytest.approx(exact, rel=1e-5)
        left = variance(fitted, candidates.columns, quantity, [*rows, i], sigma)
        assert known.falls(S)[i] == pytest.approx(exact - left, rel=1e-4, abs=1e-7 * exact)
        S, rows = known.bought(S, i), [*rows, i]
    assert np.allclose(known.bought(known.bought(S, 2), 2, -1.0), S, atol=1e-12)


def test_forms_that_disagree_are_variance_that_a_run_takes_away(found):
    """Of two forms of equal weight the covariance is that of the mixture, from draws."""
    candidates, target = grid(), Target.of("loss@1e10,1e12")
    known = believe(found, candidates.columns, target)
    assert len(known.voters) > 1
    rng = np.random.default_rng(0)
    place = target.place(found)
    weights = found.combination.weights(**place)
    draws = []
    for name, fitted in found.combination.fits.items():
        count = round(200_000 * float(weights[name][0]))
        theta = fitted.theta + rng.multivariate_normal(
            np.zeros(len(fitted.theta)), resampling.covariance(fitted), count
        )
        model = Model(fitted.coordinates, candidates.columns)
        quantity = target.quantity(fitted.form, found.cost)
        jacobian = model.derivatives(fitted.theta[None])[1][0]
        move = theta - fitted.theta
        slope = resampling.gradient(fitted, quantity)
        value = np.concatenate([np.ravel(quantity(fitted.params)), model.value(fitted.theta[None])[0]])
        draws.append(value + move @ np.concatenate([slope[:, None], jacobian], axis=1))
    drawn = np.cov(np.concatenate(draws).T)
    joint = np.concatenate([known.target[None], known.rows]) @ np.concatenate([known.target[None], known.rows]).T
    scale = np.sqrt(np.outer(np.diagonal(drawn), np.diagonal(drawn)))
    assert np.abs(joint - drawn).max() <= 0.02 * scale.max()
    assert (np.abs(joint - drawn) / scale).max() < 0.02


def test_forms_that_fix_a_do_not_vote_on_it(found):
    proposal = propose(found, grid(), Target.of("a"))
    assert "chinchilla_tied" in found.combination.fits
    assert proposal.voters == {"chinchilla": pytest.approx(1.0)}
    assert any("chinchilla_tied fixes a" in reason for reason in proposal.reasons)


@pytest.mark.parametrize("exponent", [0.0, 0.4, 1.0])
def test_every_choice_is_the_best_by_brute_force(found, exponent):
    candidates, target = grid(3, 3), Target.of("a")
    fitted = found.fits["chinchilla"]
    quantity, sigma = target.quantity(fitted.form, found.cost), resampling.noise_scale(fitted)

    def left(rows):
        return variance(fitted, candidates.columns, quantity, rows, sigma)

    proposal = propose(found, candidates, target, batch=3, exponent=exponent)
    chosen, width = [], proposal.width
    for step in proposal.steps:
        score = {
            i: (left(chosen) - left([*chosen, i])) / candidates.cost([i]) ** exponent
            for i in set(range(9)) - set(chosen)
        }
        assert step.candidate == max(score, key=score.get)
        assert step.gain == pytest.approx((left(chosen) - left([*chosen, step.candidate])) / left([]), rel=1e-3)
        chosen.append(step.candidate)
        assert step.width_after == pytest.approx(width * np.sqrt(left(chosen) / left([])), rel=1e-4)
    best = min(left(rows) for rows in itertools.combinations(range(9), 3))
    if exponent == 0.0:  # of any three; greed is no more than a little worse
        assert left(chosen) <= 1.05 * best


def test_the_next_run_is_priced_beside_those_before_it(found):
    """Of one size, horizons share their trunk: the longest is paid, and of the others only a fifth."""
    candidates = grid(3, 3)
    n, d = candidates.columns["num_params"], candidates.columns["num_tokens"]

    def cost(rows):
        rows = list(rows)
        total = 0.2 * (6 * n * d)[rows].sum()
        for size in set(n[rows]):
            total += 0.8 * 6 * size * d[rows][n[rows] == size].max()
        return float(total)

    candidates = bought(n, d, cost=cost)
    proposal = propose(found, candidates, Target.of("a"), batch=4, asked=0.7 * propose(found, candidates,
                       Target.of("a")).width)  # fmt: skip
    rows = [s.candidate for s in proposal.steps]
    assert [s.cost for s in proposal.steps] == pytest.approx([cost(rows[: i + 1]) - cost(rows[:i]) for i in range(4)])
    assert proposal.cost == pytest.approx(cost(rows))
    assert "for additive costs only" in proposal.certificate.reason


def test_the_budget_is_kept_and_nothing_is_bought_twice(found):
    candidates, target = grid(), Target.of("a")
    budget = 3e20
    proposal = propose(found, candidates, target, batch=20, budget=budget)
    assert proposal.cost <= budget
    assert len({s.candidate for s in proposal.steps}) == len(proposal.steps)
    costs = [candidates.cost([i]) for i in range(len(candidates))]
    assert proposal.next is None
    assert all(budget - proposal.cost < costs[i] for i in set(range(12)) - {s.candidate for s in proposal.steps})
    none = propose(found, candidates, target, budget=1.0)
    assert not none.steps
    assert none.width_after == none.width
    assert "within the budget" in " ".join(none.reasons)


def relaxed(known, cost, budget):
    """The least variance that Σ n c ≤ budget, 0 ≤ n ≤ 1 reaches, by SciPy."""

    def value(n):
        M = np.eye(len(known.target)) + (known.rows.T * (n / known.noise)) @ known.rows
        x = np.linalg.solve(M, known.target)
        return known.target @ x, -((known.rows @ x) ** 2) / known.noise

    scale = value(np.zeros(len(cost)))[0]
    found = optimize.minimize(
        lambda n: tuple(np.array(v) / scale for v in value(n)), np.full(len(cost), 0.1), jac=True, method="SLSQP",
        bounds=[(0, 1)] * len(cost), options={"maxiter": 500, "ftol": 1e-12},
        constraints={"type": "ineq", "fun": lambda n: 1 - cost @ n / budget, "jac": lambda n: -cost / budget},
    )  # fmt: skip
    return found.fun * scale


@pytest.mark.parametrize("share", [0.9, 0.75])
def test_the_certificate_is_the_continuous_optimum(found, share):
    """At the bound's budget another solver's continuous optimum has the variance that was asked, and no subset that is
    cheaper reaches it."""
    candidates, target = grid(3, 3), Target.of("E")
    width = propose(found, candidates, target).width
    told = propose(found, candidates, target, asked=share * width).certificate
    known = believe(found, candidates.columns, target, alone=True)
    cost = np.array([candidates.cost([i]) for i in range(9)])
    wanted = share**2 * known.variance(known.start)
    assert told.gap < 2e-4
    assert relaxed(known, cost, told.least) == pytest.approx(wanted, rel=2e-3)
    reached = []
    for k in range(1, 10):
        for rows in itertools.combinations(range(9), k):
            S = known.start
            for i in rows:
                S = known.bought(S, i)
            if known.variance(S) <= wanted:
                reached.append(cost[list(rows)].sum())
    assert told.least <= min(reached) * (1 + 1e-9)
    assert told.budget >= min(reached) * (1 - 1e-9)


def test_a_width_that_all_candidates_do_not_reach_has_no_certificate(found):
    told = propose(found, grid(), Target.of("a"), asked=1e-4).certificate
    assert told.least is None
    assert told.budget is None
    assert "leave a width of" in told.reason
    wide = propose(found, grid(), Target.of("a"), asked=3.0).certificate
    assert wide.budget == 0.0


def test_no_run_takes_away_what_all_losses_share(found):
    """Of E: √(own² + shared²) now, after each run, and with every candidate, own what a fit without the error has. Of
    the exponent, and of a forecast on the same text, nothing changes."""
    error, level = 0.03, 0.9
    shared = 2 * 1.6448536 * error
    told = dataclasses.replace(found, observations=dataclasses.replace(found.observations, shared_error=error))
    asked = {"batch": 3, "level": level, "asked": np.hypot(0.06, shared)}
    for text in ("a", "loss@1e22"):
        alone, same = (propose(f, grid(), Target.of(text), **asked) for f in (found, told))
        assert same == alone
    alone, both = (propose(f, grid(), Target.of("E"), **asked) for f in (found, told))
    value = found.fits["chinchilla"].params["E"]
    half = [np.hypot(end - value, shared / 2) for end in alone.interval]
    assert both.interval == pytest.approx((value - half[0], value + half[1]), rel=1e-9)
    assert both.shared_width == pytest.approx(shared, rel=1e-6)
    assert [s.candidate for s in both.steps] == [s.candidate for s in alone.steps]
    for one, other in zip(alone.steps, both.steps):
        exact = np.hypot(one.width_after, shared)
        assert other.width_after == pytest.approx(exact, rel=2e-3)  # the profile is lopsided
    ratio = 0.06 / alone.width
    wide = np.hypot(ratio * np.sqrt(both.width**2 - shared**2), shared)
    under, over = (propose(f, grid(), Target.of("E"), level=level, asked=w).certificate
                   for f, w in ((found, 0.06), (told, wide)))  # fmt: skip
    assert over.least == pytest.approx(under.least, rel=1e-3)
    assert over.budget == under.budget is not None
    never = propose(told, grid(), Target.of("E"), level=level, asked=0.95 * shared).certificate
    assert never.least is None
    assert "leave a width of" in never.reason
    twice = propose(told, grid(), Target.of("E"), level=level, asked=shared / 2**0.5)
    assert any("with 2 times as much text that alone would be" in reason for reason in twice.reasons)


def test_of_a_floor_near_zero_all_that_is_left_is_what_losses_share():
    """E's interval begins at 0: it is not narrower than from there to E and the error's reach, whatever is bought."""
    table = data.scattered(40, params=data.HOFFMANN | {"E": 0.08}, noise=0.004)
    near = analyse(table.assign(data="one text", loss_standard_error=0.06), laws=("chinchilla",), bootstrap=0)
    E, target = near.fits["chinchilla"].params["E"], Target.of("E")
    assert 0 < E < 1.6448536 * 0.06
    whole = E + 1.6448536 * 0.06
    said = propose(near, grid(), target, asked=0.95 * whole)
    assert said.shared_width == pytest.approx(whole, rel=1e-6)
    assert said.interval[0] == 0
    assert said.width >= whole
    assert all(step.width_after >= 0.999 * whole for step in said.steps)
    assert said.certificate.least is None
    columns = {c: near.observations.columns[c] for c in ("num_params", "num_tokens", "flops")}
    order = np.argsort(columns["flops"]).tolist()
    spread = orders.spread_of_target(near, target, columns)
    told = orders.compare(spread, columns, lambda some: columns["flops"][some].sum(), order, 12, said.width, whole)
    assert np.isfinite(told["designed"]["width"]).all()


def test_a_grid_of_two_groups_has_the_same_sizes_of_both_at_every_budget():
    n, c = (np.tile(x.ravel(), 2) for x in np.meshgrid(np.geomspace(1e6, 1e8, 9), [1e17, 1e18, 1e19], indexing="ij"))
    member = np.repeat(["old", "new"], len(n) // 2)
    columns = {"num_params": n, "num_tokens": c / 6 / n, "flops": c}
    order = list(orders.by_budget(columns, (), member))
    assert sorted(order) == list(range(len(n)))
    for budget, some in zip((1e17, 1e18, 1e19), (order[:10], order[10:20], order[20:30])):
        assert (c[some] == budget).all()
        sizes = [sorted(n[i] for i in some if member[i] == group) for group in ("old", "new")]
        assert sizes[0] == sizes[1]
        assert {member[i] for i in some[:2]} == {"old", "new"}
    alone = {k: x[: len(n) // 2] for k, x in columns.items()}
    assert [i for i in order[:30] if member[i] == "old"] == list(orders.by_budget(alone))[:15]


def test_the_interval_is_the_fits_own(found):
    """Of a the profile's, as fit.json has it, not the Laplace approximation's; of a loss the forecast's."""
    proposal = propose(found, grid(), Target.of("a"), level=0.95)
    entry = found.to_json()["allocation"]
    assert list(proposal.interval) == pytest.approx(entry["a_interval"], rel=1e-9)
    size = propose(found, grid(), Target.of("allocation@1e22"), level=0.9)
    fitted = found.fits["chinchilla"]
    at = np.array([1e22])
    exact = profile(fitted, lambda p: np.log(allocation.optimal_num_params(fitted.form, p, at, found.cost))[:, 0], 0.9)
    assert np.log(size.interval) == pytest.approx(exact.interval, rel=1e-9)
    assert size.width == pytest.approx(np.ptp(exact.interval))


def test_the_expected_width_is_near_what_the_runs_give():
    """The runs proposed are made by the truth: over some tables the width found is that expected, on the mean."""
    ratio = []
    for seed in range(4):
        table = data.scattered(20, noise=0.004, seed=seed)
        candidates = grid(5, 4)
        proposal = propose(designed.known(from_table(table)), candidates, Target.of("a"), batch=6)
        rows = [s.candidate for s in proposal.steps]
        n, d = (candidates.columns[c][rows] for c in ("num_params", "num_tokens"))
        loss = data.chinchilla(n, d) * np.exp(0.004 * np.random.default_rng(100 + seed).normal(size=len(n)))
        more = pd.DataFrame({"num_params": n, "num_tokens": d, "loss": loss})
        fitted = designed.known(from_table(pd.concat([table, more]))).fits["chinchilla"]
        ends = profile(fitted, Target.of("a").quantity(fitted.form, allocation.Cost()), 0.9).interval
        ratio.append(np.log(np.ptp(ends) / proposal.width_after))
    assert abs(np.mean(ratio)) < 0.35


def test_losses_that_were_not_bought_change_nothing(found):
    """Candidates' columns may hold anything that was measured of them: only where they lie is read."""
    candidates = grid()
    plain = propose(found, candidates, Target.of("loss@1e22"), batch=4)
    more = {**candidates.columns, "loss": np.linspace(1.0, 9.0, len(candidates)), "weight": np.full(12, 7.0)}
    told = propose(found, dataclasses.replace(candidates, columns=more), Target.of("loss@1e22"), batch=4)
    assert told == plain


@pytest.mark.slow
def test_an_interval_without_an_end_is_given_one():
    """Nine runs of a threefold range of sizes leave a without an end at so high a level: after the first run proposed,
    with the loss that the law expects of it, the interval has both, those that were said."""
    rng = np.random.default_rng(0)
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e8, 3e8, 3), np.geomspace(1e9, 1e11, 3)))
    table = pd.DataFrame({"num_params": n, "num_tokens": d, "loss": data.chinchilla(n, d)})
    table["loss"] *= np.exp(0.01 * rng.normal(size=9))
    found, target, level = designed.known(from_table(table)), Target.of("a"), 0.9999
    candidates = grid(2, 2)
    proposal = propose(found, candidates, target, batch=2, level=level)
    assert not np.isfinite(proposal.width)
    assert "the first run should give it one" in " ".join(proposal.reasons)
    i = proposal.steps[0].candidate
    new = {c: candidates.columns[c][i] for c in ("num_params", "num_tokens")}
    ran = table.iloc[:1].assign(**new, loss=float(found.fits["chinchilla"].predict(**new)))
    after = designed.known(from_table(pd.concat([table, ran])), delta=found.fits["chinchilla"].loss.delta)
    assert proposal.steps[0].width_after == pytest.approx(target.width(target.interval(after, level)), rel=1e-3)


def test_rows_that_identify_nothing_are_mended_by_the_best_conditioned_run():
    """On a ray D = 20 N a run on it mends nothing, one beside it little, and one far off it much."""
    n = np.geomspace(1e7, 1e9, 8)
    seen = from_table(pd.DataFrame({"num_params": n, "num_tokens": 20 * n, "loss": data.chinchilla(n, 20 * n)}))
    columns = {"num_params": np.array([1e8, 1e8, 1e7]), "num_tokens": np.array([2e9, 2.1e9, 2e10])}
    form = catalogue.FORMS["chinchilla"]
    i, number = mending.identifying(seen, columns, form)
    assert i == 2
    assert mending.identifying(seen, {c: x[:1] for c, x in columns.items()}, form) is None
    beside = mending.identifying(seen, {c: x[:2] for c, x in columns.items()}, form)
    assert beside is None or beside[1] > 3 * number
    few = seen.take(np.arange(3))
    assert mending.identifying(few, columns, form) is None


@pytest.mark.parametrize(
    "text", ["b", "a@1e9", "loss", "loss@1e9,2,3", "allocation@-1", "loss@x", "multiplier", "multiplier@-1"]
)
def test_what_is_no_target_is_said_in_a_line(text):
    with pytest.raises(ValueError, match=r"^--target is .*: ") as e:
        Target.of(text)
    assert "\n" not in str(e.value)


def test_what_other_orders_leave_is_least_squares_in_the_laws_own_parameters():
    """Each width against (Jᵀ J / σ²)⁻¹ of E, A, B, α, β, their slopes by differences of the law as it is written."""
    found = analyse(data.isoflop(noise=0.004), laws=("chinchilla",), bootstrap=0)
    rows, fitted = found.observations, found.fits["chinchilla"]
    n, d, C = (rows.columns[c] for c in ("num_params", "num_tokens", "flops"))
    names = list(fitted.params)
    at = np.array([fitted.params[k] for k in names])

    def slopes(function):
        steps = 1e-5 * np.diag(at)
        return np.array([(function(at + s) - function(at - s)) / (2 * s.sum()) for s in steps])

    def log_loss(p):
        p = dict(zip(names, p))
        return np.log(p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"])

    def exponent(p):
        p = dict(zip(names, p))
        return p["beta"] / (p["alpha"] + p["beta"])

    J, g, sigma = slopes(log_loss), slopes(exponent), resampling.noise_scale(fitted)

    def expected(chosen):
        return np.sqrt(g @ np.linalg.inv(J[:, chosen] @ J[:, chosen].T) @ g) * sigma

    columns = {"num_params": n, "num_tokens": d, "flops": C}
    spread = orders.spread_of_target(found, Target("a"), columns)
    order = np.argsort(C, kind="stable").tolist()
    for chosen in (order, order[: len(order) // 2], order[::2]):
        assert spread(chosen) == pytest.approx(expected(chosen), rel=1e-3)
    assert spread([i for i in order if d[i] == d[order[0]]]) == np.inf  # one horizon tells no β

    bought = [*order[:8], order[-1], order[-5], order[12]]
    told = orders.compare(spread, columns, lambda some: C[some].sum(), bought, 8, width=0.2)
    assert told["designed"]["flops"] == pytest.approx(np.cumsum(C[bought])[7:])
    unit = 0.2 / expected(bought)
    assert told["designed"]["width"] == pytest.approx([unit * expected(bought[:k]) for k in range(8, 12)], rel=1e-3)
    assert told["designed"]["width"][-1] == pytest.approx(0.2)
    grid = [*bought[:8], *orders.by_budget(columns, bought[:8])]
    assert sorted(grid) == list(range(len(n)))
    widths = [unit * expected(grid[:k]) for k in range(8, len(n) + 1)]
    assert told["by_budget"]["width"] == pytest.approx(widths, rel=1e-3)
    enough = next(k for k, w in enumerate(widths) if w <= 0.2)
    assert told["reached_flops"]["by_budget"] == pytest.approx(np.cumsum(C[grid])[7 + enough])
    blind = [bought[-1]]  # it diverged: paid for, and told nothing, in any order
    seeing = orders.spread_of_target(found, Target("a"), columns, blind)
    seen = orders.compare(seeing, columns, lambda some: C[some].sum(), bought, 8, 0.2)
    unit = 0.2 / expected(bought[:-1])
    assert seen["designed"]["width"] == pytest.approx([unit * expected(bought[:k]) for k in (8, 9, 10, 10)], rel=1e-3)
    whole = [i for i in grid if i not in blind]
    assert seen["by_budget"]["width"][-1] == pytest.approx(unit * expected(whole), rel=1e-3)
    random, reached = told["random"], told["reached_flops"]
    assert (random["narrow"] <= random["width"]).all()
    assert (random["width"] <= random["wide"]).all()
    assert random["width"][-1] == pytest.approx(widths[-1], rel=1e-3)  # all of them, whatever the order
    assert reached["random_low"] <= reached["random"] <= reached["random_high"]


def test_a_target_that_the_law_fixes_or_rows_leave_open_has_no_other_order():
    found = analyse(data.isoflop(noise=0.004), laws=("chinchilla_tied",), bootstrap=0)
    columns = {c: found.observations.columns[c] for c in ("num_params", "num_tokens", "flops")}
    cost, order = (lambda some: columns["flops"][list(some)].sum()), np.argsort(columns["flops"]).tolist()
    fixed = orders.spread_of_target(found, Target("a"), columns)
    assert orders.compare(fixed, columns, cost, order[:9], 6, width=0.0) is None
    found = analyse(data.isoflop(noise=0.004), laws=("chinchilla",), bootstrap=0)
    horizon = [i for i in order if columns["num_tokens"][i] == columns["num_tokens"][order[0]]]
    left = orders.spread_of_target(found, Target("a"), columns)
    assert orders.compare(left, columns, cost, horizon, 1, width=0.1) is None


def test_of_a_loss_other_orders_leave_what_no_run_takes_away():
    """However many runs: the root of Laplace's variance of the surface law and of ``Beliefs.rest``."""
    found = analyse(data.isoflop(noise=0.004), laws=("chinchilla", "chinchilla_tied"), bootstrap=0)
    columns = {c: found.observations.columns[c] for c in ("num_params", "num_tokens", "flops")}
    target, every = Target.of("loss@1e23"), list(range(len(columns["flops"])))
    rest = believe(found, columns, target).rest
    alone = believe(found, columns, target, alone=True)
    assert rest > 0
    at_all = orders.spread_of_target(found, target, columns)(every)
    assert at_all**2 == pytest.approx(alone.variance(alone.start) + rest, rel=1e-3)


@pytest.mark.slow
def test_designed_runs_take_fewer_flops_than_an_isoflop_grid_and_random_ones():
    """Sixteen simulated studies: until the interval of a is .05 wide, from the same cheap runs on, what is proposed
    takes less than budgets from the cheapest up, and a fraction of random runs; the intervals hold the truth."""
    n, C = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 3e9, 9), np.geomspace(1e18, 1e21, 7)))
    d = C / (6 * n)
    apart = (d / n > 0.05) & (d / n < 2e4)
    n, d, C = n[apart], d[apart], C[apart]
    exact = data.HOFFMANN["beta"] / (data.HOFFMANN["alpha"] + data.HOFFMANN["beta"])
    spent, held = {"designed": [], "isoflop": [], "random": []}, []
    for seed in range(16):
        rng = np.random.default_rng(seed)
        loss = data.chinchilla(n, d) * np.exp(0.004 * rng.normal(size=len(n)))
        rows = from_table(pd.DataFrame({"num_params": n, "num_tokens": d, "flops": C, "loss": loss}))
        start = designed.begin(rows)
        mixed = iter(rng.permutation(np.setdiff1d(np.arange(len(n)), start)).tolist())
        for name, following in {
            "designed": lambda bought, found, rows=rows: designed.designed(rows, bought, found),
            "isoflop": designed.along(orders.by_budget(rows.columns, start)),
            "random": designed.along(mixed),
        }.items():
            told = designed.buy(rows, following, start, 0.05)
            assert told["reached"]
            spent[name].append(np.log(told["flops"]))
            if name == "designed":
                held.append(told["interval"][0] <= exact <= told["interval"][1])
    assert np.mean(spent["designed"]) < np.mean(spent["isoflop"]) + np.log(0.85)
    assert np.mean(spent["designed"]) < np.mean(spent["random"]) + np.log(0.25)
    assert sum(held) >= 12


@pytest.mark.slow
def test_the_curve_of_a_table_is_told_by_the_command(monkeypatch, capsys, tmp_path):
    """Of a known law of few runs: every order begins alike, ends within the width asked or with all, and is printed."""
    from scaling.bench import __main__ as command

    rows = from_table(data.isoflop(noise=0.004))
    monkeypatch.setattr(designed, "tables", lambda: {"made up": (rows, designed.LAW)})
    assert command.main(["--design-curve", "1", "--out", str(tmp_path / "curve.json")]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("made up: a width of", "designed", "isoflop", "random"))
    assert command.main(["--design-curve", "0"]) == 2
    assert "--design-curve is 0" in capsys.readouterr().err


def test_without_a_candidate_the_interval_is_told_and_nothing_is_proposed(found):
    none = {name: np.zeros(0) for name in ("num_params", "num_tokens", "flops")}
    told = propose(found, Candidates(none, (), lambda rows: 0.0), Target("a"), asked=0.01)
    assert told.steps == ()
    assert told.interval == Target("a").interval(found, 0.9)
    assert "no candidate" in " ".join(told.reasons)
    assert told.certificate.least is None
    assert told.certificate.reason == "none: there is no candidate"
