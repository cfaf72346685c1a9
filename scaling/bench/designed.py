"""How many FLOPs an exponent takes: runs bought as ``laws.answers.design`` proposes, budget by budget, and at random.

The rows of a table that has been trained are the candidates, each at its own FLOPs; a loss is seen when its row is
bought. All three orders begin with the same rows, the cheapest that identify the law, and go on, ``BATCH`` at a time
or a tenth of what is there, until the fit's own interval of a is as narrow as was asked.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from scaling import records
from scaling.bench import published
from scaling.laws.analysis import Analysis
from scaling.laws.answers import allocation
from scaling.laws.answers.design import Candidates, Target, propose
from scaling.laws.answers.design import orders as orders_of
from scaling.laws.answers.rounds import SPARE
from scaling.laws.fitting import identify
from scaling.laws.fitting.estimate import fit
from scaling.laws.forms import catalogue
from scaling.laws.intervals import diagnosis
from scaling.laws.intervals.profile import profile
from scaling.laws.payload import finite
from scaling.laws.tables.observations import Observations, from_table, read_csv

LAW = "chinchilla"
OWN_LAW = "saturating"  # of the default sweep, over whose decades a sum of two powers misses a bend
TARGET = Target("a")
WIDTH, LEVEL = 0.10, 0.90  # ±.05
ABOVE_ALL = 1.25  # times what all rows leave: the width asked of a table that does not reach ``WIDTH``
BATCH = 4
ORDERS = 20  # random ones
# Published tables ($SCALING_PUBLISHED): rows that one law of N and D is of. Up to four epochs repeated tokens are worth
# nearly as much as new ones (Muennighoff et al. 2023, arXiv 2305.16264).
PUBLISHED = {
    "epoch_chinchilla": lambda t: t[t["used_240"] == 1],
    "gemstones": lambda t: t[t["subset"] == "cool_end"].drop(columns="run"),
    "datablations_182": lambda t: t[t["epochs"] <= 4].drop(columns="unique_tokens"),
}


def tables() -> dict[str, tuple[Observations, str]]:
    """The candidates and the law that is fitted: published ones that are there, and the default sweep's own records."""
    folder, out = published.folder(), {}
    for name, rows in PUBLISHED.items():
        path = folder / f"{name}.csv"
        if path.is_file():
            out[name] = from_table(rows(read_csv(path)), source=str(path)), LAW
    own = Path("results/chinchilla")
    if (own / "runs").is_dir():
        table = records.load(own)
        out[str(own)] = from_table(table.assign(holdout=False), source=str(own)), OWN_LAW
    return out


def known(rows: Observations, law: str = LAW, **options: Any) -> Analysis:
    """A law of these rows with what its interval is made of, and nothing else of an analysis; ``options`` of ``fit``.

    Raises ValueError where they do not identify it.
    """
    fitted = fit(rows, law, **options)
    told = diagnosis.diagnose(fitted)
    # Draws are the interval where errors are shared or uneven, and cost nothing there, or E is 0; else the profile is.
    count = 1000 if told.groups is not None else 200 if fitted.at_bound else 1
    draws = diagnosis.resample(fitted, told, count)
    profiles = {} if fitted.at_bound else {law: {"E": profile(fitted, "E", LEVEL)}}
    cost = allocation.cost_of(*(rows.columns[c] for c in ("num_params", "num_tokens", "flops")))
    return Analysis(
        rows, {law: fitted}, {law: draws}, cost, {}, {}, (), profiles=profiles, noise={law: told},
    )  # fmt: skip


def begin(rows: Observations, law: str = LAW) -> np.ndarray:
    """The cheapest rows that identify the law, in order of cost."""
    order = np.argsort(rows.columns["flops"], kind="stable")
    form = catalogue.FORMS[law]
    for k in range(len(form.parameters) + SPARE, len(order)):
        chosen = rows.take(order[:k])
        try:
            identify.check(chosen, form)
            known(chosen, law)
        except ValueError:
            continue
        if not identify.on_a_ray(chosen):
            return order[:k]
    return order


