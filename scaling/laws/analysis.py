"""Everything a sweep's losses say, in one object: laws with intervals, the three approaches, allocation, forecasts."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws.answers import allocation, approaches, budgets, isoflop_bias
from scaling.laws.answers.allocation import Cost
from scaling.laws.answers.combination import MEMBERS, Combination, combine
from scaling.laws.answers.forecast import forecast
from scaling.laws.fitting.estimate import Draws, Fit, fit
from scaling.laws.fitting.identify import on_a_ray
from scaling.laws.forms import catalogue
from scaling.laws.forms.law import Params
from scaling.laws.intervals import diagnosis, influence, resampling
from scaling.laws.intervals.profile import Profile, Quantity, cut, positive_profile, profile, without_end
from scaling.laws.tables.observations import HELD_OUT, LEFT_OUT, Observations, from_table

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
DEFAULT_LAWS = ("chinchilla", "kaplan_n", "kaplan_d", "kaplan_c")
FRONTIER_POINTS = 25
# The frontier is drawn this far beyond the largest compute there is a run for.
FRONTIER_BEYOND = 10.0
WEIGHED_AT = np.array([2.0, 10.0, 100.0, 1e4])  # times the largest compute: where the weights of forms are told
# Above this many rows profiles would take longer than everything else together.
MAX_PROFILED_ROWS = 2000
SAMPLED_DRAWS = 200
# Resampled with replacement, fewer rows than this leave too few different ones: the profile stands in.
MIN_RESAMPLED_ROWS = 12
# What is drawn as one, by kind of noise, where the kind's own name does not say it.
UNITS = {"independent": "observation", "uneven": "observation"}


@dataclass(frozen=True)
class Analysis:
    """What was fitted, and the draws that intervals and forecasts come from. ``to_json`` gives fit.json's content."""

    observations: Observations
    fits: dict[str, Fit]
    draws: dict[str, Draws]
    cost: Cost
    isoflop: dict[str, Any]
    envelope: dict[str, Any]
    warnings: tuple[str, ...]
    seed: int = 0
    level: float = 0.95
    selections: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, dict[str, Profile]] = field(default_factory=dict)  # law → parameter → profile
    derived: dict[str, Profile] = field(default_factory=dict)  # of the surface law, at the largest compute fitted
    resampled: str = "observation"
    combination: Combination | None = None
    noise: dict[str, diagnosis.Noise] = field(default_factory=dict)  # law → what its residuals say
    residuals: dict[str, influence.Residuals] = field(default_factory=dict)

    @property
    def surface(self) -> str | None:
        """Name of the first fitted law of both N and D: the one that allocation and forecast use."""
        for name, fitted in self.fits.items():
            if set(fitted.form.columns) == {"num_params", "num_tokens"}:
                return name
        return None

    @property
    def forecaster(self) -> str | None:
        """The law that forecasts where no combination does: the surface, else the first of one column."""
        return self.surface or next((n for n, f in self.fits.items() if len(f.form.columns) == 1), None)

    def to_json(self) -> dict[str, Any]:
        """fit.json (design.md §7) as plain numbers; what could not be known is null, never NaN."""
        payload = {
            "schema": SCHEMA,
            "source": self.observations.source,
            "num_observations": len(self.observations),
            "convention": self.observations.convention,
            "laws": {name: self._law(name) for name in self.fits},
            "allocation": self._allocation(),
            "isoflop": self.isoflop,
            "envelope": self.envelope,
            "frontier": self._frontier(),
            "combination": self._combination(),
            "forecast": self._forecast(HELD_OUT),
            "left_out": self._forecast(LEFT_OUT),
            "excluded": self.observations.excluded,
            "notes": list(self.observations.warnings),
            "warnings": list(self.warnings),
        }
        return finite(payload)

    def _law(self, name: str) -> dict[str, Any]:
        fitted, draws = self.fits[name], self.draws.get(name)
        errors, intervals, method = self._uncertainty(name)
        profiles = {k: p for k, p in self.profiles.get(name, {}).items() if k in fitted.params}
        return {
            "equation": fitted.form.equation,
            "source": fitted.form.source,
            "params": fitted.params,
            "standard_errors": errors,
            "intervals": intervals,
            "level": self.level,
            "interval_method": method,
            "noise": self.noise[name].to_json() if name in self.noise else None,
            "draws": self._sample(name),
            "bootstrap_intervals": self._resampled(name) if draws is not None else {},
            "profile_intervals": {k: p.interval for k, p in profiles.items()},
            "profiles": {k: {"grid": p.grid, "deviance": p.deviance} for k, p in profiles.items()},
            "profile_cut": cut(fitted, self.level),
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
            "selection": self.selections.get(name, "all rows"),
            "num_bootstrap": len(draws) if draws is not None else 0,
            "bootstrap_converged": draws.converged if draws is not None else None,
            "bootstrap_at_bound": draws.at_bound if draws is not None else None,
            "residual_rmse": fitted.residual_rmse,
            "residual_tests": self.residuals[name].to_json() if name in self.residuals else None,
        }

    def _uncertainty(self, name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
        """Standard errors and intervals of a law's parameters, and how they were found."""
        fitted, draws, profiles = self.fits[name], self.draws.get(name), self.profiles.get(name)
        errors, intervals = {}, {}
        covariance = resampling.covariance(fitted)
        for parameter in fitted.params:
            slope = resampling.gradient(fitted, lambda p, k=parameter: p[k])  # type: ignore[misc]  # k is bound by its default
            errors[parameter] = float(np.sqrt(max(slope @ covariance @ slope, 0.0)))
            _, lo, hi = resampling.delta_interval(fitted, lambda p, k=parameter: p[k], self.level)  # type: ignore[misc]  # k is bound by its default
            intervals[parameter] = [float(lo), float(hi)]
        if draws is None:
            return errors, self._without_end(name, intervals), "delta"
        if fitted.num_observations >= MIN_RESAMPLED_ROWS or not profiles:
            errors = {k: float(np.std(v, ddof=1)) for k, v in draws.params.items()}
        if self._by_profile(name):
            return errors, {k: profiles[k].interval for k in fitted.params}, "profile"  # type: ignore[index]  # it has profiles
        kind = self.noise[name].kind if name in self.noise else "independent"
        return errors, self._without_end(name, self._resampled(name)), f"bootstrap by {UNITS.get(kind, kind)}"

    def _without_end(self, name: str, intervals: dict[str, Any]) -> dict[str, Any]:
        profiles = self.profiles.get(name, {})
        return {k: without_end(self.fits[name], k, ends, profiles) for k, ends in intervals.items()}

    def _by_profile(self, name: str) -> bool:
        """Whether a law's intervals are its profile's: they hold what they promise on 20 to 60 runs, the bootstrap's
        hold a little more (tests/laws/test_simulation.py). A profile knows nothing of errors that rows share, or that
        grow with the loss: there the wild bootstrap's are taken (``diagnosis``)."""
        plain = name not in self.noise or self.noise[name].groups is None
        return bool(self.profiles.get(name)) and plain and name in self.draws

    def _resampled(self, name: str) -> dict[str, Any]:
        return {k: resampling.interval(v, self.level) for k, v in self.draws[name].params.items()}

    def _sample(self, name: str) -> dict[str, Any]:
        """Some of the surface law's bootstrap draws, for pictures of how its parameters move together."""
        if name != self.surface or name not in self.draws:
            return {}
        return {parameter: values[:SAMPLED_DRAWS] for parameter, values in self.draws[name].params.items()}

    def _band(self, quantity: Quantity) -> tuple[np.ndarray, np.ndarray]:
        """A derived quantity (m,) of the surface law and its interval (m, 2), ±inf where the draws run off."""
        fitted, draws = self.fits[self.surface], self.draws.get(self.surface)  # type: ignore[index, arg-type]  # fitted
        if draws is None:
            value, lo, hi = resampling.delta_interval(fitted, lambda p: _log(quantity(p)), self.level)
            with np.errstate(over="ignore"):  # no end: what 1e300 would only look like
                band = np.exp(np.stack([lo, hi], axis=-1))
            return np.exp(value), np.where(band == 0, -np.inf, band)
        value = np.asarray(quantity({k: np.atleast_1d(v) for k, v in fitted.params.items()}))[0]
        return value, _percentiles(quantity(draws.params), self.level)

    def _optimum(self, flops: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """N*, D*, D*/N* and the loss there at each C, with intervals. NaN where the law has no optimum."""
        form, cost, draws = self.fits[self.surface].form, self.cost, self.draws.get(self.surface)  # type: ignore[index, arg-type]  # fitted
        drawn = None if draws is None else allocation.optimal_num_params(form, draws.params, flops, cost)

        def num_params(p: Params) -> Any:
            # One search over the draws serves all four quantities.
            known = draws is not None and p is draws.params
            return drawn if known else allocation.optimal_num_params(form, p, flops, cost)

        def num_tokens(p: Params) -> Any:
            return _tokens(flops, cost, num_params(p))

        def loss(p: Params) -> Any:
            n = num_params(p)
            with np.errstate(all="ignore"):
                return form.predict({k: v[:, None] for k, v in p.items()}, num_params=n,
                                    num_tokens=_tokens(flops, cost, n))  # fmt: skip

        def ratio(p: Params) -> Any:
            n = num_params(p)
            with np.errstate(all="ignore"):
                return _tokens(flops, cost, n) / n

        quantities = {"num_params": num_params, "num_tokens": num_tokens, "loss": loss, "tokens_per_param": ratio}
        bands = {name: self._band(q) for name, q in quantities.items()}
        known = allocation.found(bands["num_params"][0])
        return {
            name: (np.where(known, value, np.nan), self._beyond(name, np.where(known[:, None], band, np.nan), flops))
            for name, (value, band) in bands.items()
        }

    def _beyond(self, name: str, band: np.ndarray, flops: np.ndarray) -> np.ndarray:
        """The bands (m, 2); from the largest compute fitted on, without an end that the profile there does not have."""
        profiled = self.derived.get(name)
        if profiled is not None:
            beyond = flops >= self.observations.columns["flops"].max() * (1 - 1e-9)
            band[beyond] = np.where(np.isfinite(profiled.interval), band[beyond], profiled.interval)
        return band

    def _frontier(self) -> list[dict[str, Any]]:
        """The optimum from the least compute fitted to beyond the largest known, where the law has one."""
        if self.surface is None or self.cost.problem:
            return []
        fitted = self.observations.columns["flops"]
        known = self._flops_held_out()
        top = max([fitted.max(), *known]) * FRONTIER_BEYOND
        flops = np.geomspace(fitted.min(), top, FRONTIER_POINTS)
        optimum = self._optimum(flops)
        rows = [
            {"flops": float(C)}
            | {name: float(value[i]) for name, (value, _) in optimum.items()}
            | {f"{name}_interval": band[i].tolist() for name, (_, band) in optimum.items()}
            for i, C in enumerate(flops)
            if np.isfinite(optimum["num_params"][0][i])
        ]
        # What the surface law says of the optimum's loss is not what a forecast of that run says: one run, one loss.
        for row, said in zip(rows, forecast(self, rows, self.level)):
            row |= {"loss": said["predicted"], "loss_interval": said["interval"]}
        return rows

    def _allocation(self) -> dict[str, Any]:
        """Exponents and tokens per parameter of the surface law.

        ``a``, ``b`` are asymptotic: those of a cost proportional to N D. ``a_local`` is the mean slope of
        log N*(C) over the fitted range under the records' own cost, which is what an IsoFLOP fit estimates.
        ``reasons`` says what is not there and why: a cost that cannot be used, a law without an optimum.
        """
        if self.surface is None:
            return {}
        fitted = self.fits[self.surface]
        flops = self.observations.columns["flops"]
        ends = np.array([flops.min(), flops.max()])
        out: dict[str, Any] = {"law": self.surface, "cost": self.cost.describe(), "cost_max_error": self.cost.max_error}
        out |= {"fitted_flops": ends.tolist(), "by_construction": [], "reasons": list(self._no_allocation())}
        quantities = allocation.quantities(fitted.form, (ends[0], ends[1]), self.cost)
        for name in ("a", "b", "a_local"):
            if name in quantities and not (name == "a_local" and self.cost.problem):
                out |= self._exponent(name, quantities[name], out["by_construction"])
        out["profiles"] = {
            name: {"value": p.value, "interval": p.interval, "grid": p.grid, "deviance": p.deviance}
            for name, p in self.derived.items()
        }
        out["tokens_per_param"] = {} if self.cost.problem else self._ratios(ends)
        return out

    def _no_allocation(self) -> list[str]:
        """What of the allocation cannot be had, or not everywhere, in words."""
        form, C = self.fits[self.surface].form, self.observations.columns["flops"]  # type: ignore[index]  # fitted
        if self.cost.problem:
            return [f"no allocation: {self.cost.problem}"]
        at = np.array([C.min(), C.max()])
        sizes = allocation.optimal_num_params(form, self.fits[self.surface].params, at, self.cost)  # type: ignore[index]  # fitted
        reason = allocation.no_optimum(form, sizes, at) or allocation.far_from_rows(form, sizes, at, self.cost)
        if reason or self.surface not in self.draws:
            return [reason] if reason else []
        sizes = allocation.optimal_num_params(form, self.draws[self.surface].params, at[1:], self.cost)
        missing = 1.0 - allocation.found(sizes).mean()
        if missing == 0:
            return []
        return [
            f"{self.surface}: {missing:.1%} of the draws have no interior optimum at {at[1]:.3g} FLOPs: "
            "they count as beyond every end"
        ]

    def _ratios(self, ends: np.ndarray) -> dict[str, Any]:
        """D*/N* with intervals at the budgets, or across the fitted range, and at the largest compute held out."""
        at = np.array([p["flops"] for p in self.isoflop.get("budgets", [])])
        if not len(at):
            at = np.array([ends[0], math.sqrt(ends[0] * ends[1]), ends[1]])
        held_out = self._flops_held_out()
        if held_out and max(held_out) > at.max() * 1.1:
            at = np.append(at, max(held_out))
        value, band = self._optimum(at)["tokens_per_param"]
        return {
            f"{C:.4g}": {"value": float(v), "interval": i.tolist()}
            for C, v, i in zip(at, value, band)
            if np.isfinite(v)
        }

    def _exponent(self, name: str, quantity: Quantity, by_construction: list[str]) -> dict[str, Any]:
        """An exponent and its interval: the profile's where that is the default, and no end where that has none.

        An exponent that no parameter moves has no interval: its name is added to ``by_construction``.
        """
        value, band = self._band(lambda p: quantity(p)[:, None])
        if not np.isfinite(value[0]):
            return {}
        if not np.any(np.abs(resampling.gradient(self.fits[self.surface], quantity)) > 1e-9):  # type: ignore[index]  # fitted
            by_construction.append(name)
            return {name: float(value[0]), f"{name}_interval": None}
        band, profiled = band[0], self.derived.get(name)
        shown = band
        if profiled is not None:
            use = profiled.interval if self._by_profile(self.surface) else band  # type: ignore[arg-type]  # fitted
            shown = np.where(np.isfinite(profiled.interval), use, profiled.interval)
        out = {name: float(value[0]), f"{name}_interval": shown.tolist()}
        return out | ({f"{name}_bootstrap_interval": band.tolist()} if self.surface in self.draws else {})

    def _combination(self) -> dict[str, Any]:
        """The forms behind a forecast, their weights, and how each forecast as the fitted range grew."""
        if self.combination is None:
            return {}
        combined, observations = self.combination, self.observations
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

    def _flops_held_out(self) -> list[float]:
        rows = self.observations.excluded
        return [row["flops"] for row in rows if row["reason"] in (HELD_OUT, LEFT_OUT) and row["flops"]]

    def _forecast(self, reason: str) -> list[dict[str, Any]]:
        """What the laws say of the rows that are excluded for this reason, beside what they gave."""
        rows = [row for row in self.observations.excluded if row["reason"] == reason]
        if self.forecaster is None:
            return []
        wanted = self.fits[self.forecaster].form.columns if self.combination is None else self.combination.columns
        known = [row for row in rows if all(row.get(c) for c in wanted)]
        cells = [{"run_id": row["run"], **{c: row[c] for c in ("num_params", "num_tokens", "flops")}} for row in known]
        return [f | {"actual": row["loss"]} for f, row in zip(forecast(self, cells), known)]


def analyse(
    table: "pd.DataFrame",
    curves: "pd.DataFrame | None" = None,
    *,
    num_params: str = "non_embedding",
    flops: str = "exact",
    laws: Sequence[str] = DEFAULT_LAWS,
    loss: str = "huber",
    delta: float | None = None,
    tau: float = 0.5,
    bootstrap: int = 1000,
    seed: int = 0,
    holdout_flops: float | None = None,
    combined: bool = True,
    source: str = "table",
) -> Analysis:
    """Fits laws to a table of runs, by the three approaches, with intervals.

    Args:
      table: ``records.load(...)``, or columns num_params, num_tokens, loss and optionally flops, run, weight.
        Rows that are not completed, or held out, are not fitted; they are named in ``excluded``.
      curves: ``records.curves(...)``, for the envelope.
      num_params, flops: the conventions to fit under, where the table carries several.
      laws: forms by name, import path, or themselves.
      loss, delta, tau: the objective (``estimate.fit``); delta None takes it from the residuals.
      bootstrap: resamples behind the intervals; 0 uses the delta method.
      holdout_flops: leave out, and forecast, rows with more compute.
      combined: forecast from several forms weighted by their own rolling forecasts (``combine``), not from the first
        law of N and D alone.

    Raises:
      ValueError: the table cannot be read as observations, or identifies none of the laws; says what would mend it.
    """
    reading: dict[str, Any] = {
        "num_params": num_params,
        "flops": flops,
        "holdout_flops": holdout_flops,
        "source": source,
    }
    observations = from_table(table, **reading, columns=[c for law in laws for c in catalogue.get(law).columns])
    columns = observations.columns
    clusters, said = diagnosis.run_clusters(observations)
    objective: dict[str, Any] = {"loss": loss, "delta": delta, "tau": tau}
    fits, draws, noise, selections, problems = {}, {}, {}, {}, []
    warnings = [*observations.warnings, *([said] if said else [])]
    for form in map(catalogue.get, laws):
        if form.target != "loss":
            raise ValueError(
                f"{source}: {form.name} is a law of {form.target}, not of the loss: fit it from Python, "
                f'scaling.fit_law(table, "{form.name}"), on a table with a column {form.target}'
            )
        rows, selections[form.name] = approaches.select(observations, form)
        chosen = observations.take(rows)
        try:
            fits[form.name] = fit(chosen, form, **objective)
        except ValueError as e:
            problems.append(str(e))
            continue
        if bootstrap:
            told = diagnosis.diagnose(fits[form.name], None if clusters is None else clusters[rows])
            noise[form.name] = told
            draws[form.name] = diagnosis.resample(fits[form.name], told, bootstrap, seed)
            if told.doubtful:
                warnings.append(f"{form.name}: {told.reason}")
            if told.groups is not None:
                how = "allow for it" if told.kind == "uneven" else f"are a wild bootstrap's, {told.unit}"
                warnings.append(f"{form.name}: {told.reason}: intervals {how}")
        warnings += _doubts(fits[form.name], draws.get(form.name))
    if not fits:
        raise ValueError(problems[0] if problems else f"{source}: no law was asked for: write --law chinchilla")
    left_out = Counter(row["reason"] for row in observations.excluded)
    for reason, count in sorted(left_out.items()):
        warnings.append(f"{count} {reason} {'run is' if count == 1 else 'runs are'} not fitted")
    found = Analysis(
        observations=observations,
        fits=fits,
        draws=draws,
        cost=allocation.cost_of(columns["num_params"], columns["num_tokens"], columns["flops"]),
        isoflop=approaches.isoflop(observations, num_bootstrap=bootstrap, seed=seed) or {},
        envelope=_envelope(observations, curves, flops),
        warnings=tuple(dict.fromkeys(problems + warnings)),
        seed=seed,
        selections=selections,
        resampled="run" if clusters is not None else "observation",
        noise=noise,
    )
    if combined and found.forecaster is not None:
        rows, _ = approaches.select(observations, found.fits[found.forecaster].form)
        forecasting = combine(observations.take(rows), _members(found), fits, **objective)
        found = dataclasses.replace(found, combination=forecasting)
    return _with_evidence(found)


def _envelope(observations: Observations, curves: "pd.DataFrame | None", flops: str) -> dict[str, Any]:
    """Approach 1; without an exponent where final points lie on a ray, which would be the design's own."""
    found = approaches.envelope(observations, curves, flops=flops) or {}
    if found.get("source") == "final points" and on_a_ray(observations):
        note = "every run's tokens follow from its size: N against C along them is the design's, not the best"
        found |= {"a": None, "b": None, "note": note}
    return found


def _members(found: Analysis) -> tuple[str, ...]:
    """Forms behind a forecast: every law that was asked for of the forecaster's columns, and the usual ones."""
    columns = set(found.fits[found.forecaster].form.columns)  # type: ignore[index]  # there is a forecaster
    asked = [name for name, f in found.fits.items() if set(f.form.columns) == columns]
    usual = MEMBERS if len(columns) > 1 else [n for n, f in catalogue.FORMS.items() if f.columns == tuple(columns)]
    return tuple(dict.fromkeys([*asked, *(n for n in usual if catalogue.get(n).target == "loss")]))


def _with_evidence(found: Analysis) -> Analysis:
    """Adds the laws' profiles, the bias of approach 2 on this grid, and disagreements in words."""
    profiles, warnings, isoflop = {}, list(found.warnings), dict(found.isoflop)
    warnings += isoflop["notes"] if isoflop else budgets.grouped(found.observations)[1]
    for law, fitted in found.fits.items():
        if fitted.num_observations <= MAX_PROFILED_ROWS and not fitted.at_bound:
            profiles[law] = {name: profile(fitted, name, found.level) for name in fitted.params}
    derived = _derived(found) if found.surface in profiles else {}
    residuals = {law: influence.residuals(fitted) for law, fitted in found.fits.items()}
    warnings += [line for law, tests in residuals.items() for line in tests.describe(law)]
    warnings += [
        f"{law}: {p.describe(name)}: weakly identified"
        for law, entries in profiles.items()
        for name, p in entries.items()
        if not np.isfinite(p.interval).all()
    ]
    if isoflop and found.surface is not None and not found.cost.problem:
        surface = found.fits[found.surface]
        groups = approaches.profiles(found.observations)
        isoflop["bias"] = isoflop_bias.profile_bias(surface.form, surface.params, groups, found.cost)
    found = dataclasses.replace(found, isoflop=isoflop, profiles=profiles, derived=derived, residuals=residuals)
    if found.surface is not None:
        warnings += found._no_allocation()
        if found.cost.max_error > allocation.SAID_ERROR and not found.cost.problem:
            warnings.append(
                f"{found.cost.describe()} misses the C of a row by {found.cost.max_error:.0%}: the allocation is that "
                "of this cost, not of every row's"
            )
    return dataclasses.replace(found, warnings=tuple(warnings + _disagreements(found)))


def _derived(found: Analysis) -> dict[str, Profile]:
    """Profiles of what the surface law implies: its exponents, and the optimum at the largest compute fitted."""
    fitted, C = found.fits[found.surface], found.observations.columns["flops"]  # type: ignore[index]  # there is one
    if allocation.exponents(fitted.form, fitted.params) is None:
        return {}  # an optimum found by search, thousands of times over
    asked = allocation.quantities(fitted.form, (C.min(), C.max()), found.cost)
    a = profile(fitted, asked["a"], found.level)
    out = {"a": a, "b": a.of(lambda a: 1.0 - a)}
    if found.cost.problem:
        return out
    if "a_local" in asked:
        out["a_local"] = profile(fitted, asked["a_local"], found.level)
    n = out["num_params"] = positive_profile(fitted, asked["num_params"], found.level)

    def tokens(num_params: np.ndarray) -> np.ndarray:
        return C.max() / found.cost.flops_per_token(num_params)

    if (found.cost.elasticity(n.grid) > 0).all():  # D* falls with N*: one walk tells both
        out |= {"num_tokens": n.of(tokens), "tokens_per_param": n.of(lambda size: tokens(size) / size)}
    else:
        out |= {k: positive_profile(fitted, asked[k], found.level) for k in ("num_tokens", "tokens_per_param")}
    return out | {"loss": positive_profile(fitted, asked["loss"], found.level)}


def _disagreements(found: Analysis) -> list[str]:
    """Approaches whose exponents differ by more than their intervals allow."""
    law = found._allocation()
    if law.get("a_local") is None:
        return []
    lo, hi = law["a_local_interval"] or (law["a_local"],) * 2
    ends = "by construction" if law["a_local_interval"] is None else f"{_end(lo)} to {_end(hi)}"
    parametric = f"the parametric law's over the fitted range, {law['a_local']:.3f} ({ends})"
    out = []
    for name, entry in (("IsoFLOP", found.isoflop), ("the envelope", found.envelope)):
        a = entry.get("a")
        if a is None or (name == "IsoFLOP" and found.isoflop["num_bracketed"] < 3):
            continue
        below, above = entry.get("a_interval") or (a, a)
        if above < lo or below > hi:
            note = f" ({entry['note']})" if "note" in entry else ""
            out.append(f"approaches disagree: a by {name} is {a:.3f}{note}, {parametric}")
    return out


def _end(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "unbounded"


def _doubts(fitted: Fit, draws: Draws | None) -> list[str]:
    """What a reader must know before believing this fit, in words."""
    name = fitted.form.name
    doubts = [f"{name}: not converged: {reason}" for reason in fitted.reasons]
    if draws is None:
        return doubts
    if draws.converged < 1:
        doubts.append(f"{name}: {1 - draws.converged:.1%} of the bootstrap replicates did not converge")
    for parameter, share in draws.at_bound.items():
        if share > 0.01:
            doubts.append(
                f"{name}: {parameter} is weakly identified: {share:.0%} of the bootstrap replicates hold it at a bound"
            )
    return doubts


def _log(x: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(x)


def _tokens(flops: np.ndarray, cost: Cost, num_params: np.ndarray) -> np.ndarray:
    """D that C buys at N: none at infinite N, without end at none."""
    with np.errstate(divide="ignore"):
        return flops / cost.flops_per_token(num_params)


def _percentiles(draws: np.ndarray, level: float) -> np.ndarray:
    """Equal-tailed percentiles (m, 2) of draws (B, m), some of which may be 0 or infinite: beyond every end."""
    tail = [0.5 * (1 - level), 1 - 0.5 * (1 - level)]
    with np.errstate(invalid="ignore"):
        ends = np.quantile(draws, tail, axis=0)
    odd = ~np.isfinite(draws).all(axis=0) | (draws == 0).any(axis=0)
    for i in np.flatnonzero(odd):  # no interpolating between a number and what is beyond all numbers
        known = draws[~np.isnan(draws[:, i]), i]
        ends[:, i] = np.quantile(known, tail, method="nearest") if len(known) else np.nan
    lower, upper = ends
    return np.stack([np.where(lower == 0, -np.inf, lower), upper], axis=-1)


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
