"""Coverage of the intervals that are printed, over seven kinds of noise and six designs whose law is known."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from scaling import records
from scaling.bench import laws
from scaling.laws.answers import coverage
from scaling.laws.forms import catalogue
from scaling.laws.tables.observations import Observations

NOISE = 0.004
LEVEL = 0.90
EVALUATION = 0.008  # nats, shared by all losses of a draw: what a validation split of some 10⁵ tokens leaves unknown


# The law of results/chinchilla, rounded: models so small that the least of them are not far below their ceiling.
BELOW_A_CEILING = {"E": 1.0, "L_0": 3.26, "A": 153.0, "alpha": 0.557, "B": 1190.0, "beta": 0.565}
CEILING = "7 budgets × 5 sizes, below a ceiling"


def designs() -> dict[str, Observations]:
    """Where the runs of six designs are: three grids of sizes by horizons, IsoFLOP budgets over shared sizes, a ladder
    of tokens per parameter, and budgets of small models, whose law has a ceiling (``BELOW_A_CEILING``)."""
    return {
        "5 sizes × 5 horizons": _grid(5, 5),
        "8 sizes × 5 horizons": _grid(8, 5),
        "12 sizes × 4 horizons": _grid(12, 4),
        "5 budgets × 8 sizes": _budgets(8, np.geomspace(1e18, 1e21, 5), np.geomspace(1e7, 1e10, 25), 0.09, 0.45),
        "10 sizes × 5 tokens/N": _ladder(10, 5),
        CEILING: _budgets(5, np.geomspace(7.5e9, 1.5e12, 7), np.geomspace(1.2e3, 4e5, 25), 0.09, 0.5),
    }


def _grid(sizes: int, horizons: int) -> Observations:
    n, d = np.meshgrid(np.geomspace(2e7, 2e9, sizes), np.geomspace(4e8, 4e10, horizons), indexing="ij")
    return _runs(n.ravel(), d.ravel())


def _budgets(sizes: int, budgets: np.ndarray, ladder: np.ndarray, k: float, a: float) -> Observations:
    """Each budget's sizes are those of the ladder that are nearest its optimum, k √C₀ (C / C₀)^a of the least budget C₀
    on, as a person would choose them."""
    n, d = [], []
    for C in budgets:
        best = k * budgets[0] ** 0.5 * (C / budgets[0]) ** a
        near = ladder[np.argsort(np.abs(np.log(ladder / best)))[:sizes]]
        n.append(near)
        d.append(C / 6 / near)
    return _runs(np.concatenate(n), np.concatenate(d))


def _ladder(sizes: int, ratios: int) -> Observations:
    n, ratio = np.meshgrid(np.geomspace(1e7, 2e9, sizes), np.geomspace(5, 320, ratios), indexing="ij")
    return _runs(n.ravel(), (n * ratio).ravel())


def study(
    num_draws: int = 400, report: Callable[[dict], None] | None = None, noises: Sequence[str] = coverage.NOISES
) -> list[dict]:
    """How often nominal 90 % intervals hold the truth, as the residuals' tests choose them; a row a noise and design.

    Rows hold ``noise``, ``design``, ``num_runs`` and, for a and for N* and the loss at ten times the largest compute,
    ``coverage``, median ``width`` and the estimate's ``rmse``: of the ``chosen`` interval, of the ``profile`` alone,
    and, where cells are repeated, of fits weighted by the noise ``measured`` between them. ``report`` is given each
    when done.
    """
    rows = []
    for noise in noises:
        twice = noise in coverage.REPEATED
        for name, design in designs().items():
            law, truth = ("saturating", BELOW_A_CEILING) if name == CEILING else ("chinchilla", laws.HOFFMANN)
            found = coverage.coverage(
                design, catalogue.FORMS[law], truth, noise=NOISE, kind=noise, level=LEVEL,
                flops=10 * float(design.columns["flops"].max()), num_draws=num_draws,
                methods=(coverage.CHOSEN, "profile", *([coverage.MEASURED] if twice else [])),
                evaluation=EVALUATION if twice else 0.0,
            )  # fmt: skip
            rows.append({"noise": noise, "design": name, "num_runs": len(design), **found})
            if report:
                report(rows[-1])
    return rows


def _runs(n: np.ndarray, d: np.ndarray) -> Observations:
    columns = {"num_params": n, "num_tokens": d, "flops": 6 * n * d}
    label = np.array([f"row {i}" for i in range(len(n))])
    return Observations(columns, np.ones(len(n)), np.ones(len(n)), label, np.full(len(n), np.nan))


def show(console: Console, num_draws: int, out: Path | None) -> None:
    """Prints a line a kind of noise and design, each when it is done: coverage of nominal 90 % intervals."""
    if num_draws < 1:
        raise ValueError(f"--coverage is {num_draws}: write 1 or more draws")

    def line(row: dict) -> None:
        shares = ", ".join(
            f"{label} {100 * row['chosen'][k]['coverage']:.1f} % (profile {100 * row['profile'][k]['coverage']:.1f} %)"
            for k, label in (("a", "a"), ("num_params", "N*"))
        )
        console.print(f"{row['noise']}, {row['design']}, {row['num_runs']} runs: {shares}")
        if measured := row.get("measured"):
            held = ", ".join(f"{k} {100 * measured[k]['coverage']:.1f} %" for k in ("a", "num_params", "loss"))
            ratio = measured["a"]["rmse"] / row["chosen"]["a"]["rmse"]
            console.print(f"  with noise measured between repeats: {held}; RMSE of a {ratio:.3f} of the unweighted")

    rows = study(num_draws, line)
    if out:
        records.write_json(out, {"num_draws": num_draws, "rows": rows, "environment": records.software()})
