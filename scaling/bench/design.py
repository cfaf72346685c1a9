"""How well targets are predicted from runs chosen one by one: what ``python -m scaling.bench --design`` prints.

A table ``design_NAME.csv`` of ``$SCALING_PUBLISHED`` has columns ``split`` (candidate: may be bought at ``cost``;
target: is predicted), ``cost``, optionally ``group`` (each a problem of its own), a loss, and what laws are of. The
published figures are of Li et al. 2026 (arXiv 2604.22753), table 2.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from scaling import records
from scaling.bench import published
from scaling.laws.answers.design.pool import CRITERIA, Pool, ensemble, purchases
from scaling.laws.tables import reading
from scaling.laws.tables.columns import ALIASES
from scaling.machine import processor

SHARES = (0.01, 0.05, 0.10)  # of the candidates' cost, after each of which the targets are predicted
START_SHARE = 0.02  # the cheapest runs that all begin with cost no more than this share
WORST = -1.0  # R² is clipped there, and nothing bought counts as it
RANDOM_ORDERS = 3
PUBLISHED = {  # R² at 10 %: best of the methods, V-optimal, D-optimal, random, all runs
    "data_constrained": (0.86, 0.85, 0.77, 0.12, 0.79),
    "lr_batch": (0.22, 0.18, -0.53, -0.33, 0.04),
    "vocab": (0.98, 0.98, 0.97, 0.59, 0.93),
    "parallel": (0.99, 0.99, 0.99, 0.19, 0.99),
}
METHODS = (*CRITERIA, "random", "all runs")
SETTINGS = {"group", "split", "cost"}


@dataclass(frozen=True)
class Problem:
    """One group of a table: what may be bought, the losses that only a purchase reveals, and the targets' losses, which
    nothing but the score sees."""

    name: str
    pool: Pool
    loss: np.ndarray
    target_loss: np.ndarray


def tables() -> dict[str, list[Problem]]:
    """Reads every ``design_*.csv`` of the ``published.folder``; the problems of each, by its name.

    Raises ValueError where there is none, or a table cannot be read as one.
    """
    folder = published.folder()
    found = sorted(folder.glob("design_*.csv"))
    if not found:
        raise ValueError(f"{folder}: no design_*.csv: set SCALING_PUBLISHED to the folder of the published tables")
    return {path.stem.removeprefix("design_"): problems(path) for path in found}


def problems(path: Path) -> list[Problem]:
    """Reads a table. Its loss is the one column with loss in its name; every other is one that laws are of.

    Raises ValueError naming the file and what is missing.
    """
    table = reading.read(path).rename(columns=lambda c: ALIASES.get(c, c))
    losses = [c for c in table.columns if "loss" in c]
    missing = [c for c in ("split", "cost") if c not in table] + (
        [] if len(losses) == 1 else ["one column of the loss"]
    )
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} is missing (there is {', '.join(table.columns)})")
    (target,) = losses
    unknown = sorted(set(table["split"]) - {"candidate", "target"})
    if unknown:
        raise ValueError(f"{path}: split is {unknown[0]!r}: write candidate or target")
    columns = [c for c in table.columns if c not in SETTINGS | {target}]
    bad = [c for c in (*columns, "cost") if not (table[c].to_numpy(np.float64) > 0).all()]
    if bad:
        raise ValueError(f"{path}: {bad[0]} is not a positive number in every row: write one")
    groups = table["group"].astype(str) if "group" in table else np.full(len(table), "all")
    found = []
    for group, rows in table.groupby(groups):
        bought, asked = (rows[rows["split"] == split] for split in ("candidate", "target"))
        if not len(bought) or not len(asked):
            raise ValueError(f"{path}: group {group} has no {'candidate' if not len(bought) else 'target'}: add one")
        own = [{c: part[c].to_numpy(np.float64) for c in columns} for part in (bought, asked)]
        pool = Pool(own[0], bought["cost"].to_numpy(np.float64), own[1], target)
        found.append(Problem(str(group), pool, *(part[target].to_numpy(np.float64) for part in (bought, asked))))
    return found


def r_squared(actual: np.ndarray, predicted: np.ndarray) -> float:
    """1 - Σ (y - ŷ)² / Σ (y - ȳ)², clipped at ``WORST``."""
    if not np.isfinite(predicted).all():
        return WORST
    return max(WORST, float(1 - ((actual - predicted) ** 2).sum() / ((actual - actual.mean()) ** 2).sum()))


def within(bought: Sequence[tuple[int, float]], limit: float) -> list[int]:
    """The runs bought before their cost together exceeded ``limit``; ``bought``: (number, cost of all so far)."""
    return [i for i, spent in bought if spent <= limit * (1 + 1e-12)]


def at_random(pool: Pool, budget: float, seed: int) -> Iterator[tuple[int, float]]:
    """Runs in random order, each that the rest of the budget pays for; (number, cost of all so far)."""
    spent = 0.0
    for i in np.random.default_rng(seed).permutation(len(pool.cost)):
        if spent + pool.cost[i] <= budget * (1 + 1e-12):
            spent += float(pool.cost[i])
            yield int(i), spent


def forecasts(problem: Problem, method: str) -> list[list[np.ndarray]]:
    """Losses of the targets (m,), foretold after each of ``SHARES`` of the cost by laws of the runs that ``method`` has
    chosen, averaged as for every other method; NaN before a run is bought. A list an order: ``RANDOM_ORDERS``, or one.
    """
    pool, total = problem.pool, float(problem.pool.cost.sum())

    def read(rows: Sequence[int]) -> np.ndarray:
        if not rows:
            return np.full(len(problem.target_loss), np.nan)
        return ensemble(pool, rows, problem.loss[list(rows)]).predict(pool.targets)

    if method == "all runs":
        return [[read(range(len(pool.cost)))] * len(SHARES)]
    limits, budget = [share * total for share in SHARES], SHARES[-1] * total
    if method == "random":
        orders = [list(at_random(pool, budget, seed)) for seed in range(RANDOM_ORDERS)]
    else:
        orders = [list(purchases(pool, problem.loss.__getitem__, budget, criterion=method, start_share=START_SHARE))]
    return [[read(within(order, limit)) for limit in limits] for order in orders]


def scores(found: Sequence[Problem], method: str) -> tuple[list[float], list[float]]:
    """R² after each of ``SHARES``: the mean over the problems of a table, and that of all their targets together.

    The second is the one that was published: where losses differ more between groups than within, it is nearly 1 for
    whoever tells the groups apart.
    """
    told = [forecasts(problem, method) for problem in found]
    each = [[r_squared(p.target_loss, x) for x in order] for p, orders in zip(found, told) for order in orders]
    actual = np.concatenate([p.target_loss for p in found])
    together = [[r_squared(actual, np.concatenate(parts)) for parts in zip(*same_order)] for same_order in zip(*told)]
    return [float(r) for r in np.mean(each, axis=0)], [float(r) for r in np.mean(together, axis=0)]


def measure(report: Callable[[dict], None], methods: Sequence[str] = METHODS) -> list[dict]:
    """Scores every method on every table, groups averaged; ``report`` is given each row when it is done.

    Rows hold ``table``, ``method``, ``r_squared`` and ``together`` (``scores``) after each of ``SHARES``, ``seconds``.

    Raises ValueError as ``tables`` does.
    """
    rows = []
    for name, found in tables().items():
        for method in methods:
            begin = time.perf_counter()
            mean, together = scores(found, method)
            row = {"table": name, "method": method, "r_squared": mean, "together": together}
            rows.append(row | {"seconds": time.perf_counter() - begin})
            report(rows[-1])
    return rows


def show(console: Console, out: Path | None) -> None:
    """Prints a line a table and method, each when it is done, and then R² on the targets by method after 1, 5 and 10 %
    of the cost. Raises ValueError without the tables."""

    def line(row: dict) -> None:
        scores = ", ".join(f"{100 * share:g} % {r:.3f}" for share, r in zip(SHARES, row["r_squared"]))
        groups = ", ".join(f"{r:.3f}" for r in row["together"])
        of_groups = "" if row["together"] == row["r_squared"] else f"; of all groups' targets together {groups}"
        console.print(f"{row['table']}, {row['method']}: {scores}{of_groups} ({row['seconds']:.0f} s)")

    begin = time.perf_counter()
    rows = measure(line)
    found = {(row["table"], row["method"]): row["r_squared"] for row in rows}
    names = list(dict.fromkeys(row["table"] for row in rows))
    title = "mean R² on the targets after " + ", ".join(f"{100 * s:g}" for s in SHARES) + " % of the cost"
    table = Table("table", *METHODS, "published best at 10 %", title=title, title_justify="left")
    for name in names:
        cells = (" ".join(f"{r:.3f}" for r in found[name, method]) for method in METHODS)
        table.add_row(name, *cells, f"{PUBLISHED[name][0]:.2f}" if name in PUBLISHED else "–")
    means = (np.mean([found[name, method] for name in names], axis=0) for method in METHODS)
    best = [PUBLISHED[name][0] for name in names if name in PUBLISHED]
    table.add_row(
        "mean", *(" ".join(f"{r:.3f}" for r in mean) for mean in means), f"{np.mean(best):.3f}" if best else "–"
    )
    console.print(table)
    seconds = time.perf_counter() - begin
    console.print(f"{processor()}, one process: {seconds:.0f} s")
    if out:
        records.write_json(out, {"rows": rows, "seconds": seconds, "environment": records.software()})
