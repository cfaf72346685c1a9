"""Tables made from known laws."""

import numpy as np
import pandas as pd

from scaling.laws.forms import catalogue
from tests import published

HOFFMANN = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}


def chinchilla(num_params, num_tokens, params=HOFFMANN):
    return catalogue.FORMS["chinchilla"].predict(params, num_params=num_params, num_tokens=num_tokens)


def scattered(num=60, noise=0.0, seed=0, params=HOFFMANN) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    n, d = 10 ** rng.uniform(7, 10, num), 10 ** rng.uniform(9, 12, num)
    loss = chinchilla(n, d, params) * np.exp(noise * rng.normal(size=num))
    return pd.DataFrame({"num_params": n, "num_tokens": d, "loss": loss})


def isoflop(budgets=(1e18, 3e18, 1e19, 3e19), sizes=7, width=4.0, noise=0.0, seed=0, params=HOFFMANN) -> pd.DataFrame:
    """Sizes evenly spaced in log N, from 1/width to width times the optimum of each budget, C = 6 N D."""
    rng = np.random.default_rng(seed)
    rows = []
    for C in budgets:
        best = optimum(C, params)
        for n in best * np.geomspace(1 / width, width, sizes):
            d = C / (6 * n)
            loss = chinchilla(n, d, params) * np.exp(noise * rng.normal())
            rows.append({"num_params": n, "num_tokens": d, "flops": C, "loss": loss})
    return pd.DataFrame(rows)


def optimum(C, p=HOFFMANN):
    """N* of Hoffmann et al. 2022, eq. 4."""
    G = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    return G * (C / 6) ** (p["beta"] / (p["alpha"] + p["beta"]))


def epoch() -> pd.DataFrame:
    table = published.table("epoch_chinchilla.csv")
    return table[table["used_240"] == 1]
