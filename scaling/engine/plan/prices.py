"""What some cells of a grid cost together as things stand, in FLOPs, hours or dollars: steps that they share once.

A plan prices all that is to be done; here any part of it is priced, again and again, by the same rows.
"""

from collections.abc import Mapping, Sequence

from scaling.engine.plan import costs, timings, trunks
from scaling.engine.plan.plan import Means
from scaling.engine.plan.table import Row


class Prices:
    """Prices of ``rows``, all of them still to train, by number.

    Cells that share no steps cost their sum, so each family of ``trunks`` is priced by itself, and each part of it
    once.

    Args:
      means: what a plan is made with.
      unit: FLOPs, exact ones of training; hours of all devices while ``workers`` are busy; dollars, their price.
      steps: of the newest checkpoint of each (by run_id), from which on it trains; 0 for those not named.
      known: rows of shapes that may have been timed, beside these.
    """

    def __init__(
        self, rows: Sequence[Row], means: Means, unit: str = "FLOPs", steps: Mapping[str, int] | None = None,
        known: Sequence[Row] = (),
    ) -> None:  # fmt: skip
        self._rows, self._means, self._unit, self._steps = list(rows), means, unit, dict(steps or {})
        number = {row.run_id: i for i, row in enumerate(rows)}
        units = trunks.together(rows, share=means.trunks)
        self._unit_of = {number[row.run_id]: u for u, unit in enumerate(units) for row in unit}
        self._workers = means.workers(len(rows)) if rows else 1
        shapes = {timings.shape_key(row.cell.run): row for row in [*known, *rows]} if unit != "FLOPs" else {}
        self._timed = [row for key, row in shapes.items() if key in means.known]
        self._priced: dict[frozenset[int], float] = {}

    def __call__(self, chosen: Sequence[int]) -> float:
        """What these rows cost together.

        Raises ValueError, in one line, where a time or a price is not known.
        """
        parts: dict[int, set[int]] = {}
        for i in chosen:
            parts.setdefault(self._unit_of[int(i)], set()).add(int(i))
        return sum(self._part(frozenset(part)) for part in parts.values())

    def _part(self, part: frozenset[int]) -> float:
        if part not in self._priced:
            shared = self._means.shared([self._rows[i] for i in sorted(part)], self._steps)
            self._priced[part] = self._price(shared)
        return self._priced[part]

    def _price(self, rows: Sequence[Row]) -> float:
        if self._unit == "FLOPs":
            return trunks.flops(rows)["spent"]
        timed = self._means.predicted([*rows, *self._timed])[: len(rows)]
        seconds = [row.seconds for row in timed]
        known = None if None in seconds else sum(seconds)  # type: ignore[arg-type]  # None is not in it
        cost = costs.share_of(self._means.hardware, self._workers, known)
        if cost.seconds is None:
            raise ValueError(
                f"no time is known of {timed[seconds.index(None)].run_id}: run the sweep's --plan here, which times "
                "its shapes, name --hardware, or add --mfu where none is published"
            )
        if self._unit == "hours":
            return cost.seconds / 3600
        if cost.dollars is None:
            raise ValueError("no price is known: add --price, dollars per device-hour")
        return cost.dollars
