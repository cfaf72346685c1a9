"""A law at its best for what is paid: the least loss, what a loss costs, how many times as much another law pays."""

from dataclasses import dataclass

import numpy as np

from scaling.laws.answers import allocation
from scaling.laws.answers.allocation import Cost
from scaling.laws.forms.law import Form, Params

NEWTON_STEPS = 30


@dataclass(frozen=True)
class LawAtBest:
    """A law of one group with parameters (B,): the least loss for what is paid, and its inverse."""

    form: Form
    params: Params  # of ``form``, each (B,)
    cost: Cost | None

    @property
    def floor(self) -> np.ndarray:
        """E, (B, 1); 0 of a law without one."""
        return allocation.floor_of(self.form, {k: v[:, None] for k, v in self.params.items()})

    def terms(self) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(log amplitude (B, 1), {column: exponent (B, 1)}) of each power."""
        return allocation.powers(self.form, {k: v[:, None] for k, v in self.params.items()})  # type: ignore[return-value]  # it has

    @property
    def join(self) -> np.ndarray:
        """γ of L = E + (Σ T^(1/γ))^γ, (B, 1): 1 where the powers are added."""
        return allocation.join_of(self.form, {k: v[:, None] for k, v in self.params.items()})

    @property
    def ceiling(self) -> np.ndarray:
        """L_0, (B, 1), which no loss is above; inf of a law without one."""
        return allocation.ceiling_of(self.form, {k: v[:, None] for k, v in self.params.items()})

    @property
    def per_span(self) -> np.ndarray:
        """k = 1/(L_0 - E) of L = E + r / (1 + k r), (B, 1): 0 where nothing holds the rise r below a ceiling L_0."""
        return 1 / (self.ceiling - self.floor)

    def rise(self, loss: np.ndarray) -> np.ndarray:
        """r of L = E + r / (1 + k r), (B, m): negative below the floor, inf from the ceiling on."""
        above = loss - self.floor
        with np.errstate(divide="ignore"):
            left = np.maximum(1 - self.per_span * above, 0.0)
            return np.where(left > 0, above / left, np.inf)

    def best_size(self, log_x: np.ndarray) -> np.ndarray:
        """log N* for what is paid, (B, m)."""
        return np.log(allocation.optimal_num_params(self.form, self.params, np.exp(log_x), self.cost))  # type: ignore[arg-type]  # of N and D

    def excess(self, log_x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log r and its slope in log x, (B, m) each, for log x paid: r = L* - E where no ceiling holds it. At the
        optimum's own size the slope is that of tokens alone."""
        terms = self.terms()
        if self.cost is None:
            ((log_a, exponents),) = terms
            alpha = next(iter(exponents.values()))
            return log_a - alpha * log_x, np.broadcast_to(-alpha, np.broadcast_shapes(alpha.shape, log_x.shape))
        log_n = self.best_size(log_x)
        columns = {"num_params": log_n, "num_tokens": log_x - self.cost.log_flops_per_token(log_n)}
        logs = {next(iter(e)): log_a - next(iter(e.values())) * columns[next(iter(e))] for log_a, e in terms}
        beta = next(e["num_tokens"] for _, e in terms if "num_tokens" in e)
        gamma = self.join
        total = np.logaddexp(logs["num_params"] / gamma, logs["num_tokens"] / gamma)
        return gamma * total, -beta * np.exp(logs["num_tokens"] / gamma - total)

    def loss(self, log_x: np.ndarray) -> np.ndarray:
        rise = np.exp(self.excess(log_x)[0])
        return self.floor + rise / (1 + self.per_span * rise)

    def log_paid(self, loss: np.ndarray, start: np.ndarray) -> np.ndarray:
        """log x at which the least loss is ``loss``, (B, m), by Newton's steps on log r, which is all but straight in
        log x; inf where the law's floor lies above the loss, -inf where its ceiling lies below."""
        with np.errstate(all="ignore"):
            target = np.log(self.rise(loss))
            x = np.broadcast_to(start, loss.shape).astype(np.float64)
            for _ in range(NEWTON_STEPS):
                value, slope = self.excess(x)
                step = (target - value) / slope
                x = x + step
                if not (np.abs(step) > 1e-12 * np.maximum(np.abs(x), 1.0)).any():
                    break
        return np.select([loss <= self.floor, np.isinf(target)], [np.inf, -np.inf], x)

    def log_paid_at_size(self, loss: np.ndarray, log_n: np.ndarray) -> np.ndarray:
        """log C at which a model of this size has the loss; inf where no tokens bring it there."""
        (of_n, of_d) = (next(t for t in self.terms() if c in t[1]) for c in ("num_params", "num_tokens"))
        gamma = self.join
        with np.errstate(all="ignore"):
            rest = self.rise(loss) ** (1 / gamma) - np.exp((of_n[0] - of_n[1]["num_params"] * log_n) / gamma)
            log_d = (of_d[0] - gamma * np.log(rest)) / of_d[1]["num_tokens"]
        return np.where(rest > 0, log_d + self.cost.log_flops_per_token(log_n), np.inf)  # type: ignore[union-attr]  # of N and D


def log_multiplier(group: LawAtBest, over: LawAtBest, log_x: np.ndarray) -> np.ndarray:
    """log of what ``over`` pays for the loss that ``group`` has for x, over x, (B, m)."""
    return over.log_paid(group.loss(log_x), log_x) - log_x


def log_multiplier_at_size(group: LawAtBest, over: LawAtBest, log_x: np.ndarray) -> np.ndarray:
    """The same where ``over`` trains a model of the size that is best for ``group``, (B, m)."""
    return over.log_paid_at_size(group.loss(log_x), group.best_size(log_x)) - log_x
