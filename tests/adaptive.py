"""Whether intervals stay honest although the data chose the design: adaptive studies of a law that is known.

A study begins with the cheapest cells, fits, buys by ``design.propose``, and ends as ``rounds.decide`` says, all as a
sweep does it; only its losses are drawn.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from scaling.laws.analysis import Analysis
from scaling.laws.answers import allocation, rounds
from scaling.laws.answers.combination import MEMBERS, combine
from scaling.laws.answers.coverage import synthetic
from scaling.laws.answers.design import Target
from scaling.laws.answers.design.of_groups import NotShared
from scaling.laws.answers.multiplier import compare
from scaling.laws.fitting.estimate import Fit, fit
from scaling.laws.forms import catalogue
from scaling.laws.forms.law import Form
from scaling.laws.intervals import diagnosis, resampling
from scaling.laws.intervals.profile import profile
from scaling.laws.tables.observations import Observations

SEED = 0


@dataclass(frozen=True)
class Study:
    """How one adaptive study ended.

    Attributes:
      interval: of the target, at the end; ``widths``: before each round, and at the end.
      num_cells: that were bought; ``spent``: what they cost.
      stop: why it ended, as ``rounds.decide`` says.
    """

    interval: tuple[float, float]
    widths: tuple[float, ...]
    num_cells: int
    spent: float
    stop: str


def simulate(
    grid: Observations,
    form: Form,
    truth: Mapping[str, float],
    target: Target,
    goal: rounds.Goal,
    *,
    noise: float,
    seed: int = 0,
    combined: bool = True,
) -> Study:
    """Carries out one study of a grid whose cells cost what their ``flops`` column says.

    Args:
      grid: whose columns say where the candidates are; its losses are not used.
      noise: standard deviation of log loss.
      combined: choose by the forms that forecasts combine, as a sweep does, not by ``form`` alone: takes longer.
    """
    drawn = synthetic(grid, form, truth, noise, np.random.default_rng([SEED, seed]))
    price = grid.columns["flops"]
    bought = list(rounds.begin(grid.columns, price, form))
    widths: list[float] = []
    while True:
        left = [i for i in range(len(drawn)) if i not in bought]
        found = _analysed(drawn.take(np.array(bought)), form, target, seed, combined)
        dof = found.fits[form.name].degrees_of_freedom
        columns = {name: x[left] for name, x in grid.columns.items()}
        choose = rounds.by_proposal(found, columns, _sum_of(columns["flops"]), target)
        said = rounds.decide(choose, goal, float(price[bought].sum()), len(left), dof)
        widths.append(said.width)
        if said.stop is not None:
            return Study(said.interval, tuple(widths), len(bought), float(price[bought].sum()), said.stop)
        bought += [left[i] for i in said.chosen]


def simulate_groups(
    grid: Observations, truth: Mapping[str, float], multiplier: float, target: Target, goal: rounds.Goal, *,
    noise: float, seed: int = 0, resamples: int = 0,
) -> Study:  # fmt: skip
    """Carries out one study of two groups, each of them on every cell of ``grid``, by Chinchilla's law: "new" has for C
    FLOPs the losses that "old" has for ``multiplier`` C."""
    form, n = catalogue.FORMS["chinchilla"], len(grid)
    as_if = grid.columns["num_params"] * multiplier**0.5, grid.columns["num_tokens"] * multiplier**0.5
    rng = np.random.default_rng([SEED, seed])
    exact = np.concatenate([form.predict(truth, num_params=a, num_tokens=b)
                            for a, b in ((grid.columns["num_params"], grid.columns["num_tokens"]), as_if)])  # fmt: skip
    columns = {name: np.tile(x, 2) for name, x in grid.columns.items()}
    loss, group = exact * np.exp(noise * rng.normal(size=2 * n)), np.repeat(["old", "new"], n)
    table = pd.DataFrame({**columns, "loss": loss, "group": group})
    price, cheapest = columns["flops"], rounds.begin(grid.columns, grid.columns["flops"], form)
    bought = [*cheapest, *(n + cheapest)]
    widths: list[float] = []
    while True:
        left = [i for i in range(2 * n) if i not in bought]
        there = {name: x[left] for name, x in columns.items()}
        cost = _sum_of(there["flops"])
        spent = float(price[bought].sum())
        try:
            found = compare(table.iloc[bought], "group", law="chinchilla", bootstrap=resamples, seed=seed)
            choose = rounds.by_proposal_of_groups(found, there, cost, target, ("new", "old"), list(group[left]))
            said = rounds.decide(choose, goal, spent, len(left), found.joint.degrees_of_freedom)
        except NotShared as e:  # as ``scaling.rounds`` goes on: exponents that seem to differ, or clearly do
            said = rounds.over(str(e)) if e.is_for_good else rounds.cheapest(cost, goal, spent, len(left), str(e))
        widths.append(said.width)
        if said.stop is not None:
            return Study(said.interval, tuple(widths), len(bought), spent, said.stop)
        bought += [left[i] for i in said.chosen]


def _sum_of(price: np.ndarray) -> rounds.Cost:
    return lambda some: float(price[list(some)].sum())


def _analysed(rows: Observations, form: Form, target: Target, seed: int, combined: bool) -> Analysis:
    """As ``analysis.analyse``, of one law, without what neither interval nor choice looks at."""
    fitted = fit(rows, form)
    noise = diagnosis.diagnose(fitted)
    drawn = noise.groups is not None or bool(fitted.at_bound)  # E = 0 has no profile
    draws = diagnosis.resample(fitted, noise, 400, seed) if drawn else _none(fitted, seed)
    columns = rows.columns
    cost = allocation.cost_of(columns["num_params"], columns["num_tokens"], columns["flops"])
    quantity = target.quantity(form, cost)
    assert quantity is not None  # a target of this law
    found = Analysis(
        observations=rows, fits={form.name: fitted}, draws={form.name: draws}, cost=cost, isoflop={}, envelope={},
        warnings=(), seed=seed, noise={form.name: noise},
        profiles={} if fitted.at_bound else {form.name: {target.name: profile(fitted, quantity)}},
    )  # fmt: skip
    members = tuple(dict.fromkeys([form.name, *MEMBERS]))
    return replace(found, combination=combine(rows, members, found.fits)) if combined else found


def _none(fitted: Fit, seed: int) -> Any:
    """Draws that nothing looks at where an interval is the profile's."""
    return resampling.bootstrap(fitted, 2, seed=seed)


