"""The order in which candidates are bought, one after the other, and what that leaves of the target's interval."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws.answers.allocation import FAR, Cost
from scaling.laws.answers.design import beliefs, mending
from scaling.laws.answers.design.beliefs import Beliefs, believe, root_covariance
from scaling.laws.answers.design.candidates import FREE, Candidates
from scaling.laws.answers.design.certificate import Certificate, least_budget
from scaling.laws.answers.design.target import Target

if TYPE_CHECKING:
    from scaling.laws.analysis import Analysis

EXPONENT = 0.4  # of a run's cost: Li et al. 2026 (arXiv 2604.22753), COST_EXP of their code


@dataclass(frozen=True)
class Step:
    """One run: number of the candidate, its cost beside those before it, the share of the target's present variance
    that it should take away, and the width that is left."""

    candidate: int
    cost: float
    gain: float
    width_after: float


@dataclass(frozen=True)
class Proposal:
    """What to run next.

    Attributes:
      steps: in the order bought, at most the batch, within the budget.
      interval: of the target now, the fit's own at ``level``; ``width`` its width, in logarithms of an allocation.
      width_after: expected once the steps have run: the width times the root of its variance's ratio, of the surface
        law for what the surface law's interval is of, of all forms for a loss. Variances are Laplace's, and know
        nothing of misfit and shared errors, as the interval does: only their ratio is used.
      shared_width: what of the width all runs share, which none takes away.
      next: the best run after these, where one is left within the budget.
      certificate: of the width that was asked for; None where none was.
      voters: weight of the forms asked.
      reasons: in words, why nothing is proposed among them.
    """

    target: Target
    level: float
    steps: tuple[Step, ...]
    interval: tuple[float, float]
    width: float
    width_after: float
    unit: str
    voters: dict[str, float]
    reasons: tuple[str, ...] = ()
    next: Step | None = None
    certificate: Certificate | None = None
    shared_width: float = 0.0

    @property
    def cost(self) -> float:
        return sum(step.cost for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """As plain Python; what is not finite stays so (``payload.finite`` makes it null)."""
        return {**dataclasses.asdict(self), "target": str(self.target), "cost": self.cost}


def propose(
    found: "Analysis", candidates: Candidates, target: Target, *, batch: int = 1, exponent: float = EXPONENT,
    budget: float | None = None, level: float = 0.9, asked: float | None = None,
) -> Proposal:  # fmt: skip
    """Chooses the runs that narrow a target's interval most for their cost: greedily, by the expected fall of its
    variance over cost^``exponent``, each given those chosen before it (``beliefs``).

    Where the interval has no end, the first is the run that should give it one: refitted with the loss that the law
    expects of it, the profile has both ends.

    Args:
      budget: the most that the runs may cost together, in the candidates' unit.
      level: of the interval.
      asked: a width; what reaching it takes is the ``certificate``.

    Raises:
      ValueError: no law of N and D was fitted, or the surface law has no such target.
    """
    check_asked(batch, exponent, budget, asked)
    _check(found, candidates, target)
    interval = target.interval(found, level)
    width = target.width(interval)
    if not len(candidates):
        why = "there is no candidate: every cell has its record, or none was named"
        return Proposal(target, level, (), interval, width, width, candidates.unit, {}, (why,),
                        certificate=unreached(asked, "there is no candidate"))  # fmt: skip
    known = believe(found, candidates.columns, target)
    reasons = list(known.reasons)
    fixed = target.shared_width(found, level)
    reasons += _of_the_text(fixed, asked)

    def proposal(steps: Sequence[Step] = (), **others: Any) -> Proposal:
        after = steps[-1].width_after if steps else width
        return Proposal(target, level, tuple(steps), interval, width, after, candidates.unit, known.voters,
                        tuple(reasons), shared_width=fixed, **others)  # fmt: skip

    if not known.voters:
        certificate = unreached(asked, "no form tells of the target yet")
        return proposal(_closing(found, candidates, budget, reasons), certificate=certificate)
    first = None
    if not math.isfinite(width):
        scored = _by_score(known, candidates, exponent, budget)
        first, said = mending.bounding(found, candidates.columns, target, level, scored)
        reasons += said
    shown = known if target.kind.is_loss else believe(found, candidates.columns, target, alone=True)
    shown = shown if shown.voters else known
    known, shown = (beliefs.sharing(b, width, fixed) for b in (known, shown))
    order = Order(known, shown, candidates, exponent, width, first)
    steps = order.take(batch, budget)
    left = None if budget is None else budget - sum(s.cost for s in steps)
    following = order.best(left)
    reasons += what_is_left(order, candidates, steps, following, budget)
    reasons += far(found.cost, candidates, [s.candidate for s in steps])
    certificate = None
    if asked is not None:
        start = Order(known, shown, candidates, exponent, width, first)
        certificate = least_budget(shown, candidates, width, asked, start.until(asked))
    return proposal(steps, next=following, certificate=certificate)


def _of_the_text(width: float, asked: float | None) -> list[str]:
    """Says how much of an interval's width all runs share, and how much text an ``asked`` width below it takes."""
    if not width:
        return []
    said = f"{width:.3g} of the width is the validation text's own error, which all runs share and no run takes away"
    if asked is not None and asked < width:
        said += f"; with {(width / asked) ** 2:.3g} times as much text that alone would be {asked:.3g}"
    return [said]


