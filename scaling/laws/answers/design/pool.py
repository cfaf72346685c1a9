"""Choosing runs out of a pool, of any columns, so that all targets are predicted: which forms are right is not known.

Where ``proposal`` serves one question of a law of size and data that has been fitted, this begins with a single run,
before any law can be fitted without a prior, and buys until the budget is spent. Every form is fitted with a prior of
its own (``Prior``), takes part by what the bought runs say for it (``ensemble``), and the next run is the one whose
purchase should take away most of the targets' mean variance, forms' disagreement included (``beliefs``), for its cost.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scaling.laws.answers.design.beliefs import LEAST_WEIGHT, Beliefs
from scaling.laws.answers.design.proposal import EXPONENT
from scaling.laws.fitting.coordinates import Coordinates, Derivatives, Model
from scaling.laws.fitting.identify import LEAST_NOISE
from scaling.laws.fitting.solver import DEFAULT_DELTA, Objective, Problem, Solution, solve
from scaling.laws.fitting.starts import distinct, start_grid
from scaling.laws.forms.catalogue import FORMS
from scaling.laws.forms.law import Form
from scaling.laws.forms.settings import any_columns
from scaling.laws.tables.observations import Observations

Columns = Mapping[str, np.ndarray]

# What is known of a run's noise before its residuals tell it, as much as two runs would.
NOISE, NOISE_RUNS = LEAST_NOISE, 2.0
# A term is about a tenth of the loss at the data's centre, within a factor e² either way.
AMPLITUDE, AMPLITUDE_SD = -2.3, 2.0
MIN_SD = 0.3  # of a parameter whose form names one start only
# Fresh starts of every refit beside the last optimum: a fit that only follows it stays in its valley when new runs have
# opened a better one.
FRESH, FINISHED = 10, 2
ROUGH_ITERATIONS, ITERATIONS = 15, 30  # of the search among starts, and of what it ends at
ROUGH_ROWS = 160
# Laws are fitted again when there are so many times the runs of the last fit; of all forms, of the last fit of all.
REFIT, REFIT_ALL = 1.1, 1.5
LOOKAHEAD = 8  # runs left in a budget for which whole plans are compared


class Prior:
    """What is assumed of a form's parameters before its runs: normal in the coordinates that are fitted.

    Exponents, optima and scales lie where the form's own multi-start looks for them: about the middle of its starts,
    with half their range as standard deviation. Amplitudes: ``AMPLITUDE``; E: half of the loss ± half of it.
    """

    def __init__(self, coordinates: Coordinates, loss: np.ndarray) -> None:
        scale = float(np.median(np.abs(loss)))
        spread = max(float(np.median(np.abs(loss - np.median(loss)))), 0.1 * scale)
        mean, sd = [], []
        for name, p in coordinates.form.parameters.items():
            if p.kind in ("amplitude", "critical"):
                centre, width = (AMPLITUDE if p.kind == "amplitude" else 0.0), AMPLITUDE_SD
            elif p.linear:
                low = float(np.min(loss)) - spread
                centre, width = (low, 2 * spread) if p.lower < 0 else (0.5 * scale, 0.5 * scale)
            else:
                starts = np.array(coordinates.starts[name] or (1.0,), dtype=np.float64)
                starts = np.log(starts) if p.kind in ("log", "location") else starts
                centre, width = (starts.min() + starts.max()) / 2, max(np.ptp(starts) / 2, MIN_SD)
            mean.append(centre)
            sd.append(width)
        self.mean = np.clip(np.array(mean), coordinates.lower, coordinates.upper)
        self.sd = np.array(sd)


class WithPrior:
    """A model whose rows are in units of their noise, and below them a row a parameter: (θ - mean) / sd."""

    def __init__(self, model: Model, noise: np.ndarray, prior: Prior) -> None:
        self.model, self.noise, self.prior = model, noise, prior
        self.form, self.coordinates, self.log = model.form, model.coordinates, model.log

    def target(self, loss: np.ndarray) -> np.ndarray:
        """What the rows should be."""
        return np.concatenate([(np.log(loss) if self.log else loss) / self.noise, np.zeros(len(self.prior.mean))])

    def derivatives(self, theta: np.ndarray) -> Derivatives:
        value, jacobian, second = self.model.derivatives(theta)
        B, P, n = jacobian.shape
        own = np.broadcast_to(np.diag(1 / self.prior.sd), (B, P, P))

        def both(c: np.ndarray, v: np.ndarray) -> np.ndarray:
            ours = np.einsum("bp,pq->bpq", c[:, n:] / self.prior.sd**2, np.eye(P))
            return second(c[:, :n] / self.noise**2, v[:, :n] / self.noise) + ours

        value = np.concatenate([value / self.noise, (theta - self.prior.mean) / self.prior.sd], axis=1)
        return value, np.concatenate([jacobian / self.noise, own], axis=2), both


@dataclass(frozen=True)
class Member:
    """A form as the bought runs leave it: its optimum θ, a root of its covariance (P, P), its noise (of log loss, or of
    the level), and the logarithm of what the runs say for it. ``optima`` are those that the search found."""

    form: Form
    model: Model
    theta: np.ndarray
    root: np.ndarray
    noise: float
    evidence: float
    optima: np.ndarray = field(repr=False)

    def at(self, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
        """(log loss or level (m,), its spread (m, P)) at new runs."""
        own = {c: columns[c] for c in self.form.columns}
        model = Model(self.model.coordinates, own, self.model.log, self.model.exact)
        value, jacobian, _ = model.derivatives(self.theta[None])
        return value[0], jacobian[0].T @ self.root


def fit_member(
    form: Form, everything: Columns, bought: Columns, loss: np.ndarray, near: np.ndarray | None = None, seed: int = 0,
    far: np.ndarray | None = None,
) -> Member | None:  # fmt: skip
    """Fits a form to bought runs under its prior; None where it gives no finite loss.

    Args:
      everything: columns of all runs that may be bought or are asked for: where the data's centre is. No losses.
      bought: columns of the runs that ``loss`` is of.
      near: optima (k, P) of an earlier fit, tried beside fresh starts.
      far: of each bought run, the ratio of its residual's deviation to that of one among the targets (``Pool.far``).
    """
    coordinates = Coordinates(form, everything, loss)
    prior = Prior(coordinates, loss)
    log = not form.signed and bool((loss > 0).all())
    model = Model(coordinates, bought, log, exact=form.powers is not None)
    unit = 1.0 if log else float(np.median(np.abs(loss)))
    target = np.log(loss) if log else loss
    n, P = len(loss), len(prior.mean)
    rng = np.random.default_rng(seed)
    delta = DEFAULT_DELTA["huber"]
    far = np.ones(n) if far is None else far

    def solved(noise: float, rows: np.ndarray, theta: np.ndarray, iterations: int) -> Solution:
        own = WithPrior(model.take(rows), noise * far[rows], prior)
        problem = Problem(own, own.target(loss[rows]), Objective("huber", delta), coordinates.lower, coordinates.upper)
        return solve(problem, theta, np.ones(len(rows) + P), iterations)

    some, every = np.arange(n) if n <= ROUGH_ROWS else rng.choice(n, ROUGH_ROWS, replace=False), np.arange(n)
    starts = _fresh(model.take(some), {c: x[some] for c, x in bought.items()}, loss[some], prior, rng)
    noise = NOISE * unit
    found = solved(3 * noise, some, starts if near is None else np.concatenate([near, starts]), ROUGH_ITERATIONS)
    first, _ = distinct(found)
    if not len(first):
        return None
    theta = found.theta[first[:FINISHED]]
    for _ in range(3):
        found = solved(noise, every, theta, ITERATIONS)
        theta, best = found.theta, int(np.argmin(found.objective))
        off = np.abs(model.value(theta[best][None])[0] - target) / far
        told = min(P, n) * n / (n + P)  # as many residuals as the parameters take up
        pulled = (off * np.minimum(off, delta * noise)).sum()
        new = float(np.sqrt((NOISE_RUNS * (NOISE * unit) ** 2 + pulled) / (NOISE_RUNS + max(n - told, 0.0))))
        settled, noise = abs(np.log(new / noise)) < 0.05, new
        if settled:
            break
    if not np.isfinite(found.objective[best]):
        return None
    values, vectors = np.linalg.eigh(found.gauss[best])
    values = np.maximum(values, 1e-12)
    # Laplace: the likelihood of the runs and the prior at the optimum, and the volume that the runs leave of it.
    volume = -0.5 * np.log(values).sum() - np.log(prior.sd).sum()
    evidence = float(-found.objective[best] - n * np.log(noise / unit) + volume)
    return Member(form, model, theta[best], vectors / np.sqrt(values), noise, evidence, theta)


def _fresh(model: Model, bought: Columns, loss: np.ndarray, prior: Prior, rng: np.random.Generator) -> np.ndarray:
    """Starts (FRESH + 1, P): half of the form's own grid, where linear parameters are solved for; half of the prior."""
    n, P = len(loss), len(prior.mean)
    label = np.full(n, np.nan)
    grid = start_grid(model, Observations(dict(bought), loss, np.ones(n), label.astype(str), label))
    own = grid[rng.choice(len(grid), min(len(grid), FRESH // 2), replace=False)]
    drawn = prior.mean + prior.sd * rng.normal(size=(FRESH - len(own), P))
    coordinates = model.coordinates
    return np.clip(np.concatenate([own, drawn, prior.mean[None]]), coordinates.lower, coordinates.upper)


@dataclass(frozen=True)
class Ensemble:
    """Forms fitted to the same bought runs, and the weight of each (summing to one)."""

    members: tuple[Member, ...]
    weights: np.ndarray

    @property
    def leading(self) -> "Ensemble":
        """The form of most weight alone."""
        return Ensemble((self.members[int(np.argmax(self.weights))],), np.ones(1))

    def predict(self, columns: Columns) -> np.ndarray:
        """Losses (m,) of new runs: the weighted mean of the forms', of logs where losses are positive."""
        value = sum(w * m.at(columns)[0] for w, m in zip(self.weights, self.members))
        return np.exp(value) if self.members[0].model.log else np.asarray(value)


class PooledBeliefs(Beliefs):
    """Beliefs of several targets at once: ``target`` is (m, R), a variance the mean over them."""

    @property
    def start(self) -> np.ndarray:
        return np.eye(self.target.shape[1])

    def variance(self, S: np.ndarray) -> float:
        return float(((self.target @ S) * self.target).sum(axis=1).mean())

    def falls(self, S: np.ndarray) -> np.ndarray:
        moved = self.rows @ S
        return ((moved @ self.target.T) ** 2).mean(axis=1) / (self.noise + (moved * self.rows).sum(axis=1))

    def informs(self, S: np.ndarray) -> np.ndarray:
        """How much each candidate adds to the logarithm of the information's determinant (n,): D-optimality."""
        return np.log1p(((self.rows @ S) * self.rows).sum(axis=1) / self.noise)


def beliefs(ensemble: Ensemble, candidates: Columns, targets: Columns, far: np.ndarray) -> PooledBeliefs:
    """Targets and candidates as linear functions of normal variables: of each form's parameters, and of which is right.

    See ``design.beliefs``: the covariance of the forms' mixture, the first by √weight × spread, the second by the
    differences of their values from the weighted mean.
    """
    m = len(next(iter(targets.values())))
    both = {c: np.concatenate([targets[c], candidates[c]]) for c in targets}
    told = [member.at(both) for member in ensemble.members]
    value = np.array([v for v, _ in told])
    features = [np.sqrt(w) * spread for w, (_, spread) in zip(ensemble.weights, told)]
    if len(told) > 1:
        features.append(((value - ensemble.weights @ value) * np.sqrt(ensemble.weights)[:, None]).T)
    joint = np.concatenate(features, axis=1)
    noise = float(ensemble.weights @ np.array([member.noise**2 for member in ensemble.members]))
    return PooledBeliefs(joint[:m], joint[m:], noise * far**2, 0.0, {})


@dataclass(frozen=True)
class Pool:
    """Runs that may be bought, what they cost, and what is to be predicted; no losses.

    Attributes:
      columns: of the candidates, each (n,), positive.
      cost: of each candidate (n,), in any unit.
      targets: the same columns of the runs that are to be predicted, each (m,).
      target: what laws predict (``Form.target``).
    """

    columns: dict[str, np.ndarray]
    cost: np.ndarray
    targets: dict[str, np.ndarray]
    target: str = "loss"

    @property
    def everything(self) -> dict[str, np.ndarray]:
        return {c: np.concatenate([x, self.targets[c]]) for c, x in self.columns.items()}

    @functools.cached_property
    def far(self) -> np.ndarray:
        """Deviation of a candidate's loss from its law beside that of a target, √(1 + h²), (n,).

        h is how far outside the targets' range it lies, in standard deviations of the log columns. What laws miss grows
        with distance (``answers.combination``), and they are wanted near the targets.
        """
        square = np.zeros(len(self.cost))
        for c, x in self.columns.items():
            u, goal = np.log(x), np.log(self.targets[c])
            out = np.maximum(np.maximum(goal.min() - u, u - goal.max()), 0.0)
            square += (out / max(float(np.log(self.everything[c]).std()), 1e-12)) ** 2
        return np.sqrt(1.0 + square)

    def of(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Columns of some candidates."""
        return {c: x[np.asarray(rows, dtype=int)] for c, x in self.columns.items()}

    def forms(self, signed: bool) -> list[Form]:
        """Every form of the catalogue of all columns that vary here and of no others, and three of any columns.

        A law without one of them says that it does not matter; those of any columns say so too where runs do.
        """
        varied = {c: float(np.log(x).mean()) for c, x in self.everything.items() if np.ptp(x) > 0}
        known = [f for f in FORMS.values() if f.target == self.target]
        known = [f for f in known if set(varied) <= set(f.columns) <= set(self.columns)]
        return known + list(any_columns(varied, self.target, signed or any(f.signed for f in known)).values())


def ensemble(
    pool: Pool, rows: Sequence[int], loss: np.ndarray, before: Ensemble | None = None, only_before: bool = False
) -> Ensemble:
    """Fits the forms to the bought runs and weighs them by what these say for each.

    The weight of a form is its evidence (Laplace's) to the power 1/T, T = max(1, n / 2P) of n runs and P parameters of
    the form with the most evidence: what a law misses is shared by neighbouring runs, and n of them are no n witnesses
    (Li et al. 2026, arXiv 2604.22753, temper their weights so, in their code). Forms below ``LEAST_WEIGHT`` are left
    out.

    Args:
      rows: numbers of the candidates bought; ``loss`` theirs.
      before: an earlier ensemble, near whose optima a search begins too.
      only_before: fit the forms of ``before`` alone.

    Raises ValueError where no form gives a finite loss.
    """
    known = {m.form.name: m for m in before.members} if before is not None else {}
    forms = [m.form for m in known.values()] if only_before else pool.forms(bool((loss <= 0).any()))
    far = pool.far[np.asarray(rows, dtype=int)]
    fitted = [
        fit_member(form, pool.everything, pool.of(rows), loss, _near(known.get(form.name)), len(loss), far)
        for form in forms
    ]
    members = [m for m in fitted if m is not None and np.isfinite(m.at(pool.targets)[0]).all()]
    if not members:
        raise ValueError(f"no law of {', '.join(pool.columns)} gives {pool.target} a finite value of every target")
    evidence = np.array([m.evidence for m in members])
    size = len(members[int(np.argmax(evidence))].theta)
    weights = np.exp((evidence - evidence.max()) / max(1.0, len(loss) / (2 * size)))
    kept = weights >= LEAST_WEIGHT * weights.sum()
    weights = weights[kept] / weights[kept].sum()
    return Ensemble(tuple(m for m, keep in zip(members, kept) if keep), weights)


def _near(member: Member | None) -> np.ndarray | None:
    """Optima of an earlier fit in the coordinates of any: scales move a little with the losses, a start may be off."""
    return None if member is None else member.optima


def start(pool: Pool, share: float, num: int) -> list[int]:
    """The cheapest ``num`` runs, as many of them as cost no more than ``share`` of all together; one at least."""
    order = np.argsort(pool.cost, kind="stable")
    within = int((np.cumsum(pool.cost[order]) <= share * pool.cost.sum() * (1 + 1e-12)).sum())
    return [int(i) for i in order[: max(1, min(num, within))]]


def _first_of_best_plan(
    known: PooledBeliefs, S: np.ndarray, cost: np.ndarray, within: np.ndarray, left: float, exponent: float
) -> int:
    """The first run of the plan that leaves least variance once the budget is spent, among greedy plans by fall over
    cost^κ, cost and nothing. A greedy choice by ratio alone may waste a budget of few runs, one by fall or ratio,
    whichever ends better, has a bound (Leskovec et al. 2007, CELF). Plans of more than ``LOOKAHEAD`` runs are not made:
    then it is κ."""
    found: list[tuple[float, int]] = []
    for power in (exponent, 0.0, 1.0):
        T, rest, free = S, left, within.copy()
        plan: list[int] = []
        while free.any() and len(plan) <= LOOKAHEAD:
            best = int(np.argmax(np.where(free, known.falls(T) / cost**power, -np.inf)))
            T, rest = known.bought(T, best), rest - cost[best]
            plan.append(best)
            free[best] = False
            free &= cost <= rest * (1 + 1e-12)
            if power == exponent and len(plan) == 1 and rest > LOOKAHEAD * cost[within].max():
                return best  # more than so many runs of any cost are left
        if len(plan) > LOOKAHEAD:
            return found[0][1] if found else plan[0]
        found.append((known.variance(T), plan[0]))
    return min(found)[1]


CRITERIA = ("designed", "v-optimal", "d-optimal")


def purchases(
    pool: Pool, reveal: Callable[[int], float], budget: float, *, criterion: str = "designed",
    exponent: float = EXPONENT, start_share: float = 0.02,
) -> Iterator[tuple[int, float]]:  # fmt: skip
    """Buys runs until no candidate is within what is left of the budget; yields (number, cost of all so far) of each.

    - ``designed``: the greatest expected fall of the targets' mean variance, of all forms and between them; of the last
      ``LOOKAHEAD`` runs that which begins the best plan for all that is left
    - ``v-optimal``: the same of the form of most weight alone
    - ``d-optimal``: the greatest gain of its information's log determinant, whatever the targets

    each over cost^``exponent``. Laws are fitted again when the runs are a tenth more than at the last fit, all forms
    when they are half as many again; in between a purchase changes variances alone, which its loss does not enter.

    Args:
      reveal: gives a run's loss, and is asked for a run only when it is bought.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}: write one of {', '.join(CRITERIA)}")
    rows = start(pool, start_share, max(len(f.parameters) for f in pool.forms(False)))
    losses = [reveal(i) for i in rows]
    spent = 0.0
    for i in rows:
        spent += float(pool.cost[i])
        yield i, spent
    left = np.ones(len(pool.cost), dtype=bool)
    left[rows] = False
    found, fitted, all_fitted = None, 0, 0
    while (within := left & (pool.cost <= (budget - spent) * (1 + 1e-12))).any():
        if found is None or len(rows) >= REFIT * fitted:
            full = found is None or len(rows) >= REFIT_ALL * all_fitted
            found = ensemble(pool, rows, np.array(losses), found, only_before=not full)
            fitted, all_fitted = len(rows), len(rows) if full else all_fitted
            known = beliefs(found if criterion == "designed" else found.leading, pool.columns, pool.targets, pool.far)
            S = known.start
        if criterion == "designed":
            best = _first_of_best_plan(known, S, pool.cost, within, budget - spent, exponent)
        else:
            gain = known.informs(S) if criterion == "d-optimal" else known.falls(S)
            best = int(np.argmax(np.where(within, gain / pool.cost**exponent, -np.inf)))
        S = known.bought(S, best)
        left[best] = False
        rows.append(best)
        losses.append(reveal(best))
        spent += float(pool.cost[best])
        yield best, spent
