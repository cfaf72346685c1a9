"""What every answer of ``advice`` is made of: numbers with intervals from the fit's draws, and the forms' spread."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws.answers import allocation, optimum
from scaling.laws.answers.at_best import LawAtBest
from scaling.laws.answers.optimum import Surfaced
from scaling.laws.fitting.estimate import Fit
from scaling.laws.forms.law import Params

if TYPE_CHECKING:
    import pandas as pd

# Farther than this beyond the largest compute fitted an interval of one law says nothing: forms disagree by more.
MAX_DECADES = 2.0
HALVINGS = 70  # of a bracket of 200 in a logarithm: down to rounding
WIDTH = 100.0
SCANNED = 33
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0

Quantity = Callable[[LawAtBest], np.ndarray]  # of laws (B,): an array (B,)


@dataclass(frozen=True)
class Number:
    """One number of an answer. ``interval`` is None where none is worth it, its ends infinite where the data set none;
    ``by_form`` is what other forms fitted to the same rows say."""

    value: float
    interval: tuple[float, float] | None
    unit: str
    by_form: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
      asked: the question in words.
      numbers: by name; units are the numbers' own.
      tables: by title, rows of plain numbers.
      decades: log10 of the answer's compute over the largest fitted, or of the least over it; negative within the fit.
      notes: what a reader must know, in words.
    """

    asked: str
    source: str
    law: str
    level: float
    decades: float | None
    numbers: dict[str, Number]
    tables: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def in_unit(self, factor: float, unit: str) -> "Answer":
        """The answer with its losses, which are in nats, times ``factor`` and named ``unit``."""

        def number(n: Number) -> Number:
            if n.unit != "nats":
                return n
            ends = None if n.interval is None else (n.interval[0] * factor, n.interval[1] * factor)
            return Number(n.value * factor, ends, unit, {k: v * factor for k, v in n.by_form.items()})

        def row(of: dict[str, float]) -> dict[str, float]:
            return {k: v * factor if k == "loss" else v for k, v in of.items()}

        tables = {title: list(map(row, rows)) for title, rows in self.tables.items()}
        return dataclasses.replace(self, numbers={k: number(n) for k, n in self.numbers.items()}, tables=tables)

    @property
    def table(self) -> "pd.DataFrame":
        """The numbers as a pandas table: value, lower, upper, unit, and the least and most that other forms say."""
        import pandas as pd

        def row(n: Number) -> dict[str, Any]:
            lower, upper = n.interval or (math.nan, math.nan)
            said = [*n.by_form.values(), math.nan] if not n.by_form else list(n.by_form.values())
            forms = {"least by form": min(said), "most by form": max(said)}
            return {"value": n.value, "lower": lower, "upper": upper, "unit": n.unit, **forms}

        return pd.DataFrame([row(n) for n in self.numbers.values()], index=pd.Index(self.numbers, name=self.asked))

    def _repr_html_(self) -> str:
        from html import escape

        return self.table.to_html(float_format=lambda v: f"{v:.4g}") + "".join(
            f"<p>{escape(n)}</p>" for n in self.notes
        )

    def to_json(self) -> dict[str, Any]:
        """The answer as plain Python; numbers that are not finite stay so (``payload.finite`` makes them null)."""
        return dataclasses.asdict(self)


Told = Callable[[float], str]  # a loss in nats as the asker reads it


def in_nats(loss: float) -> str:
    return f"{loss:.4g} nats"


def require_determined(source: str, fitted: Fit) -> None:
    """Raises ValueError for a law that is held at a bound where nothing follows from it."""
    if stuck := fitted.undetermined:
        raise ValueError(
            f"{source}: {fitted.form.name} holds {', '.join(stuck)} at a bound: these runs do not determine it, and "
            "nothing follows from it: add runs, or write another --law"
        )


