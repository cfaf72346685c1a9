"""How fast the laws fit on this machine: the figures that ``python -m scaling.bench --laws`` prints."""

import time

import numpy as np

from scaling.laws import forms, uncertainty
from scaling.laws.estimate import fit
from scaling.laws.observations import Observations

HOFFMANN = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}


def made_up(num: int, noise: float, seed: int = 0) -> Observations:
    """Runs scattered over three decades of size and of data, with Hoffmann's law and Gaussian noise of the log."""
    rng = np.random.default_rng(seed)
    n, d = 10 ** rng.uniform(7, 10, num), 10 ** rng.uniform(9, 12, num)
    loss = forms.FORMS["chinchilla"].predict(HOFFMANN, num_params=n, num_tokens=d)
    columns = {"num_params": n, "num_tokens": d, "flops": 6 * n * d}
    label = np.array([f"row {i}" for i in range(num)])
    return Observations(columns, loss * np.exp(noise * rng.normal(size=num)), np.ones(num), label, np.full(num, np.nan))


def measure() -> dict[str, float]:
    """Seconds, after a warm-up: a noise-free fit of 60 runs, a fit of 240 noisy ones, 4,000 bootstrap replicates of
    those, a fit of 10,000 runs; and the share of replicates that converged."""
    exact, noisy, many = made_up(60, 0.0), made_up(240, 0.01), made_up(10_000, 0.01)
    fit(exact, "chinchilla", delta=1e-3)
    out = {}
    for name, observations in (("noise_free_60", exact), ("fit_240", noisy), ("fit_10000", many)):
        start = time.perf_counter()
        fitted = fit(observations, "chinchilla", delta=1e-3)
        out[name] = time.perf_counter() - start
        if name == "fit_240":
            start = time.perf_counter()
            draws = uncertainty.bootstrap(fitted, 4000)
            out["bootstrap_4000_of_240"] = time.perf_counter() - start
            out["bootstrap_converged"] = draws.converged
    return out