def grid_of(sizes: np.ndarray, budgets: np.ndarray) -> Observations:
    """Candidates: every size at every budget of 6 N D."""
    n, c = (x.ravel() for x in np.meshgrid(sizes, budgets, indexing="ij"))
    columns = {"num_params": n, "num_tokens": c / (6 * n), "flops": c}
    return rounds._bare(columns, "candidates")


# Two worlds: of models as small as the default study's, by its own law, and of Hoffmann et al.'s (2022, approach 3).
WORLDS: dict[str, tuple[dict[str, float], Observations]] = {
    "the default study": (
        {"E": 0.806, "A": 12.97, "alpha": 0.306, "B": 456.9, "beta": 0.503},
        grid_of(np.geomspace(6e3, 3e5, 8), np.geomspace(2e11, 1.28e13, 7)),
    ),
    "Hoffmann et al. 2022": (
        {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28},
        grid_of(np.geomspace(3e7, 3e9, 8), np.geomspace(1e18, 1e21, 7)),
    ),
}


def coverage(
    world: str, goal: rounds.Goal, *, num_studies: int = 500, noise: float = 0.005, target: str = "a",
    combined: bool = True, report: Callable[[int, bool, Study], None] | None = None, first: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """How often the interval that a study ends with holds the truth: {coverage, width, num_cells, spent (medians)}.

    ``report`` is given each study's number, whether its interval holds the truth, and the study; ``first``: number of
    the first.
    """
    truth, grid = WORLDS[world]
    form, asked = catalogue.FORMS["chinchilla"], Target.of(target)
    quantity = asked.quantity(form, allocation.Cost())
    assert quantity is not None
    true, _ = asked.ends(np.repeat(quantity({k: np.array([v]) for k, v in truth.items()}), 2))
    studies, held = [], []
    for seed in range(first, first + num_studies):
        studies.append(simulate(grid, form, truth, asked, goal, noise=noise, seed=seed, combined=combined))
        low, high = studies[-1].interval
        held.append(bool(low <= true <= high))
        if report:
            report(seed, held[-1], studies[-1])
    middle = {
        "width": np.median([asked.width(s.interval) for s in studies]),
        "num_cells": np.median([s.num_cells for s in studies]),
        "spent": np.median([s.spent for s in studies]),
    }
    return {"coverage": float(np.mean(held)), **{k: float(v) for k, v in middle.items()}}
