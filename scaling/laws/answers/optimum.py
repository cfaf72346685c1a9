"""The optimum at given compute with its interval: N*, D*, D*/N* and the loss of that run, as fit.json and advice have
them."""

from typing import Any, Protocol

import numpy as np

from scaling.laws.answers import allocation
from scaling.laws.answers.allocation import Cost
from scaling.laws.answers.forecast import Fitted, forecast
from scaling.laws.forms.law import Params
from scaling.laws.intervals import resampling
from scaling.laws.intervals.profile import Profile, Quantity


class Surfaced(Fitted, Protocol):
    """What an optimum is found from: of an ``analysis.Analysis`` these parts, beside what a forecast is made from."""

    @property
    def cost(self) -> Cost: ...

    @property
    def level(self) -> float: ...

    @property
    def derived(self) -> dict[str, Profile]: ...

    @property
    def surface(self) -> str | None: ...

    @property
    def no_allocation(self) -> str | None: ...


def band(found: Surfaced, quantity: Quantity) -> tuple[np.ndarray, np.ndarray]:
    """A derived quantity (m,) of the surface law and its interval (m, 2), ±inf where the draws run off."""
    fitted, draws = found.fits[found.surface], found.draws.get(found.surface)  # type: ignore[index, arg-type]  # fitted
    if draws is None:
        value, lo, hi = resampling.delta_interval(fitted, lambda p: _log(quantity(p)), found.level)
        with np.errstate(over="ignore"):  # no end: what 1e300 would only look like
            ends = np.exp(np.stack([lo, hi], axis=-1))
        return np.exp(value), np.where(ends == 0, -np.inf, ends)
    value = np.asarray(quantity({k: np.atleast_1d(v) for k, v in fitted.params.items()}))[0]
    return value, resampling.percentiles(quantity(draws.params), found.level)


def bands(found: Surfaced, flops: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """N*, D*, D*/N* and the loss there at each C, with intervals. NaN where the law has no optimum."""
    form, cost, draws = found.fits[found.surface].form, found.cost, found.draws.get(found.surface)  # type: ignore[index, arg-type]  # fitted
    drawn = None if draws is None else allocation.optimal_num_params(form, draws.params, flops, cost)

    def num_params(p: Params) -> Any:
        # One search over the draws serves all four quantities.
        known = draws is not None and p is draws.params
        return drawn if known else allocation.optimal_num_params(form, p, flops, cost)

    def num_tokens(p: Params) -> Any:
        return tokens(flops, cost, num_params(p))

    def loss(p: Params) -> Any:
        n = num_params(p)
        with np.errstate(all="ignore"):
            return form.predict({k: v[:, None] for k, v in p.items()}, num_params=n,
                                num_tokens=tokens(flops, cost, n))  # fmt: skip

    def ratio(p: Params) -> Any:
        n = num_params(p)
        with np.errstate(all="ignore"):
            return tokens(flops, cost, n) / n

    quantities = {"num_params": num_params, "num_tokens": num_tokens, "loss": loss, "tokens_per_param": ratio}
    told = {name: band(found, q) for name, q in quantities.items()}
    known = allocation.found(told["num_params"][0])
    return {
        name: (np.where(known, value, np.nan), _beyond(found, name, np.where(known[:, None], ends, np.nan), flops))
        for name, (value, ends) in told.items()
    }


def _beyond(found: Surfaced, name: str, ends: np.ndarray, flops: np.ndarray) -> np.ndarray:
    """The bands (m, 2); from the largest compute fitted on, without an end that the profile there does not have."""
    profiled = found.derived.get(name)
    if profiled is not None:
        beyond = flops >= found.observations.columns["flops"].max() * (1 - 1e-9)
        ends[beyond] = np.where(np.isfinite(profiled.interval), ends[beyond], profiled.interval)
    return ends


def rows(found: Surfaced, flops: np.ndarray) -> list[dict[str, Any]]:
    """A row for each C at which there is an optimum: flops, and of num_params, num_tokens, tokens_per_param and loss
    value and ``<name>_interval``.

    What the surface law says of the optimum's loss is not what a forecast of that run says: one run, one loss, that of
    ``forecast``.
    """
    found_at = bands(found, flops)
    out: list[dict[str, Any]] = [
        {"flops": float(C)}
        | {name: float(value[i]) for name, (value, _) in found_at.items()}
        | {f"{name}_interval": ends[i].tolist() for name, (_, ends) in found_at.items()}
        for i, C in enumerate(flops)
        if np.isfinite(found_at["num_params"][0][i])
    ]
    for row, said in zip(out, forecast(found, out, found.level)):
        row |= {"loss": said["predicted"], "loss_interval": said["interval"]}
    return out


def tokens(flops: np.ndarray, cost: Cost, num_params: np.ndarray) -> np.ndarray:
    """D that C buys at N: none at infinite N, without end at none."""
    with np.errstate(divide="ignore"):
        return flops / cost.flops_per_token(num_params)


def _log(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(x)