def unreached(asked: float | None, why: str) -> Certificate | None:
    """What is said of a width that was asked for where nothing is known of reaching it; None where none was asked."""
    return None if asked is None else Certificate(asked, None, None, 0.0, f"none: {why}")


def what_is_left(
    order: "Order", candidates: Candidates, steps: Sequence[Step], following: Step | None, budget: float | None
) -> list[str]:
    """Why there is no step, or none after those, in words."""
    if not steps:
        return [f"no candidate is within the budget of {budget:g} {candidates.unit}"]
    if following is None:
        within = " within the budget" if len(order.chosen) < len(candidates) else ""
        return [f"no candidate is left{within}"]
    return []


def far(cost: Cost, candidates: Candidates, chosen: Sequence[int]) -> list[str]:
    """Which of the runs lie where no row that ``cost`` is of is near, in words."""
    low, high = cost.tokens_per_param or (0.0, math.inf)
    n, d = (candidates.columns[c] for c in ("num_params", "num_tokens"))
    return [
        f"{candidates.labels[i]} has {d[i] / n[i]:.3g} tokens per parameter, the rows {low:.3g} to {high:.3g}: what it "
        "tells goes by a law that is extrapolated there"
        for i in chosen
        if not low / FAR <= d[i] / n[i] <= high * FAR
    ]


def _closing(found: "Analysis", candidates: Candidates, budget: float | None, reasons: list[str]) -> list[Step]:
    """The run that closes the direction which the surface law's rows leave open, where that is why no form votes."""
    fitted = found.fits[str(found.surface)]
    affordable = [i for i in range(len(candidates)) if budget is None or candidates.cost([i]) <= budget]
    columns = {c: np.asarray(x)[affordable] for c, x in candidates.columns.items()}
    closes = None
    if root_covariance(fitted) is None and affordable:
        closes = mending.identifying(fitted.observations, columns, fitted.form, fitted)
    if closes is None:
        reasons.append("no form tells of the target, and no candidate alone would change that: nothing is proposed")
        return []
    i, number = affordable[closes[0]], closes[1]
    reasons.append(f"the rows leave a direction of {fitted.form.name} open: this run closes it best (condition number "
                   f"{number:.3g})")  # fmt: skip
    return [Step(i, candidates.cost([i]), math.nan, math.inf)]


def check_asked(batch: int, exponent: float, budget: float | None, asked: float | None) -> None:
    """Raises ValueError on a number out of its range."""
    if batch < 1:
        raise ValueError(f"--batch is {batch}: write 1 or more")
    if not (math.isfinite(exponent) and exponent >= 0):
        raise ValueError(f"--exponent is {exponent}: write 0 or more")
    for option, v in (("--budget", budget), ("--interval", asked)):
        if v is not None and not (math.isfinite(v) and v > 0):
            raise ValueError(f"{option} is {v}: write a positive number")


