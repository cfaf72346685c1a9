"""Questions of a law on given hardware: the cheapest model to train and serve, the best one by a deadline."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scaling.laws.answers.advice import batches
from scaling.laws.answers.advice.basis import (
    Answer,
    Basis,
    Number,
    Quantity,
    Told,
    in_nats,
    log_flops,
    log_flops_where,
    loss_at,
    lowest,
)
from scaling.laws.answers.advice.budget import Budget
from scaling.laws.answers.at_best import LawAtBest
from scaling.laws.answers.optimum import Surfaced
from scaling.laws.fitting.estimate import Fit
from scaling.laws.intervals.profile import positive_profile
from scaling.laws.tables.observations import Observations
from scaling.numbers import compact

# A forward pass of the three that training comes to.
FORWARD = 1 / 3
# B_crit = B* L^(-1/α_B), tokens, loss in nats per token of WebText2 (Kaplan et al. 2020, figure 10).
KAPLAN_BATCH, KAPLAN_EXPONENT = 2.1e8, 4.8
# More data is a lower loss, and that a larger B_crit: by less than in proportion, so that repeating it settles.
FIXED_POINT, FIXED_POINT_STEPS = 1e-13, 200
SPAN = math.log(1e4)  # a size is searched within this of the best for training alone
AROUND = (0.25, 0.5, 1.0, 2.0, 4.0)  # times the devices, and the deadline, of the frontier


# (loss at the end, log D that is read) → B_crit in tokens.
Critical = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Prices:
    """What a FLOP costs in training, in reading a prompt (prefill) and in writing an answer (decoding), in ``unit``.

    Each is a function of N, (m,) to (m,), since utilisation may be. In FLOPs all are 1.
    """

    training: Callable[[np.ndarray], np.ndarray] = np.ones_like
    prefill: Callable[[np.ndarray], np.ndarray] = np.ones_like
    decoding: Callable[[np.ndarray], np.ndarray] = np.ones_like
    unit: str = "FLOPs"


def of_inference(
    found: Surfaced, inference_tokens: float, *, budget: Budget | None = None, loss: float | None = None,
    num_params: float | None = None, share_read: float = 0.0, prices: Prices | None = None, told: Told = in_nats,
) -> Answer:  # fmt: skip
    """The model of least lifetime cost at a given loss: training it and T tokens of inference (Sardana et al. 2024).

    N, D minimise p c(N) D + (r q + (1 - r) s) c(N) T / 3 with L(N, D) = L, where c(N) is the cost of a training token,
    p, q, s the ``prices`` of a FLOP in training, prefill and decoding, and r the share of the T tokens that is read. L
    is ``loss``, or that of the best model for ``budget``, or of the compute-optimal one of ``num_params`` parameters.

    Raises:
      ValueError: none, or several, of budget, loss and num_params say which quality.
    """
    given = [v for v in (budget, loss, num_params) if v is not None]
    if len(given) != 1:
        raise ValueError("--inference-tokens asks for one quality: write one of --flops, --loss, --num-params with it")
    basis, prices = Basis(found), prices or Prices()
    start = math.log(basis.top)

    def trained_alone(law: LawAtBest) -> tuple[np.ndarray, np.ndarray]:
        """log N and loss of the model that is best without inference; inf where the loss is out of reach, -inf where
        any model has it."""
        if budget is not None:
            best = budget.best_size(law)
            return best, budget.loss(law, best)
        if loss is not None:
            at = law.log_paid(np.full_like(law.floor, loss), np.full((1, 1), start))
        else:
            at = log_flops_where(law, float(num_params), start, of_size=True)  # type: ignore[arg-type]  # one of three
        known = np.isfinite(at)
        somewhere = np.where(known, at, start)
        return np.where(known, law.best_size(somewhere), at), law.loss(somewhere)

    def cost(law: LawAtBest, log_n: np.ndarray, target: np.ndarray) -> np.ndarray:
        n = np.exp(log_n)
        a_token = basis.cost.flops_per_token(n)
        served = inference_tokens * FORWARD * a_token
        read, written = share_read * prices.prefill(n), (1 - share_read) * prices.decoding(n)
        return prices.training(n) * np.exp(law.log_paid_at_size(target, log_n)) + served * (read + written)

    def solved(law: LawAtBest) -> tuple[np.ndarray, ...]:
        """(log N, log D, lifetime cost, that of the compute-optimal model), each (B,)."""
        unbounded, target = trained_alone(law)
        known = np.isfinite(unbounded)
        best = np.where(known, unbounded, 0.0)
        log_n = lowest(lambda x: cost(law, x, target), best - SPAN, best + SPAN / 4)
        log_d = law.log_paid_at_size(target, log_n) - log_flops(log_n, np.zeros(1), law)
        out = log_n, log_d, cost(law, log_n, target), cost(law, best, target)
        without = unbounded, unbounded, np.exp(unbounded), np.exp(unbounded)
        return tuple(np.where(known, v, end)[:, 0] for v, end in zip(out, without))

    if loss is not None and (why := basis.unreached(loss, told)):
        return basis.answer(f"{compact(inference_tokens)} tokens of inference", None, {}, (why,))
    size = float(np.exp(solved(basis.best)[0])[0])
    spent = float(
        np.exp(solved(basis.best)[0] + solved(basis.best)[1])[0] * basis.cost.flops_per_token(np.array(size)) / size
    )
    decades = basis.decades(spent)
    quantities: dict[str, tuple[Quantity, str]] = {
        "num_params": (lambda law: np.exp(solved(law)[0]), "parameters"),
        "num_tokens": (lambda law: np.exp(solved(law)[1]), "tokens"),
        "lifetime cost": (lambda law: solved(law)[2], prices.unit),
        "compute-optimal model's lifetime cost": (lambda law: solved(law)[3], prices.unit),
        "its share saved": (lambda law: 100 * (1 - solved(law)[2] / solved(law)[3]), "%"),
    }
    numbers = {name: basis.number(quantity, unit, decades) for name, (quantity, unit) in quantities.items()}
    notes = ("a served token is a third of a training token's FLOPs",)
    return basis.answer(f"{compact(inference_tokens)} tokens of inference", decades, numbers, notes)


def _critical_number(
    given: "float | Fit | None", crit: Critical, loss: np.ndarray, log_d: np.ndarray, basis: Basis,
    decades: float | None,
) -> Number:  # fmt: skip
    """B_crit where the answer lies, with the profile's interval where runs say it."""
    value = float(crit(loss, log_d)[0, 0])
    if not isinstance(given, Fit):
        return Number(value, None, "tokens")
    known = positive_profile(given, lambda p: batches.critical_batch(p, float(log_d[0, 0])), basis.level)
    return Number(value, basis.worth((known.lower, known.upper), decades), "tokens")


