"""What a budget buys at each size: the same FLOPs at all, or in a machine's time as many as it reaches there."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from scaling.laws.answers.advice.basis import Basis, log_flops, loss_at, lowest
from scaling.laws.answers.at_best import LawAtBest
from scaling.laws.answers.optimum import Surfaced

NEAR = 4.0  # in log N: a size is searched within this of the one that is best by compute
SETTLED = 60  # steps towards a size that is best by compute for the FLOPs that it has itself


@dataclass(frozen=True)
class Budget:
    """Compute, or a machine's time, to train one model.

    ``bought``: log N → log of the FLOPs, any shape; ``flops`` where that is one number for every size.
    """

    asked: str
    bought: Callable[[np.ndarray], np.ndarray]
    flops: float | None = None

    @classmethod
    def of_flops(cls, flops: float) -> "Budget":
        log_c = float(np.log(flops))
        return cls(f"{flops:.3g} FLOPs", lambda log_n: np.full_like(log_n, log_c), flops)

    @classmethod
    def of_time(cls, seconds: float, rate: Callable[[np.ndarray], np.ndarray], asked: str) -> "Budget":
        """Of ``seconds`` of a device that reaches ``rate`` FLOP/s on N parameters, (m,) to (m,)."""
        return cls(asked, lambda log_n: np.log(seconds) + np.log(rate(np.exp(log_n))))

    def log_tokens(self, law: LawAtBest, log_n: np.ndarray) -> np.ndarray:
        """log D that is left for this size."""
        return self.bought(log_n) - log_flops(log_n, np.zeros(1), law)

    def loss(self, law: LawAtBest, log_n: np.ndarray) -> np.ndarray:
        """L(N, D) of laws (B,) at log N (B, m)."""
        return loss_at(law, log_n, self.log_tokens(law, log_n))

    def best_size(self, law: LawAtBest) -> np.ndarray:
        """log N at which the loss is least, (B, 1)."""
        if self.flops is not None:
            return law.best_size(np.log([self.flops]))
        log_n = np.zeros_like(law.floor)
        for _ in range(SETTLED):
            before, log_n = log_n, law.best_size(self.bought(log_n))
            if np.array_equal(before, log_n):
                break
        return lowest(lambda x: self.loss(law, x), log_n - NEAR, log_n + NEAR)

    def flops_at_best(self, found: Surfaced) -> float:
        """The FLOPs that it buys at the size that is best for it."""
        if self.flops is not None:
            return self.flops
        return float(np.exp(self.bought(self.best_size(Basis(found).best)))[0, 0])

    def log_overhead(self, law: LawAtBest, log_n: np.ndarray, loss: np.ndarray) -> np.ndarray:
        """log of what a size needs to have this loss, over the budget; inf where no tokens bring it there."""
        return law.log_paid_at_size(loss, log_n) - self.bought(log_n)