def _check(found: "Analysis", candidates: Candidates, target: Target) -> None:
    source = found.observations.source
    if found.surface is None:
        raise ValueError(f"{source}: no law of N and D was fitted: write --law chinchilla")
    if problem := found.no_allocation if target.is_of_optimum else found.cost.problem:
        raise ValueError(f"{source}: no design: {problem}")
    for name in ("num_params", "num_tokens", "flops"):
        x = candidates.columns.get(name)
        if x is None or len(x) != len(candidates) or not (np.isfinite(x) & (x > 0)).all():
            raise ValueError(f"candidates: {name} is not a positive number of each: write one")


def _by_score(known: Beliefs, candidates: Candidates, exponent: float, budget: float | None) -> list[int]:
    """Candidates within the budget, the best first, each as if bought alone."""
    costs = np.array([candidates.cost([i]) for i in range(len(candidates))])
    score = known.falls(known.start) / np.maximum(costs, FREE * costs.max()) ** exponent
    return [int(i) for i in np.argsort(-score, kind="stable") if budget is None or costs[i] <= budget]


class Order:
    """Candidates bought one after the other: chosen by ``known``, what all forms know; widths are what ``shown`` makes
    of the interval's. ``first``: (number, width after it), of one that is bought before any other."""

    def __init__(
        self, known: Beliefs, shown: Beliefs, candidates: Candidates, exponent: float, width: float,
        first: tuple[int, float] | None = None,
    ) -> None:  # fmt: skip
        self.known, self.shown, self.candidates, self.exponent, self.first = known, shown, candidates, exponent, first
        self.S, self._S_shown = known.start, shown.start
        self.chosen: list[int] = []
        self.spent = 0.0
        self.width = width
        self._before = known.variance(self.S) + known.rest  # what gains are shares of
        self._floor = FREE * max((candidates.cost([i]) for i in range(len(candidates))), default=0.0)

    def best(self, left: float | None) -> Step | None:
        """The next run whose cost is within ``left``; None where there is none."""
        falls = self.known.falls(self.S)
        bound_to = self.first is not None and not self.chosen
        best: tuple[float, int, float] = (-1.0, -1, 0.0)
        for i in range(len(self.candidates)):
            if i in self.chosen or (bound_to and i != self.first[0]):  # type: ignore[index]  # there is one
                continue
            cost = max(self.candidates.cost([*self.chosen, i]) - self.spent, 0.0)
            if left is not None and cost > left * (1 + 1e-12):
                continue
            score = falls[i] / max(cost, self._floor, 1e-300) ** self.exponent
            best = max(best, (score, i, cost), key=lambda b: b[0])
        score, i, cost = best
        return None if i < 0 else Step(i, cost, float(falls[i] / self._before), self._width_after(i))

    def _width_after(self, i: int) -> float:
        if self.first is not None and not self.chosen:
            return self.first[1]
        now = self.shown.variance(self._S_shown) + self.shown.rest
        return self.width * math.sqrt(max(1 - self.shown.falls(self._S_shown)[i] / now, 0.0))

    def buy(self, step: Step) -> None:
        self.S = self.known.bought(self.S, step.candidate)
        self._S_shown = self.shown.bought(self._S_shown, step.candidate)
        self.chosen.append(step.candidate)
        self.spent = self.candidates.cost(self.chosen)
        self.width = step.width_after

    def take(self, batch: int, budget: float | None) -> list[Step]:
        """Buys at most ``batch`` within the budget."""
        steps: list[Step] = []
        while len(steps) < batch and (step := self.best(None if budget is None else budget - self.spent)) is not None:
            self.buy(step)
            steps.append(step)
        return steps

    def until(self, width: float) -> float | None:
        """Buys until the width is at most this: what that costs; None where all candidates are not enough."""
        while self.width > width:
            if (step := self.best(None)) is None:
                return None
            self.buy(step)
        return self.spent
