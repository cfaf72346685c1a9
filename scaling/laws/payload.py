"""An analysis as fit.json: every answer as plain numbers, each with its interval and how that was found."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from scaling.laws.answers import allocation, optimum
from scaling.laws.answers.advice import carried
from scaling.laws.answers.forecast import forecast
from scaling.laws.answers.multiplier import BEYOND, SIGNIFICANCE, Comparison, Curve, Group, Pair
from scaling.laws.answers.optimum import Surfaced
from scaling.laws.fitting.identify import Unidentified
from scaling.laws.fitting.run_noise import RunNoise
from scaling.laws.intervals import influence, resampling, shared
from scaling.laws.intervals.profile import Profile, Quantity, cut, without_end
from scaling.laws.tables.observations import HELD_OUT, LEFT_OUT

SCHEMA = 1
# Of what a fit was asked for, that which a refit of the same runs takes.
ASKED = ("laws", "loss", "delta", "tau", "noise", "bootstrap", "holdout_flops")
FRONTIER_POINTS = 25
# The frontier is drawn this far beyond the largest compute there is a run for.
FRONTIER_BEYOND = 10.0
WEIGHED_AT = np.array([2.0, 10.0, 100.0, 1e4])  # times the largest compute: where the weights of forms are told
SAMPLED_DRAWS = 200
# Resampled with replacement, fewer rows than this leave too few different ones: the profile stands in.
MIN_RESAMPLED_ROWS = 12
# What is drawn as one, by kind of noise, where the kind's own name does not say it.
UNITS = {"independent": "observation", "uneven": "observation, each with a noise of its own"}


class Found(Surfaced, Protocol):
    """What fit.json is made from: of an ``analysis.Analysis`` these parts, beside what an optimum is made from."""

    @property
    def isoflop(self) -> dict[str, Any]: ...

    @property
    def run_noise(self) -> RunNoise | None: ...

    @property
    def envelope(self) -> dict[str, Any]: ...

    @property
    def selections(self) -> dict[str, str]: ...

    @property
    def profiles(self) -> dict[str, dict[str, Profile]]: ...

    @property
    def residuals(self) -> dict[str, influence.Residuals]: ...

    @property
    def leverage(self) -> influence.Leverage | None: ...

    @property
    def asked(self) -> dict[str, Any]: ...

    @property
    def refused(self) -> dict[str, Unidentified]: ...


def of(found: Found) -> dict[str, Any]:
    """Returns fit.json's content as plain numbers; what could not be known is null, never NaN."""
    payload = {
        "schema": SCHEMA,
        "source": found.observations.source,
        "num_observations": len(found.observations),
        "convention": found.observations.convention,
        "asked": found.asked,
        "laws": {name: _law(found, name) for name in found.fits},
        "allocation": allocation_entry(found),
        "isoflop": found.isoflop,
        "envelope": found.envelope,
        "refused": {name: told.to_json() for name, told in found.refused.items()},
        "leverage": _leverage(found),
        "frontier": _frontier(found),
        "combination": _combination(found),
        "ask": carried.of(found),
        "run_noise": None if found.run_noise is None else found.run_noise.to_json(found.observations),
        "forecast": _forecast(found, HELD_OUT),
        "left_out": _forecast(found, LEFT_OUT),
        "excluded": found.observations.excluded,
        "notes": list(found.observations.warnings),
        "warnings": list(found.warnings),
    }
    return finite(payload)