@dataclass(frozen=True)
class Cluster:
    """Devices that train one model.

    ``flops_per_second`` is what one device reaches on a model of N parameters, (m,) to (m,); ``device_batch`` the least
    tokens of a step that keep it busy so; ``price`` dollars per device-second, None where it is not known.
    """

    devices: float
    flops_per_second: Callable[[np.ndarray], np.ndarray]
    device_batch: float
    price: float | None = None


def critical(given: "float | Fit | None") -> Critical:
    """B_crit as it was given: a number, a law of it (``batches.fitted``), or None, Kaplan's."""
    if given is None:
        return lambda loss, log_d: KAPLAN_BATCH * loss**-KAPLAN_EXPONENT
    if isinstance(given, Fit):
        return lambda loss, log_d: batches.critical_batch(given.params, log_d)
    return lambda loss, log_d: np.full_like(loss, given)


def own_batches(rows: Observations, crit: Critical) -> float | None:
    """The median of batch over critical batch of the fitted runs; None where their batches are not said."""
    batch = rows.columns.get("batch_tokens")
    if batch is None:
        return None
    return float(np.median(batch / crit(rows.loss, np.log(rows.columns["num_tokens"]))))


@dataclass(frozen=True)
class _Deadline:
    """What a time on a cluster is enough for, law by law.

    ``own``: batch over critical batch of the fitted runs in the median, None where their batches are not said.
    """

    basis: Basis
    crit: Critical
    own: float | None

    def read(self, log_n: np.ndarray, time: float, on: Cluster) -> np.ndarray:
        """log of the tokens that the time is enough for."""
        n, cost = np.exp(log_n), self.basis.cost
        return math.log(time * on.devices) + np.log(on.flops_per_second(n)) - np.log(cost.flops_per_token(n))

    def worth(self, law: LawAtBest, log_n: np.ndarray, time: float, on: Cluster) -> tuple[np.ndarray, np.ndarray]:
        """(log D, L) of these sizes: B_crit is that of the loss at the end, which depends on D."""
        seen, batch = self.read(log_n, time, on), on.devices * on.device_batch
        log_d = seen
        for _ in range(FIXED_POINT_STEPS):
            before, loss = log_d, loss_at(law, log_n, log_d)
            with np.errstate(over="ignore", divide="ignore"):  # next to no tokens: no batch is small enough
                log_d = seen + np.log1p(self.own or 0.0) - np.log1p(batch / self.crit(loss, seen))
            if np.array_equal(log_d, before) or np.nanmax(np.abs(log_d - before)) < FIXED_POINT:
                break
        return log_d, loss_at(law, log_n, log_d)

    def size(self, law: LawAtBest, time: float, on: Cluster) -> np.ndarray:
        """log of the size of the least loss in that time."""
        n0 = np.exp(law.best_size(np.full((1, 1), math.log(self.basis.top))))
        for _ in range(20):
            n0 = np.exp(law.best_size(np.log(time * on.devices * on.flops_per_second(n0))))
        middle = np.log(n0)
        return lowest(lambda x: self.worth(law, x, time, on)[1], middle - SPAN, middle + SPAN / 2)

    def around(self, seconds: float, cluster: Cluster) -> list[dict[str, float]]:
        """Loss, size, tokens and money of fewer and more devices, for shorter and longer."""
        table, law = [], self.basis.best
        for times in AROUND:
            for longer in (0.25, 1.0, 4.0):
                on, time = dataclasses.replace(cluster, devices=cluster.devices * times), seconds * longer
                at = self.size(law, time, on)
                loss = float(self.worth(law, at, time, on)[1][0, 0])
                row = {"devices": on.devices, "days": time / 86400, "loss": loss,
                       "num_params": float(np.exp(at)[0, 0]),
                       "num_tokens": float(np.exp(self.read(at, time, on))[0, 0])}  # fmt: skip
                table.append(row | ({} if cluster.price is None else {"dollars": cluster.price * on.devices * time}))
        return table


