"""Laws of whole loss curves under a learning-rate schedule: Tissue's annealing law and the multi-power law.

Both say what loss a run has at every step, from the rates up to that step, so they predict schedules nobody ran.

    curves = Curves(table, schedules)               # table: run, step, loss; schedules: run -> rate of every step
    fitted = fit(curves.observations(), multi_power_law(curves), delta=1e-3)
    multi_power_law(other).predict(fitted.params, **other.columns)      # the same law on other schedules
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws.forms.law import Form, Parameter, amplitude, exponent, law, offset
from scaling.laws.tables.observations import Observations

if TYPE_CHECKING:
    import pandas as pd

# Tissue et al. 2024, §3.2: how much of the annealing momentum survives a step.
MOMENTUM_DECAY = 0.999
# Decreases of the rate are summed in at most this many blocks a run; see ``Curves``.
BLOCKS = 1000


class Curves:
    """Loss curves and the learning rates behind them.

    Args:
      table: columns run, step, loss (and learning_rate, where ``schedules`` is not given).
      schedules: run → learning rate of every step from the first, warm-up included; ``schedules[run][t]`` is the rate
        of the update that leads to step t + 1. Without it, rates are interpolated between a run's own points.

    A sum over tens of thousands of steps with a changing rate is taken over some ``BLOCKS`` blocks of them, each
    standing at its mean step: off by less than 5e-5 nats (asserted in the tests).
    """

    def __init__(
        self,
        table: "pd.DataFrame",
        schedules: Mapping[str, np.ndarray] | None = None,
        *,
        blocks: int = BLOCKS,
    ) -> None:
        for column in ("run", "step", "loss"):
            if column not in table:
                raise ValueError(f"curves: column {column} is missing (there is {', '.join(map(str, table.columns))})")
        self.run = table["run"].astype(str).to_numpy()
        self.step = table["step"].to_numpy(dtype=np.int64)
        self.loss = table["loss"].to_numpy(dtype=np.float64)
        if not (np.isfinite(self.loss) & (self.loss > 0)).all():
            raise ValueError("curves: a loss is not a positive number: take such points out")
        self.lr_sum, self.annealing = np.zeros(len(table)), np.zeros(len(table))
        self.groups = []
        for run in dict.fromkeys(self.run):
            rows = np.flatnonzero(self.run == run)
            rates = self._rates(run, rows, table, schedules)
            cumulative = np.concatenate([[0.0], np.cumsum(rates)])
            self.lr_sum[rows] = cumulative[self.step[rows]]
            self.annealing[rows] = _annealing(rates)[self.step[rows]]
            self.groups.append((rows, *_changes(rates, cumulative, self.step[rows], blocks)))

    def _rates(
        self, run: str, rows: np.ndarray, table: "pd.DataFrame", schedules: Mapping[str, np.ndarray] | None
    ) -> np.ndarray:
        if schedules is None:
            if "learning_rate" not in table:
                raise ValueError("curves: no schedules and no column learning_rate: give one of them")
            order = rows[np.argsort(self.step[rows], kind="stable")]
            known = table["learning_rate"].to_numpy(dtype=np.float64)[order]
            return np.interp(np.arange(1, self.step[rows].max() + 1), self.step[order], known)
        if run not in schedules:
            raise ValueError(f"curves: no schedule for run {run}: give one rate a step under its name")
        rates = np.asarray(schedules[run], dtype=np.float64)
        if len(rates) < self.step[rows].max():
            raise ValueError(
                f"curves: run {run} has a point at step {self.step[rows].max()} and a schedule of {len(rates)} steps"
            )
        return rates

    def observations(self, source: str = "curves") -> Observations:
        """The points as observations: columns point (row number + 1), lr_sum, annealing; runs are clusters."""
        return Observations(
            columns=self.columns,
            loss=self.loss,
            weight=np.ones(len(self.loss)),
            run=self.run,
            budget=np.full(len(self.loss), np.nan),
            source=source,
        )

    def reduction(self, C: float, beta: float, gamma: float) -> dict[str, np.ndarray]:
        """Σ_k (η_{k-1} - η_k) G(η_k^-γ S_k(t)) of every point, G(x) = 1 - (C x + 1)^-β; its slopes in C, β and γ."""
        out = {name: np.zeros(len(self.loss)) for name in ("value", "C", "beta", "gamma")}
        for rows, drop, rate, since in self.groups:
            x = since * rate**-gamma
            inner = np.log1p(C * x)
            decayed = np.exp(-beta * inner)
            slope = beta * decayed / (1.0 + C * x) * x  # ∂G/∂C
            out["value"][rows] = (1.0 - decayed) @ drop
            out["C"][rows] = slope @ drop
            out["beta"][rows] = (decayed * inner) @ drop
            out["gamma"][rows] = -C * (slope @ (drop * np.log(rate)))
        return out

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return {
            "point": np.arange(1.0, len(self.loss) + 1),
            "lr_sum": self.lr_sum,
            "annealing": self.annealing,
            "step": self.step.astype(np.float64),
        }


def _annealing(rates: np.ndarray) -> np.ndarray:
    """S2 after each step: the sum of momenta m_i = λ m_{i-1} + (η_{i-1} - η_i) (Tissue et al. 2024, eq. 3)."""
    drops = -np.diff(rates, prepend=rates[0])
    # Warm-up raises the rate; the law counts annealing only.
    drops = np.where(np.arange(len(rates)) <= int(rates.argmax()), 0.0, drops)
    momentum, out = 0.0, np.zeros(len(rates) + 1)
    for i, drop in enumerate(drops):
        momentum = MOMENTUM_DECAY * momentum + drop
        out[i + 1] = out[i] + momentum
    return out


def _changes(
    rates: np.ndarray, cumulative: np.ndarray, steps: np.ndarray, blocks: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of changes of the rate, warm-up's (negative) too: η_{k-1} - η_k (K,), η_k (K,), and Σ_{τ=k}^{t} η_τ for
    every point t, (n, K)."""
    change = np.concatenate([[0.0], rates[:-1] - rates[1:]])
    rising, falling = np.flatnonzero(change < 0), np.flatnonzero(change > 0)
    groups = [g for part in (rising, falling) for g in np.array_split(part, min(blocks // 2, max(len(part), 1)))]
    groups = [g for g in groups if len(g)]
    if not groups:
        return np.zeros(0), np.ones(0), np.zeros((len(steps), 0))
    drop = np.array([change[g].sum() for g in groups])
    rate = np.array([rates[g].mean() for g in groups])
    before = np.array([cumulative[g].mean() for g in groups])
    return drop, rate, np.maximum(cumulative[steps][:, None] - before, 0.0)


@law(
    "Tissue et al. 2024, eq. 1",
    register=False,
    L0=offset(),
    A=amplitude("alpha", "lr_sum"),
    alpha=exponent(),
    C=Parameter("log", lower=1e-8, unit="nats per unit of annealing", linear=True),
)
def annealing_law(lr_sum: np.ndarray, annealing: np.ndarray, *, L0: Any, A: Any, alpha: Any, C: Any) -> Any:
    """L = L0 + A S1^-α - C S2, S1 the sum of learning rates, S2 that of their annealing momentum"""
    return L0 + A * lr_sum**-alpha - C * annealing


def multi_power_law(curves: Curves) -> Form:
    """Luo et al. 2025, eq. 1-3, on the schedules of ``curves``.

    L(t) = L0 + A S(t)^-α - B Σ_k (η_{k-1} - η_k) G(η_k^-γ S_k(t)),  G(x) = 1 - (C x + 1)^-β,
    S(t) the sum of rates up to t, warm-up included, S_k(t) that from step k to t.
    """

    def lanes(point: np.ndarray, *values: Any) -> dict[str, np.ndarray]:
        """``Curves.reduction`` of each lane of a batch, at the rows asked for: {name: (…, n)}."""
        rows = np.asarray(point, dtype=np.int64) - 1
        shape = np.broadcast_shapes(*(np.shape(v) for v in values))
        flat = zip(*(np.broadcast_to(v, shape).reshape(-1) for v in values))
        found = [curves.reduction(*lane) for lane in flat]
        return {k: np.stack([f[k][rows] for f in found]).reshape(*shape[:-1], -1) for k in found[0]}

    def function(
        point: np.ndarray, lr_sum: np.ndarray, *, L0: Any, A: Any, alpha: Any, B: Any, C: Any, beta: Any, gamma: Any
    ) -> Any:
        total = lanes(point, C, beta, gamma)["value"]
        return L0 + A * lr_sum**-alpha - B * (total if np.ndim(C) else total.reshape(-1))

    def gradient(
        point: np.ndarray, lr_sum: np.ndarray, *, L0: Any, A: Any, alpha: Any, B: Any, C: Any, beta: Any, gamma: Any
    ) -> dict[str, Any]:
        reduced = lanes(point, C, beta, gamma)
        power = lr_sum**-alpha
        return {
            "L0": np.ones_like(power),
            "A": power,
            "alpha": -A * power * np.log(lr_sum),
            "B": -reduced["value"],
            **{name: -B * reduced[name] for name in ("C", "beta", "gamma")},
        }

    parameters = {
        "L0": offset(),
        "A": amplitude("alpha", "lr_sum"),
        "alpha": exponent(0.3, 0.6),
        "B": Parameter("log", lower=1e-3, linear=True, unit="nats per unit of rate"),
        "C": Parameter("log", lower=1e-3, upper=1e3, starts=(0.7, 3.0)),
        "beta": exponent(0.3, 0.8, upper=5.0),
        "gamma": exponent(0.4, 0.8, upper=3.0),
    }
    return Form(
        name="multi_power_law",
        function=function,
        parameters=parameters,
        columns=("point", "lr_sum"),
        equation="L(t) = L0 + A S(t)^-α - B Σ_k (η_k-1 - η_k) (1 - (C η_k^-γ S_k(t) + 1)^-β)",
        source="Luo et al. 2025, eq. 1-3",
        gradient=gradient,
    )
