"""The runs that a design may choose from, and what they cost together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

FREE = 1e-9  # a run that costs less than this share of the dearest counts as costing that: no gain is over nothing


@dataclass(frozen=True)
class Candidates:
    """Runs that may be bought.

    Attributes:
      columns: num_params, num_tokens and flops under the fitted convention, each (n,).
      labels: a run_id, or words.
      cost: what some of them, by number, cost together beside what is there: shared parts once.
      unit: of the cost.
    """

    columns: dict[str, np.ndarray]
    labels: tuple[str, ...]
    cost: Callable[[Sequence[int]], float]
    unit: str = "FLOPs"

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Sequence[int]) -> "Candidates":
        """Those of these numbers."""
        kept, price = list(chosen), self.cost
        columns = {c: np.asarray(x)[kept] for c, x in self.columns.items()}
        return Candidates(
            columns, tuple(self.labels[i] for i in kept), lambda some: price([kept[i] for i in some]), self.unit
        )