def of_deadline(
    found: Surfaced, seconds: float, cluster: Cluster, critical_batch: "float | Fit | None" = None
) -> Answer:
    """The best model by a deadline on so many devices: N, D, batch, steps.

    A run of S(B) = S_min (1 + B_crit/B) steps reads D (1 + B/B_crit) tokens for what D = S_min B_crit are worth in
    small batches (McCandlish et al. 2018; Kaplan et al. 2020, section 5.1). The fitted runs have paid for batches of
    their own, B_own/B_crit = r in the median: D tokens that are read at B are worth D (1 + r)/(1 + B/B_crit) of theirs.
    As a step takes c(N) B / (devices · FLOP/s), the loss L(N, D) that time allows is least at the least batch that
    keeps all devices busy, B = devices · device_batch.

    Args:
      critical_batch: B_crit in tokens, or the law of it that these runs say (``batches.fitted``); None takes Kaplan's.
    """
    basis, crit = Basis(found), critical(critical_batch)
    deadline = _Deadline(basis, crit, own_batches(found.observations, crit))

    def size(law: LawAtBest) -> np.ndarray:
        return deadline.size(law, seconds, cluster)

    def read(law: LawAtBest) -> np.ndarray:
        return np.exp(deadline.read(size(law), seconds, cluster))[:, 0]

    def worth(law: LawAtBest) -> tuple[np.ndarray, np.ndarray]:
        return deadline.worth(law, size(law), seconds, cluster)

    law = basis.best
    log_n = size(law)
    batch, seen = cluster.devices * cluster.device_batch, deadline.read(log_n, seconds, cluster)
    flops = float(np.exp(log_flops(log_n, seen, law))[0, 0])
    decades = basis.decades(flops)
    at_end = deadline.worth(law, log_n, seconds, cluster)[1]
    numbers = {
        "num_params": basis.number(lambda w: np.exp(size(w))[:, 0], "parameters", decades),
        "num_tokens": basis.number(read, "tokens", decades),
        "tokens they are worth": basis.number(lambda w: np.exp(worth(w)[0])[:, 0], "tokens", decades),
        "loss": basis.number(lambda w: worth(w)[1][:, 0], "nats", decades),
        "batch": Number(batch, None, "tokens"),
        "critical batch": _critical_number(critical_batch, crit, at_end, seen, basis, decades),
        "steps": basis.number(lambda w: read(w) / batch, "steps", decades),
        "flops": Number(flops, None, "FLOPs"),
    }
    if cluster.price is not None:
        numbers["cost"] = Number(cluster.price * cluster.devices * seconds, None, "dollars")
    asked = f"{seconds / 86400:.3g} days on {cluster.devices:g} devices"
    notes = _taken_for_granted(deadline.own, critical_batch)
    return basis.answer(asked, decades, numbers, notes, {"loss, time and money": deadline.around(seconds, cluster)})


def _taken_for_granted(own: float | None, critical_batch: "float | Fit | None") -> tuple[str, ...]:
    """What an answer by a deadline assumes, in words."""
    notes = []
    if own is None:
        notes.append(
            "the batches of these runs are not said (a column batch_tokens): they are taken to be far below B_crit; "
            "where they were not, the loss is lower than this"
        )
    if critical_batch is None:
        notes.append(
            "B_crit is Kaplan et al.'s of WebText2 by its loss in nats per token: of other text or tokens it is a "
            "guess; --critical-batch writes your own, or runs: that of these runs' batches"
        )
    elif isinstance(critical_batch, Fit):
        notes.append(
            f"B_crit is of {len(critical_batch.observations)} runs whose batches differ, {batches.LAW}; the other "
            "intervals take it as it is"
        )
    return (*notes, "utilisation is taken to stay as devices are added; the loss is the law's own, of no single run")
