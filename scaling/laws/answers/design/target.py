"""What a design is to narrow: a quantity of the law, its interval as the fit has it, and what its width means."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws import payload
from scaling.laws.answers import allocation
from scaling.laws.answers.allocation import Cost
from scaling.laws.answers.forecast import forecast
from scaling.laws.forms.law import Form, Params
from scaling.laws.intervals import resampling, shared
from scaling.laws.intervals.profile import Quantity, profile
from scaling.laws.tables.reading import parse

if TYPE_CHECKING:
    from scaling.laws.analysis import Analysis


@dataclass(frozen=True)
class Kind:
    """One kind of target.

    ``quantity`` makes of a form, the cost and the numbers after the @ a function of parameters, arrays (B,) to (B,), in
    logarithms where ``is_log``; None where the form has no such quantity. ``takes`` names these numbers. A width is
    that of the logarithm where ``is_ratio``; ``is_loss``: the interval is a forecast's, of a run; ``is_level``: it has
    the error on the validation text that all losses share.
    """

    quantity: Callable[[Form, Cost, tuple[float, ...]], Quantity | None]
    takes: tuple[str, ...] = ("",)
    is_log: bool = False
    is_ratio: bool = False
    is_loss: bool = False
    is_level: bool = False
    floor: float = -math.inf


def _exponent(form: Form, cost: Cost, at: tuple[float, ...]) -> Quantity | None:
    if allocation.exponents(form, dict.fromkeys(form.parameters, 1.0)) is None:
        return None
    return lambda p: allocation.exponents(form, p)[0]  # type: ignore[index]  # it has them


def _log_size(form: Form, cost: Cost, at: tuple[float, ...]) -> Quantity:
    def log_size(p: Params) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return np.log(allocation.optimal_num_params(form, _drawn(p), np.array(at), cost)[:, 0])

    return log_size


def _log_loss(form: Form, cost: Cost, at: tuple[float, ...]) -> Quantity:
    if len(at) == 1:
        loss = allocation.quantities(form, (at[0], at[0]), cost)["loss"]
    else:
        columns = dict(zip(("num_params", "num_tokens"), map(np.array, at)))

        def loss(p: Params) -> np.ndarray:
            return form.predict(_drawn(p), **{c: columns[c] for c in form.columns})

    def log_loss(p: Params) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.log(loss(_drawn(p)))

    return log_loss


def _floor(form: Form, cost: Cost, at: tuple[float, ...]) -> Quantity | None:
    return (lambda p: p["E"]) if "E" in form.parameters else None


def _of_groups(form: Form, cost: Cost, at: tuple[float, ...]) -> None:
    """One law has no multiplier: see ``design.of_groups``."""


def _drawn(p: Params) -> Mapping[str, np.ndarray]:
    return {k: np.atleast_1d(np.asarray(v, dtype=np.float64)) for k, v in p.items()}


KINDS = {
    "a": Kind(_exponent),
    "allocation": Kind(_log_size, ("C",), is_log=True, is_ratio=True),
    "loss": Kind(_log_loss, ("C", "N,D"), is_log=True, is_loss=True),
    "E": Kind(_floor, is_level=True, floor=0.0),
    "multiplier": Kind(_of_groups, ("C",), is_log=True, is_ratio=True),
}


@dataclass(frozen=True)
class Target:
    """``a``, ``allocation@C``, ``loss@C``, ``loss@N,D``, ``E`` or, of two groups, ``multiplier@C``: a kind of quantity
    and where it is asked."""

    name: str
    at: tuple[float, ...] = ()

    @classmethod
    def of(cls, text: str) -> "Target":
        """Raises ValueError, in one line, for what is no target."""
        name, _, rest = text.partition("@")
        numbers = tuple(parse(word) for word in rest.split(",")) if rest else ()
        known = ", ".join(f"{k}@{t}" if t else k for k, kind in KINDS.items() for t in kind.takes)
        if name not in KINDS or any(v is None or not (math.isfinite(v) and v > 0) for v in numbers):
            raise ValueError(f"--target is {text}: write one of {known}, with positive numbers for capitals")
        if len(numbers) not in {len(t.split(",")) if t else 0 for t in KINDS[name].takes}:
            words = " or ".join(f"{name}@{t}" if t else name for t in KINDS[name].takes)
            raise ValueError(f"--target is {text}: write {words}")
        return cls(name, numbers)  # type: ignore[arg-type]  # none is None

    def __str__(self) -> str:
        return self.name + ("@" + ",".join(f"{v:g}" for v in self.at) if self.at else "")

    @property
    def is_of_optimum(self) -> bool:
        """Whether it is of the best runs, of which rows on one side of every minimum say nothing."""
        return self.name in ("a", "allocation") or (self.kind.is_loss and len(self.at) == 1)

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def quantity(self, form: Form, cost: Cost) -> Quantity | None:
        """The target as a function of a form's parameters, in logarithms where its kind is."""
        return self.kind.quantity(form, cost, self.at)

    def place(self, found: "Analysis") -> dict[str, np.ndarray]:
        """The run that the target is of: num_params, num_tokens, flops, each (1,). Of what is of no run, the largest
        ones fitted."""
        columns = found.observations.columns
        if len(self.at) == 2:
            n, d = self.at
            flops = d * float(found.cost.flops_per_token(np.array(n)))
        elif self.at:
            fitted = found.fits[str(found.surface)]
            (flops,) = self.at
            n = float(allocation.optimal_num_params(fitted.form, fitted.params, np.array([flops]), found.cost)[0])
            d = flops / float(found.cost.flops_per_token(np.array(n)))
        else:
            top = columns["flops"] >= columns["flops"].max() / 1.1
            n, d, flops = (np.exp(np.log(columns[c][top]).mean()) for c in ("num_params", "num_tokens", "flops"))
        return {"num_params": np.array([n]), "num_tokens": np.array([d]), "flops": np.array([flops])}

    def interval(self, found: "Analysis", level: float) -> tuple[float, float]:
        """The fit's own interval of the target, ±inf where the data set no end: of the surface law its profile's or its
        draws', as fit.json chooses (``payload.by_profile``), of a loss the forecast's."""
        if self.kind.is_loss:
            (row,) = forecast(found, [{k: float(v[0]) for k, v in self.place(found).items()}], level)
            return tuple(row["interval"])
        law = str(found.surface)
        fitted, draws = found.fits[law], found.draws.get(law)
        quantity = self.quantity(fitted.form, found.cost)
        if quantity is None and self.name == "multiplier":
            raise ValueError(f"--target is {self}: it is of two groups: --compare GROUP OVER, or propose_of_groups")
        if quantity is None:
            raise ValueError(f"{found.observations.source}: {law} has no {self.name}: write another --law")
        if not fitted.ends_its_domain:  # the data set no limit there
            return self.ends([-math.inf, math.inf])
        by_profile = payload.by_profile(found, law)
        other: Any = None
        if not by_profile and draws is not None:
            other = resampling.interval(quantity(draws.params), level)
        elif not by_profile:
            _, *other = resampling.delta_interval(fitted, quantity, level)
        if fitted.at_bound:  # E = 0: the profile begins there
            ends = np.array(other) if other[0] < other[1] else np.array([-math.inf, math.inf])
        else:
            ends = np.array(profile(fitted, quantity, level).interval)
            ends = ends if by_profile else np.where(np.isfinite(ends), other, ends)
        if self.kind.is_level:
            value = float(np.ravel(quantity(fitted.params))[0])
            ends = np.array(shared.widened(value, ends.tolist(), found.observations.shared_error, level))
        return self.ends(ends)

    def shared_width(self, found: "Analysis", level: float) -> float:
        """How wide the interval would be if the law were known exactly: by what all runs share, which none takes
        away."""
        if not self.kind.is_level or not found.observations.shared_error:
            return 0.0
        fitted, error = found.fits[str(found.surface)], found.observations.shared_error
        value = float(np.ravel(self.quantity(fitted.form, found.cost)(fitted.params))[0])  # type: ignore[misc]  # it has it
        return self.width(self.ends(np.array(shared.widened(value, [value, value], error, level), dtype=float)))

    def ends(self, measured: Sequence[float] | np.ndarray) -> tuple[float, float]:
        """An interval of ``quantity`` in the target's own unit and domain."""
        with np.errstate(over="ignore"):
            lower, upper = np.maximum(np.exp(measured) if self.kind.is_log else measured, self.kind.floor)
        return float(lower), float(upper)

    def width(self, interval: tuple[float, float]) -> float:
        """How wide an interval is: the difference of its ends, or of their logarithms."""
        lower, upper = interval
        if not self.kind.is_ratio:
            return upper - lower
        return math.log(upper) - math.log(lower) if lower > 0 and math.isfinite(upper) else math.inf
