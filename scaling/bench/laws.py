"""How fast the laws fit on this machine: the figures that ``python -m scaling.bench --laws`` prints."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from scaling.bench import published
from scaling.laws.answers.combination import combine
from scaling.laws.fitting.estimate import fit
from scaling.laws.forms import catalogue
from scaling.laws.intervals import resampling
from scaling.laws.tables.observations import Observations, from_table, read_csv
from scaling.machine import processor

HOFFMANN = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
REPEATS = 7


def made_up(num: int, noise: float, seed: int = 0) -> Observations:
    """Runs scattered over three decades of size and of data, with Hoffmann's law and Gaussian noise of the log."""
    rng = np.random.default_rng(seed)
    n, d = 10 ** rng.uniform(7, 10, num), 10 ** rng.uniform(9, 12, num)
    loss = catalogue.FORMS["chinchilla"].predict(HOFFMANN, num_params=n, num_tokens=d)
    columns = {"num_params": n, "num_tokens": d, "flops": 6 * n * d}
    label = np.array([f"row {i}" for i in range(num)])
    return Observations(columns, loss * np.exp(noise * rng.normal(size=num)), np.ones(num), label, np.full(num, np.nan))


def epoch() -> Observations | None:
    """Epoch's 240 points, where they are (``published.folder``)."""
    path = published.folder() / "epoch_chinchilla.csv"
    if not path.is_file():
        return None
    table = read_csv(path)
    return from_table(table[table["used_240"] == 1], source=str(path))


def measure() -> dict[str, float]:
    """Seconds, after a warm-up: the median of ``REPEATS`` where that is quick.

    ``noise_free_60`` (with δ = 1e-3), ``fit_240``, ``bootstrap_4000_of_240``, ``combine_240`` (three forms and their
    rolling forecasts), ``load_and_fit_10000`` (a CSV). The 240 are Epoch's where ``$SCALING_PUBLISHED`` has them.
    ``relative_error`` is the noise-free fit's largest, ``bootstrap_converged`` a share of replicates.
    """
    exact, published = made_up(60, 0.0), epoch()
    noisy = published or made_up(240, 0.01)
    recovered = fit(exact, "chinchilla", delta=1e-3)
    out = {"noise_free_60": _median(lambda: fit(exact, "chinchilla", delta=1e-3))}
    out["relative_error"] = max(abs(recovered.params[k] / v - 1) for k, v in HOFFMANN.items())
    fitted = fit(noisy, "chinchilla", delta=1e-3)
    out["fit_240"] = _median(lambda: fit(noisy, "chinchilla", delta=1e-3))
    out["epoch"] = float(published is not None)
    start = time.perf_counter()
    draws = resampling.bootstrap(fitted, 4000, seed=42)
    out["bootstrap_4000_of_240"] = time.perf_counter() - start
    out["bootstrap_converged"] = draws.converged
    out["combine_240"] = _median(lambda: combine(noisy), 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.csv"
        _write(path, made_up(10_000, 0.01))
        out["load_and_fit_10000"] = _median(lambda: fit(from_table(read_csv(path)), "chinchilla"), 1)
    return out


def _median(action: Callable, repeats: int = REPEATS) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]


def _write(path: Path, observations: Observations) -> None:
    names = ("num_params", "num_tokens", "flops")
    table = np.stack([*(observations.columns[c] for c in names), observations.loss], axis=1)
    np.savetxt(path, table, delimiter=",", header=",".join([*names, "loss"]), comments="", fmt="%.17g")


def show(console: Console) -> None:
    """The speed of the fits, in seconds, beside what each should take on two quiet cores."""
    measured = measure()
    points = "Epoch's 240 points" if measured["epoch"] else "240 made-up points ($SCALING_PUBLISHED has no Epoch's)"
    rows = [
        ("60 noise-free runs recovered", "noise_free_60", "0.05"),
        (f"{points}, one fit", "fit_240", "–"),
        (f"{points}, 4,000 bootstrap fits", "bootstrap_4000_of_240", "3"),
        (f"{points}, three forms and their rolling forecasts", "combine_240", "–"),
        ("10,000 runs, read from a CSV and fitted", "load_and_fit_10000", "30"),
    ]
    table = Table("fit", "seconds", "asked", title=f"{processor()}, one process", title_justify="left")
    for name, key, asked in rows:
        table.add_row(name, f"{measured[key]:.3f}", asked)
    console.print(table)
    console.print(f"noise-free recovery: relative error {measured['relative_error']:.1e} (asked: 1e-10)")
    console.print(f"bootstrap replicates converged: {100 * measured['bootstrap_converged']:.1f} %")