def _batch(bought: np.ndarray) -> int:
    return max(BATCH, len(bought) // 10)


def designed(rows: Observations, bought: np.ndarray, found: Analysis | None) -> np.ndarray:
    """The next rows by the proposal; the cheapest where these do not identify the law."""
    rest = np.setdiff1d(np.arange(len(rows)), bought)
    columns = {c: rows.columns[c][rest] for c in ("num_params", "num_tokens", "flops")}
    cost = columns["flops"]
    if found is None:
        return rest[np.argsort(cost, kind="stable")][: _batch(bought)]
    candidates = Candidates(columns, tuple(map(str, rest)), lambda chosen: float(cost[list(chosen)].sum()))
    proposal = propose(found, candidates, TARGET, batch=_batch(bought), level=LEVEL)
    return rest[[step.candidate for step in proposal.steps]]


def along(order: Iterator[int]) -> Callable[[np.ndarray, Any], np.ndarray]:
    """The next rows of an order that is known before."""
    return lambda bought, found: np.array([i for _, i in zip(range(_batch(bought)), order)], dtype=int)


def buy(
    rows: Observations,
    following: Callable[[np.ndarray, Any], np.ndarray],
    start: np.ndarray,
    goal: float = WIDTH,
    law: str = LAW,
) -> dict[str, Any]:
    """Buys until the interval is at most ``goal`` wide or nothing is left: runs, flops, a, interval, width and whether
    it was reached."""
    bought = start
    while True:
        try:
            found = known(rows.take(bought), law)
        except ValueError:  # more of these rows did worse: on to the next
            found = None
        interval = (-np.inf, np.inf) if found is None else TARGET.interval(found, LEVEL)
        reached = TARGET.width(interval) <= goal
        more = np.zeros(0, dtype=int) if reached or len(bought) == len(rows) else following(bought, found)
        if not len(more):
            a = None if found is None else float(allocation.exponents(found.fits[law].form, found.fits[law].params)[0])  # type: ignore[index]  # it has them
            return {
                "runs": len(bought), "flops": float(rows.columns["flops"][bought].sum()), "a": a,
                "interval": interval, "width": TARGET.width(interval), "reached": reached,
            }  # fmt: skip
        bought = np.concatenate([bought, more])


def measure(rows: Observations, orders: int = ORDERS, law: str = LAW) -> dict[str, Any]:
    """What each order takes of one table; of random ones all."""
    start = begin(rows, law)

    def shuffled(seed: int) -> Iterator[int]:
        return iter(orders_of.at_random(len(rows), start, seed))

    whole = buy(rows, lambda bought, found: np.zeros(0, dtype=int), np.arange(len(rows)), law=law)
    goal = WIDTH if whole["reached"] else ABOVE_ALL * whole["width"]
    return {
        "num_runs": len(rows),
        "goal": goal,
        "begin": {"runs": len(start), "flops": float(rows.columns["flops"][start].sum())},
        "all": whole,
        "designed": buy(rows, lambda bought, found: designed(rows, bought, found), start, goal, law),
        "isoflop": buy(rows, along(orders_of.by_budget(rows.columns, start)), start, goal, law),
        "random": [buy(rows, along(shuffled(seed)), start, goal, law) for seed in range(orders)],
    }


def show(console: Console, orders: int, out: Path | None) -> None:
    """Prints a line a table, each when it is done: FLOPs until the 90 % interval of a is as narrow as was asked."""
    if orders < 1:
        raise ValueError(f"--design-curve is {orders}: write 1 or more random orders")

    def told(row: dict) -> str:
        lower, upper = row["interval"]
        ends = f"a {row['a']:.3f}, {lower:.3f}–{upper:.3f}" if row["a"] is not None else "no law"
        return f"{row['flops']:.2e} ({row['runs']} runs; {ends}{'' if row['reached'] else '; not reached'})"

    found = {}
    for name, (rows, law) in tables().items():
        found[name] = row = measure(rows, orders, law)
        spent = sorted(r["flops"] if r["reached"] else math.inf for r in row["random"])
        middle = f"{statistics.median(spent):.2e}, {spent[0]:.2e} to {spent[-1]:.2e}"
        held = sum(r["interval"][0] <= row["all"]["a"] <= r["interval"][1] for r in row["random"])
        console.print(f"{name}: a width of {row['goal']:.3f}; all {told(row['all'])}", soft_wrap=True)
        for order in ("designed", "isoflop"):
            console.print(f"  {order} {told(row[order])}", soft_wrap=True)
        console.print(f"  random {middle}; {held} of {orders} hold the a of all runs", soft_wrap=True)
    if out:
        records.write_json(out, {"orders": orders, "tables": finite(found), "environment": records.software()})