def of_comparison(found: Comparison, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a fit.json whose only answer is how groups of runs compare: no law is of all of them.

    ``asked``: options of the comparison, of which those of ``ASKED`` are kept.
    """
    rows = found.joint.observations
    payload = {
        "schema": SCHEMA,
        "source": found.source,
        "num_observations": len(rows),
        "convention": rows.convention,
        "laws": {},
        "allocation": {},
        "isoflop": {},
        "envelope": {},
        "multiplier": _multiplier(found),
        "asked": {k: v for k, v in asked.items() if k in ASKED},
        "run_noise": None if found.run_noise is None else found.run_noise.to_json(rows),
        "forecast": [],
        "excluded": rows.excluded,
        "notes": list(rows.warnings),
        "warnings": list(found.warnings),
    }
    return finite(payload)


def _multiplier(found: Comparison) -> dict[str, Any]:
    sharing, draws = found.sharing, found.draws
    return {
        "column": found.column,
        "law": found.form.name,
        "equation": found.form.equation,
        "axis": found.axis,
        "unit": found.unit,
        "level": found.level,
        "interval_method": "delta" if draws is None else "bootstrap by cell",
        "num_bootstrap": 0 if draws is None else len(draws),
        "bootstrap_converged": None if draws is None else draws.converged,
        "num_cells_paired": len(np.unique(found.cells[found.paired])),
        "num_runs_paired": int(found.paired.sum()),
        "converged": found.joint.converged,
        "reasons": list(found.joint.reasons),
        "groups": [_group(found, group) for group in found.groups],
        "sharing": None
        if sharing is None
        else {**vars(sharing), "significance": SIGNIFICANCE, "rejected": sharing.rejected},
        "moves": list(found.moves),
        "moves_beyond": BEYOND,
        "pairs": [_pair(found.axis, pair) for pair in found.pairs],
    }


def _group(found: Comparison, group: Group) -> dict[str, Any]:
    spent = group.observations.columns[found.axis]
    return {
        "name": group.name,
        "num_observations": len(group.observations),
        "fitted": [spent.min(), spent.max()],
        "cost": None if group.cost is None else group.cost.describe(),
        "params": found.params(group.name),
        "params_apart": found.params_apart(group.name),
        "converged_apart": None if group.alone is None else group.alone.converged,
    }


def _pair(axis: str, pair: Pair) -> dict[str, Any]:
    curves = {"": pair.shared, "apart_": pair.apart, "same_size_": pair.same_size}

    def point(name: str, curve: Curve, i: int) -> dict[str, Any]:
        return {f"{name}value": curve.value[i], f"{name}interval": curve.interval[i]}

    return {
        "group": pair.group,
        "over": pair.over,
        "points": [
            {axis: at, "extrapolated": pair.extrapolated[i]}
            | {k: v for name, curve in curves.items() if curve for k, v in point(name, curve, i).items()}
            for i, at in enumerate(pair.at)
        ],
    }


def _law(found: Found, name: str) -> dict[str, Any]:
    fitted, draws = found.fits[name], found.draws.get(name)
    errors, intervals, method = _uncertainty(found, name)
    profiles = {k: p for k, p in found.profiles.get(name, {}).items() if k in fitted.params}
    entry = {
        "equation": fitted.form.equation,
        "source": fitted.form.source,
        "params": fitted.params,
        "standard_errors": errors,
        "intervals": intervals,
        "level": found.level,
        "interval_method": method,
        "noise": found.noise[name].to_json() if name in found.noise else None,
        "draws": _sample(found, name),
        "bootstrap_intervals": _resampled(found, name) if draws is not None else {},
        "profile_intervals": {k: p.interval for k, p in profiles.items()},
        "profiles": {k: {"grid": p.grid, "deviance": p.deviance} for k, p in profiles.items()},
        "profile_cut": cut(fitted, found.level),
        "objective": fitted.objective,
        "loss": {"name": fitted.loss.name, "delta": fitted.loss.delta},
        "converged": fitted.converged,
        "reasons": list(fitted.reasons),
        "gradient_cosine": fitted.gradient_cosine,
        "condition_number": fitted.condition_number,
        "num_starts": fitted.num_starts,
        "starts_at_optimum": fitted.starts_at_optimum,
        "at_bound": list(fitted.at_bound),
        "num_observations": fitted.num_observations,
        "selection": found.selections.get(name, "all rows"),
        "num_bootstrap": len(draws) if draws is not None else 0,
        "bootstrap_converged": draws.converged if draws is not None else None,
        "bootstrap_at_bound": draws.at_bound if draws is not None else None,
        "residual_rmse": fitted.residual_rmse,
        "residual_tests": found.residuals[name].to_json() if name in found.residuals else None,
    }
    return shared.in_law(entry, found.observations.shared_error)


def _uncertainty(found: Found, name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Standard errors and intervals of a law's parameters, and how they were found."""
    fitted, draws, profiles = found.fits[name], found.draws.get(name), found.profiles.get(name)
    errors, intervals = {}, {}
    covariance = resampling.covariance(fitted)
    for parameter in fitted.params:
        slope = resampling.gradient(fitted, lambda p, k=parameter: p[k])  # type: ignore[misc]  # k is bound by its default
        errors[parameter] = float(np.sqrt(max(slope @ covariance @ slope, 0.0)))
        _, lo, hi = resampling.delta_interval(fitted, lambda p, k=parameter: p[k], found.level)  # type: ignore[misc]  # k is bound by its default
        intervals[parameter] = [float(lo), float(hi)]
    if draws is None:
        return errors, _without_end(found, name, intervals), "delta"
    if fitted.num_observations >= MIN_RESAMPLED_ROWS or not profiles:
        errors = {k: float(np.std(v, ddof=1)) for k, v in draws.params.items()}
    if by_profile(found, name):
        return errors, {k: profiles[k].interval for k in fitted.params}, "profile"  # type: ignore[index]  # it has profiles
    told = found.noise.get(name)
    unit = "observation" if told is None else UNITS.get(told.kind, told.kind) if told.cells is None else "cell"
    return errors, _without_end(found, name, _resampled(found, name)), f"bootstrap by {unit}"


def _without_end(found: Found, name: str, intervals: dict[str, Any]) -> dict[str, Any]:
    profiles = found.profiles.get(name, {})
    return {k: without_end(found.fits[name], k, ends, profiles) for k, ends in intervals.items()}


def by_profile(found: Found, name: str) -> bool:
    """Whether a law's intervals are its profile's: they hold what they promise on 20 to 60 runs, the bootstrap's
    hold a little more (tests/laws/test_simulation.py). A profile knows nothing of errors that rows share, or that
    grow with the loss: there the wild bootstrap's are taken (``diagnosis``)."""
    plain = name not in found.noise or found.noise[name].groups is None
    return bool(found.profiles.get(name)) and plain and name in found.draws


def _resampled(found: Found, name: str) -> dict[str, Any]:
    return {k: resampling.interval(v, found.level) for k, v in found.draws[name].params.items()}


def _sample(found: Found, name: str) -> dict[str, Any]:
    """Some of the surface law's bootstrap draws, for pictures of how its parameters move together."""
    if name != found.surface or name not in found.draws:
        return {}
    return {parameter: values[:SAMPLED_DRAWS] for parameter, values in found.draws[name].params.items()}


def _frontier(found: Found) -> list[dict[str, Any]]:
    """The optimum from the least compute fitted to beyond the largest known, where the law has one."""
    if found.surface is None or found.no_allocation or found.fits[found.surface].undetermined:
        return []
    fitted = found.observations.columns["flops"]
    known = _flops_held_out(found)
    top = max([fitted.max(), *known]) * FRONTIER_BEYOND
    flops = np.geomspace(fitted.min(), top, FRONTIER_POINTS)
    return optimum.rows(found, flops)


def allocation_entry(found: Found) -> dict[str, Any]:
    """Exponents and tokens per parameter of the surface law.

    ``a``, ``b`` are asymptotic: those of a cost proportional to N D. ``a_local`` is the mean slope of
    log N*(C) over the fitted range under the records' own cost, which is what an IsoFLOP fit estimates.
    ``by_law`` has the same of the other laws fitted to N and D, with intervals from their own draws. ``reasons`` says
    what is not there and why: a cost that cannot be used, a law without an optimum, rows that identify
    none of it (``identify``), whose exponents are None.
    """
    refused = found.refused.get("allocation")
    nothing = (
        {} if refused is None else dict.fromkeys(("a", "a_interval", "b", "b_interval", "a_local", "a_local_interval"))
    )
    if found.surface is None:
        return nothing and nothing | {"reasons": [str(refused)]}
    fitted = found.fits[found.surface]
    flops = found.observations.columns["flops"]
    ends = np.array([flops.min(), flops.max()])
    out: dict[str, Any] = {"law": found.surface, "cost": found.cost.describe(), "cost_max_error": found.cost.max_error}
    out |= {"fitted_flops": ends.tolist(), "by_construction": [], "reasons": list(no_allocation(found))}
    quantities = allocation.quantities(fitted.form, (ends[0], ends[1]), found.cost)
    out |= nothing
    for name in ("a", "b", "a_local") if not nothing else ():
        if name in quantities and not (name == "a_local" and found.cost.problem):
            out |= _exponent(found, name, quantities[name], out["by_construction"])
    out["by_law"] = {} if nothing else _exponents_by_law(found, (ends[0], ends[1]))
    out["profiles"] = {
        name: {"value": p.value, "interval": p.interval, "grid": p.grid, "deviance": p.deviance}
        for name, p in found.derived.items()
    }
    out["tokens_per_param"] = {} if found.no_allocation or fitted.undetermined else _ratios(found, ends)
    return out


def _exponents_by_law(found: Found, ends: tuple[float, float]) -> dict[str, dict[str, Any]]:
    """Exponents of laws of N and D beside the surface law, where they have some that rows move."""
    out: dict[str, dict[str, Any]] = {}
    for law, fitted in found.fits.items():
        if law == found.surface or set(fitted.form.columns) != {"num_params", "num_tokens"}:
            continue
        quantities, drawn = allocation.quantities(fitted.form, ends, found.cost), found.draws.get(law)
        for name in ("a", "b", "a_local"):
            quantity = quantities.get(name)
            if quantity is None or (name == "a_local" and found.cost.problem):
                continue
            if not np.any(np.abs(resampling.gradient(fitted, quantity)) > 1e-9):  # by construction
                continue
            value = float(np.asarray(quantity({k: np.atleast_1d(v) for k, v in fitted.params.items()}))[0])
            if not np.isfinite(value):
                continue
            if fitted.undetermined:
                band = np.array([-math.inf, math.inf])
            elif drawn is None:
                band = np.array(resampling.delta_interval(fitted, quantity, found.level)[1:])
            else:
                band = resampling.percentiles(quantity(drawn.params)[:, None], found.level)[0]
            out.setdefault(law, {}).update({name: value, f"{name}_interval": band.tolist()})
    return out


def no_allocation(found: Found) -> list[str]:
    """What of the allocation cannot be had, or not everywhere, in words."""
    form, C = found.fits[found.surface].form, found.observations.columns["flops"]  # type: ignore[index]  # fitted
    if found.no_allocation:
        return [f"no allocation: {found.no_allocation}"]
    at = np.array([C.min(), C.max()])
    sizes = allocation.optimal_num_params(form, found.fits[found.surface].params, at, found.cost)  # type: ignore[index]  # fitted
    reason = allocation.no_optimum(form, sizes, at) or allocation.far_from_rows(form, sizes, at, found.cost)
    if reason or found.surface not in found.draws:
        return [reason] if reason else []
    sizes = allocation.optimal_num_params(form, found.draws[found.surface].params, at[1:], found.cost)
    missing = 1.0 - allocation.found(sizes).mean()
    if missing == 0:
        return []
    return [
        f"{found.surface}: {missing:.1%} of the draws have no interior optimum at {at[1]:.3g} FLOPs: "
        "they count as beyond every end"
    ]


def _leverage(found: Found) -> dict[str, Any] | None:
    """How the law that forecasts moves without each budget and each size, against the intervals reported here."""
    moved = found.leverage
    if moved is None:
        return None
    ends = {**_uncertainty(found, moved.law)[1]}
    if moved.law == found.surface:
        ends |= {"a": allocation_entry(found).get("a_interval")}
        ends |= {"best_loss": found.derived["loss"].interval} if "loss" in found.derived else {}
    intervals = {k: {"ends": pair, "level": found.level} for k, pair in ends.items() if pair is not None}
    if "held_out_loss" in moved.value:
        largest = max(_forecast(found, HELD_OUT) + _forecast(found, LEFT_OUT), key=lambda row: row["flops"])
        intervals["held_out_loss"] = {"ends": largest["interval"], "level": largest["level"]}
    return moved.to_json(intervals)


def _ratios(found: Found, ends: np.ndarray) -> dict[str, Any]:
    """D*/N* with intervals at the budgets, or across the fitted range, and at the largest compute held out."""
    at = np.array([p["flops"] for p in found.isoflop.get("budgets", [])])
    if not len(at):
        at = np.array([ends[0], math.sqrt(ends[0] * ends[1]), ends[1]])
    held_out = _flops_held_out(found)
    if held_out and max(held_out) > at.max() * 1.1:
        at = np.append(at, max(held_out))
    value, band = optimum.bands(found, at)["tokens_per_param"]
    return {
        f"{C:.4g}": {"value": float(v), "interval": i.tolist()} for C, v, i in zip(at, value, band) if np.isfinite(v)
    }


def _exponent(found: Found, name: str, quantity: Quantity, by_construction: list[str]) -> dict[str, Any]:
    """An exponent and its interval: the profile's where that is the default, and no end where that has none.

    An exponent that no parameter moves has no interval: its name is added to ``by_construction``.
    """
    value, band = optimum.band(found, lambda p: quantity(p)[:, None])
    if not np.isfinite(value[0]):
        return {}
    if not np.any(np.abs(resampling.gradient(found.fits[found.surface], quantity)) > 1e-9):  # type: ignore[index]  # fitted
        by_construction.append(name)
        return {name: float(value[0]), f"{name}_interval": None}
    if found.fits[found.surface].undetermined:  # type: ignore[index]  # fitted
        return {name: float(value[0]), f"{name}_interval": [-math.inf, math.inf]}
    band, profiled = band[0], found.derived.get(name)
    shown = band
    if profiled is not None:
        use = profiled.interval if by_profile(found, found.surface) else band  # type: ignore[arg-type]  # fitted
        shown = np.where(np.isfinite(profiled.interval), use, profiled.interval)
    out = {name: float(value[0]), f"{name}_interval": shown.tolist()}
    return out | ({f"{name}_bootstrap_interval": band.tolist()} if found.surface in found.draws else {})


def _combination(found: Found) -> dict[str, Any]:
    """The forms behind a forecast, their weights, and how each forecast as the fitted range grew."""
    if found.combination is None:
        return {}
    combined, observations = found.combination, found.observations
    # Along the largest runs' own shape: tokens and parameters grow alike.
    top = observations.columns[combined.axis] >= combined.reach / 1.1
    middle = {c: float(np.exp(np.log(observations.columns[c][top]).mean())) for c in combined.columns}
    share = 1.0 if len(combined.columns) == 1 else 0.5
    at = {c: v * WEIGHED_AT ** (1.0 if c == combined.axis else share) for c, v in middle.items()}
    weights = combined.weights(**at)
    rolled = []
    for name, f in combined.forecasts.items():
        by_factor = [{"factor": float(x), "weight": float(w)} for x, w in zip(WEIGHED_AT, weights[name])]
        weight = {"weight": by_factor[1]["weight"], "weights": by_factor, "misfit": vars(combined.misfit[name])}
        rolled.append(f.to_json() | weight)
    return {"members": sorted(rolled, key=lambda row: row["mean_error"])}


def rows_held_out(found: Surfaced) -> list[dict[str, Any]]:
    """Rows that were kept from the fit to be forecast."""
    return [row for row in found.observations.excluded if row["reason"] in (HELD_OUT, LEFT_OUT)]


def _flops_held_out(found: Found) -> list[float]:
    return [row["flops"] for row in rows_held_out(found) if row["flops"]]


def _forecast(found: Found, reason: str) -> list[dict[str, Any]]:
    """What the laws say of the rows that are excluded for this reason, beside what they gave."""
    rows = [row for row in found.observations.excluded if row["reason"] == reason]
    if found.forecaster is None:
        return []
    wanted = found.fits[found.forecaster].form.columns if found.combination is None else found.combination.columns
    known = [row for row in rows if all(row.get(c) for c in wanted)]
    cells = [{"run_id": row["run"], **{c: row[c] for c in ("num_params", "num_tokens", "flops")}} for row in known]
    return [f | {"actual": row["loss"]} for f, row in zip(forecast(found, cells), known)]


def finite(value: Any) -> Any:
    """A JSON-ready copy: NumPy scalars as Python's, and null where a number is not finite."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [finite(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
