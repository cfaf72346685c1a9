"""Rounds of a design: the cells that begin it, those that a round buys, when it is over; one round at a time, from a
fit of all that was bought. Who trains, and keeps what was decided, is elsewhere (``scaling.rounds``)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy import stats

from scaling.laws.answers.design import Candidates, Target, propose, propose_of_groups
from scaling.laws.answers.design.of_groups import numbers_by_name
from scaling.laws.answers.design.proposal import EXPONENT
from scaling.laws.fitting import identify
from scaling.laws.forms.law import Form
from scaling.laws.tables.observations import Observations

if TYPE_CHECKING:
    from scaling.laws.analysis import Analysis
    from scaling.laws.answers.multiplier import Comparison

LEVEL = 0.90  # of the intervals that rounds narrow, and stop by
# Cells beyond one a parameter that a design begins with: with one degree of freedom the noise is hardly known, and the
# quantile of t is 6.3 where three have 2.35.
SPARE = 3
# A study that stops as soon as it is narrow stops where its few residuals happened to be small: of 500 simulated ones
# (tests/adaptive.py) 86 % of the 90 % intervals held a, and 68 % of those with 8 degrees of freedom. So it
# goes on until the width would do were the noise what it is with this probability at least, given its estimate.
CAUTION = 0.25
LEAST = 1e-300  # a budget that no candidate is within


class Step(Protocol):
    """A candidate that is bought, by its number, what it costs beside those before it, and the share of the target's
    variance that it takes away."""

    @property
    def candidate(self) -> int: ...

    @property
    def cost(self) -> float: ...

    @property
    def gain(self) -> float: ...


class Proposal(Protocol):
    """What a chooser says: the target's interval now, the part of its width that no run takes away, the steps that
    narrow it most for their cost, and why."""

    @property
    def steps(self) -> Sequence[Step]: ...

    @property
    def interval(self) -> tuple[float, float]: ...

    @property
    def width(self) -> float: ...

    @property
    def width_after(self) -> float: ...

    @property
    def shared_width(self) -> float: ...

    @property
    def reasons(self) -> Sequence[str]: ...


# (batch, exponent, budget left, level) by name → a proposal; it knows the fit, the candidates and the target.
Chooser = Callable[..., Proposal]
Cost = Callable[[Sequence[int]], float]  # of some candidates, by number, together


def by_proposal(found: "Analysis", columns: Mapping[str, np.ndarray], cost: Cost, target: Target) -> Chooser:
    """Chooses by ``design.propose`` among candidates that lie where ``columns`` say and have a ``cost``."""
    labels = tuple(map(str, range(len(columns["flops"]))))
    candidates = Candidates(dict(columns), labels, cost, "FLOPs")

    def choose(*, level: float, **asked: Any) -> Proposal:
        return propose(found, candidates, target, level=level, **asked)

    return choose


def by_proposal_of_groups(
    found: "Comparison", columns: Mapping[str, np.ndarray], cost: Cost, target: Target, groups: Sequence[str],
    member: Sequence[str],
) -> Chooser:  # fmt: skip
    """Chooses by ``design.propose_of_groups`` among candidates that are of the groups ``member``, by name.

    Raises ValueError for a candidate of a group that has no run.
    """
    labels = tuple(map(str, range(len(member))))
    candidates = Candidates(dict(columns), labels, cost, "FLOPs")
    of = numbers_by_name(found, member)

    def choose(*, level: float, **asked: Any) -> Proposal:
        return propose_of_groups(found, groups, candidates, of, target, **asked)

    return choose


@dataclass(frozen=True)
class Goal:
    """What rounds are to reach: an interval of at most this width, or so much spent; by steps of how many.

    ``exponent`` is κ of a candidate's gain / cost^κ.
    """

    interval: float | None = None
    budget: float | None = None
    batch: int = 4
    exponent: float = EXPONENT


@dataclass(frozen=True)
class Decision:
    """What follows after a fit: candidates ``chosen`` by number, or why it is over (``stop``), and what is known.

    ``width_expected``: of the interval when these are in; None where it is over. ``gains``, ``costs``: of each that is
    chosen, beside those before it; no gains where they were chosen by cost.
    """

    chosen: tuple[int, ...]
    interval: tuple[float, float]
    width: float
    width_expected: float | None
    cost: float
    reasons: tuple[str, ...]
    stop: str | None = None
    gains: tuple[float, ...] = ()
    costs: tuple[float, ...] = ()


def begin(columns: Mapping[str, np.ndarray], cost: np.ndarray, form: Form, source: str = "design") -> np.ndarray:
    """Chooses the cheapest cells that identify a law: rows (k,) of ``columns``, in order of ``cost`` (n,).

    They are the fewest in that order which have ``SPARE`` cells more than parameters, as many different sizes and
    horizons as the exponents need, and lie off any line on which one is a power of the other.
    Raises ValueError, in one line, where all of them do not.
    """
    order = np.argsort(cost, kind="stable")
    why = f"{source}: {form.name} has {len(form.parameters)} parameters and {len(order)} candidates"
    for k in range(len(form.parameters) + SPARE, len(order) + 1):
        rows = _bare({name: x[order[:k]] for name, x in columns.items()}, source)
        try:
            identify.check(rows, form)
        except ValueError as e:
            why = str(e)
            continue
        if not identify.on_a_ray(rows):
            return order[:k]
        why = f"{source}: tokens follow from the size in the cheapest {k} cells"
    raise ValueError(f"{why}: write design.seed_cells, or more cells of other sizes and horizons")


def _bare(columns: Mapping[str, np.ndarray], source: str) -> Observations:
    """Rows without losses, which say where runs are."""
    n = len(next(iter(columns.values())))
    label = np.array([f"row {i}" for i in range(n)])
    return Observations(dict(columns), np.ones(n), np.ones(n), label, np.full(n, np.nan), source)


def caution(degrees_of_freedom: int) -> float:
    """√(ν / χ²), χ² the quantile ``CAUTION`` of χ² with ν degrees of freedom: how many times the estimate of the noise
    may be too small."""
    nu = max(degrees_of_freedom, 1)
    return float(np.sqrt(nu / stats.chi2.ppf(CAUTION, nu)))


def decide(
    choose: Chooser, goal: Goal, spent: float, num_candidates: int, degrees_of_freedom: int | None = None
) -> Decision:
    """Says what a round buys, or why there is none: the interval is as narrow as was asked, nothing that narrows it is
    left within the budget, or nothing would narrow it at all.

    ``choose``: see ``Chooser``; ``spent``: what was bought so far; ``degrees_of_freedom``: of the fit, by which the
    stop by width is cautious (``caution``), None for a noise that is known.
    """
    # Of nothing left the interval is told all the same.
    left = None if goal.budget is None else max(goal.budget - spent, LEAST)
    said = choose(batch=goal.batch, exponent=goal.exponent, budget=left, level=LEVEL)
    known: dict[str, Any] = {"interval": tuple(said.interval), "width": said.width}
    times = 1.0 if degrees_of_freedom is None else caution(degrees_of_freedom)
    own = math.sqrt(max(said.width**2 - said.shared_width**2, 0.0))  # what all losses share is no part of their noise
    if goal.interval is not None and math.hypot(own * times, said.shared_width) <= goal.interval:
        stop = f"the interval is {said.width:.3g} wide, and {goal.interval:g} was asked"
        return Decision((), **known, width_expected=None, cost=0.0, reasons=(), stop=stop)
    if goal.interval is not None and said.shared_width >= goal.interval:
        stop = (
            f"the validation text's own error, which no run takes away, is {said.shared_width:.3g} of the interval's "
            f"width, and {goal.interval:g} was asked: hold out more text"
        )
        return Decision((), **known, width_expected=None, cost=0.0, reasons=tuple(said.reasons), stop=stop)
    if not said.steps:
        stop = "every candidate is bought" if not num_candidates else "no candidate is worth its cost"
        if num_candidates and left is not None:
            stop = f"none of {num_candidates} candidates is worth its cost within what is left, {left:.3g}"
        return Decision((), **known, width_expected=None, cost=0.0, reasons=tuple(said.reasons), stop=stop)
    chosen = tuple(step.candidate for step in said.steps)
    cost = sum(step.cost for step in said.steps)
    return Decision(
        chosen, **known, width_expected=said.width_after, cost=cost, reasons=tuple(said.reasons),
        gains=tuple(step.gain for step in said.steps), costs=tuple(step.cost for step in said.steps),
    )  # fmt: skip


def over(why: str) -> Decision:
    """Buys nothing more: what is in says that no run would give the interval."""
    return Decision((), (-math.inf, math.inf), math.inf, None, 0.0, (why,), stop=why)


def cheapest(cost: Cost, goal: Goal, spent: float, num_candidates: int, why: str) -> Decision:
    """Buys the next cells in order of cost, where those that are in have no law, or none with such a target: ``why``.

    ``cost``: of some candidates together.
    """
    left = math.inf if goal.budget is None else goal.budget - spent
    alone = [cost([i]) for i in range(num_candidates)]
    chosen: list[int] = []
    for i in sorted(range(num_candidates), key=alone.__getitem__)[: goal.batch]:
        if cost([*chosen, i]) <= left:
            chosen.append(i)
    nothing: dict[str, Any] = {"interval": (-math.inf, math.inf), "width": math.inf, "width_expected": None}
    if not chosen:
        left_over = "no candidate within what is left" if num_candidates else "every candidate is bought"
        return Decision((), **nothing, cost=0.0, reasons=(why,), stop=f"no interval, and {left_over}: {why}")
    return Decision(tuple(chosen), **nothing, cost=cost(chosen), reasons=(f"the cheapest: {why}",))


def told(design: Mapping[str, Any]) -> dict[str, Any]:
    """A design's rounds as fit.json has them, from those of sweep.json: each with the width that came of it.

    Of a round ``width`` is what its choice knew, ``width_after`` what the next one, or the end, found.
    """
    rounds, end = list(design.get("rounds") or []), design.get("stopped") or {}
    after = [*(r.get("width") for r in rounds[1:]), end.get("width")]
    return {
        **{
            key: design.get(key)
            for key in ("target", "compare", "interval", "budget_flops", "batch", "exponent", "level")
        },
        "rounds": [
            {
                "cells": r["cells"],
                "width": r.get("width"),
                "width_expected": r.get("width_expected"),
                "width_after": width,
                "cost_flops": r["cost_flops"],
                "spent_flops": r["spent_flops"],
                "reasons": r.get("reasons") or [],
            }
            for r, width in zip(rounds, after)
        ],
        "stopped": end.get("reason"),
        "reached": end.get("interval"),
        "orders": end.get("orders"),
    }