class Basis:
    """The surface law of an analysis at its best, its draws, and the other forms fitted to the same rows."""

    def __init__(self, found: Surfaced) -> None:
        source = found.observations.source
        if found.no_allocation:
            raise ValueError(f"{source}: no allocation: {found.no_allocation}")
        if found.surface is None:
            raise ValueError(f"{source}: no law of N and D was fitted: write --law chinchilla")
        self.found, self.fitted = found, found.fits[found.surface]
        if not allocation.has_two_powers(self.fitted.form):
            raise ValueError(
                f"{source}: {found.surface} is no sum of a power of N and one of D beside a floor: write --law "
                "chinchilla"
            )
        self.source, self.cost, self.level = source, found.cost, found.level
        self.top, self.bottom = (float(of(found.observations.columns["flops"])) for of in (np.max, np.min))
        require_determined(source, self.fitted)

    @property
    def doubts(self) -> tuple[str, ...]:
        """What a reader of any answer must know of the fit, in words."""
        said = [f"{self.found.surface}: not converged: {reason}" for reason in self.fitted.reasons]
        if self.found.observations.repeated and "unique_tokens" not in self.fitted.form.columns:
            said.append(self.found.observations.repeated)
        if self.cost.max_error > allocation.SAID_ERROR:
            said.append(f"{self.cost.describe()} misses the C of a row by {self.cost.max_error:.0%}")
        return tuple(said)

    def law(self, params: Params) -> LawAtBest:
        return LawAtBest(self.fitted.form, {k: np.atleast_1d(v) for k, v in params.items()}, self.cost)

    def unreached(self, loss: float, told: Told = in_nats) -> str | None:
        """Why no run has just this loss by the fitted law, in words: below its floor, or above its ceiling."""
        floor, ceiling = float(self.best.floor[0, 0]), float(self.best.ceiling[0, 0])
        if loss <= floor:
            return f"a loss of {told(loss)} cannot be reached: it lies below E, {told(floor)}"
        if loss >= ceiling:
            return f"any run reaches a loss of {told(loss)}: it lies above L_0, {told(ceiling)}"
        return None

    @property
    def best(self) -> LawAtBest:
        """The fitted law itself."""
        return self.law(self.fitted.params)

    def others(self) -> dict[str, LawAtBest]:
        """Other forms fitted to the same rows that have an optimum in closed form."""
        fits = self.found.combination.fits if self.found.combination is not None else {}
        return {
            name: LawAtBest(f.form, {k: np.atleast_1d(v) for k, v in f.params.items()}, self.cost)
            for name, f in fits.items()
            if name != self.found.surface and allocation.has_two_powers(f.form)
        }

    def decades(self, flops: float) -> float:
        """How many decades C lies beyond the largest compute fitted, or below the least; negative between them."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.log10(flops / self.top if flops >= self.bottom else self.bottom / flops))

    def number(self, quantity: Quantity, unit: str, decades: float | None) -> Number:
        """A positive quantity of the law, its interval (``optimum.band``) unless it lies too far, and other forms'."""
        value, ends = optimum.band(self.found, lambda p: quantity(self.law(p))[:, None])
        by_form = {name: float(quantity(law)[0]) for name, law in self.others().items()}
        return Number(float(value[0]), self.worth((ends[0, 0], ends[0, 1]), decades), unit, by_form)

    def worth(self, ends: Any, decades: float | None) -> tuple[float, float] | None:
        """The interval, or None where it would be of compute more than ``MAX_DECADES`` outside the fit."""
        if decades is None or decades > MAX_DECADES or not np.isfinite(decades):
            return None
        return float(ends[0]), float(ends[1])

    def answer(
        self, asked: str, decades: float | None, numbers: Mapping[str, Number], notes: tuple[str, ...] = (),
        tables: Mapping[str, list[dict[str, float]]] | None = None,
    ) -> Answer:  # fmt: skip
        if decades is not None and decades > MAX_DECADES:
            far = f"{decades:.1f} decades outside the fitted compute: no interval is worth it there"
            notes = (f"{far}, the forms' spread stands instead", *notes)
        notes = (*notes, *self.doubts)
        return Answer(
            asked, self.source, str(self.found.surface), self.level, decades, dict(numbers), dict(tables or {}), notes
        )


def log_flops(log_n: np.ndarray, log_d: np.ndarray, law: LawAtBest) -> np.ndarray:
    """log C of N parameters on D tokens."""
    return log_d + law.cost.log_flops_per_token(log_n)  # type: ignore[union-attr]  # of N and D


def loss_at(law: LawAtBest, log_n: np.ndarray, log_d: np.ndarray) -> np.ndarray:
    """L(N, D) of laws (B,) at (B, m)."""
    params = {k: v[:, None] for k, v in law.params.items()}
    with np.errstate(all="ignore"):
        return law.form.predict(params, num_params=np.exp(log_n), num_tokens=np.exp(log_d))


def root(rises: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where a rising function crosses zero between two ends (any shape), by halving; an end where it does not."""
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        below = rises(middle) <= 0
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return 0.5 * (low + high)


def lowest(function: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Where a function of (B, m) is lowest between two ends (B, 1): the best of ``SCANNED`` places, then golden section
    between its neighbours. Utilisation has kinks where it was published, so that there may be two dips."""
    places = low + np.linspace(0.0, 1.0, SCANNED) * (high - low)
    seen = function(places)
    at = np.where(np.isnan(seen), np.inf, seen).argmin(axis=1)[:, None]
    low, high = (np.take_along_axis(places, np.clip(at + side, 0, SCANNED - 1), axis=1) for side in (-1, 1))
    for _ in range(HALVINGS):
        c, d = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        left = function(c) < function(d)
        low, high = np.where(left, low, c), np.where(left, d, high)
    return 0.5 * (low + high)


def log_flops_where(law: LawAtBest, target: float, start: float, *, of_size: bool) -> np.ndarray:
    """log C at which the optimum has ``target`` parameters, or tokens, (B, 1)."""

    def rises(x: np.ndarray) -> np.ndarray:
        log_n = law.best_size(x)
        return (log_n if of_size else x - log_flops(log_n, np.zeros(1), law)) - math.log(target)

    middle = np.full_like(law.floor, start)
    return root(rises, middle - WIDTH, middle + WIDTH)
