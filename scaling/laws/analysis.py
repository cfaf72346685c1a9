"""Everything a sweep's losses say, in one object: laws with intervals, the three approaches, allocation, forecasts."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from scaling.laws import allocation, approaches, bias, forms, uncertainty
from scaling.laws.allocation import Cost
from scaling.laws.estimate import Fit, fit
from scaling.laws.observations import Observations, from_table
from scaling.laws.profile import Profile, profile
from scaling.laws.uncertainty import Draws

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
DEFAULT_LAWS = ("chinchilla", "kaplan_n", "kaplan_d", "kaplan_c")
FRONTIER_POINTS = 25
# The frontier is drawn this far beyond the largest compute there is a run for.
FRONTIER_BEYOND = 10.0
# Above this many rows profiles would take longer than everything else together.
MAX_PROFILED_ROWS = 2000
SAMPLED_DRAWS = 200
# Resampled with replacement, fewer rows than this leave too few different ones: the profile stands in.
MIN_RESAMPLED_ROWS = 12


@dataclass(frozen=True)
class Analysis:
    """What was fitted, and the draws that intervals and forecasts come from. ``to_json`` gives fit.json's content."""

    observations: Observations
    fits: dict[str, Fit]
    draws: dict[str, Draws]
    cost: Cost
    isoflop: dict
    envelope: dict
    warnings: tuple[str, ...]
    seed: int = 0
    level: float = 0.95
    selections: dict[str, str] = field(default_factory=dict)
    profiles: dict[str, dict[str, Profile]] = field(default_factory=dict)  # law → parameter (and a) → profile
    resampled: str = "observation"

    @property
    def surface(self) -> str | None:
        """Name of the first fitted law of both N and D: the one that allocation and forecast use."""
        for name, fitted in self.fits.items():
            if set(fitted.form.columns) == {"num_params", "num_tokens"}:
                return name
        return None

    def to_json(self) -> dict:
        """fit.json (design.md §7) as plain numbers; what could not be known is null, never NaN."""
        held_out = [row for row in self.observations.excluded if row["reason"] == "holdout"]
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
            "forecast": self._forecast(held_out),
            "excluded": self.observations.excluded,
            "warnings": list(self.warnings),
        }
        return finite(payload)

    def _law(self, name: str) -> dict:
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
            "draws": self._sample(name),
            "profile_intervals": {k: p.interval for k, p in profiles.items()},
            "profiles": {k: {"grid": p.grid, "deviance": p.deviance} for k, p in profiles.items()},
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
        }

    def _uncertainty(self, name: str) -> tuple[dict, dict, str]:
        """Standard errors and intervals of a law's parameters, and how they were found."""
        fitted, draws, profiles = self.fits[name], self.draws.get(name), self.profiles.get(name)
        if draws is not None and (fitted.num_observations >= MIN_RESAMPLED_ROWS or not profiles):
            errors = {k: float(np.std(v, ddof=1)) for k, v in draws.params.items()}
            intervals = {k: uncertainty.interval(v, self.level) for k, v in draws.params.items()}
            return errors, intervals, f"bootstrap by {self.resampled}"
        errors, intervals = {}, {}
        covariance = uncertainty.covariance(fitted)
        for parameter in fitted.params:
            slope = uncertainty.gradient(fitted, lambda p, k=parameter: p[k])
            errors[parameter] = float(np.sqrt(max(slope @ covariance @ slope, 0.0)))
            _, lo, hi = uncertainty.delta_interval(fitted, lambda p, k=parameter: p[k], self.level)
            intervals[parameter] = [float(lo), float(hi)]
        if draws is not None:
            return errors, {k: profiles[k].interval for k in fitted.params}, "profile"
        return errors, intervals, "delta"

    def _sample(self, name: str) -> dict:
        """Some of the surface law's bootstrap draws, for pictures of how its parameters move together."""
        if name != self.surface or name not in self.draws:
            return {}
        return {parameter: values[:SAMPLED_DRAWS] for parameter, values in self.draws[name].params.items()}

    def _band(self, quantity) -> tuple[np.ndarray, np.ndarray]:
        """A derived quantity (m,) of the surface law and its interval (m, 2)."""
        fitted, draws = self.fits[self.surface], self.draws.get(self.surface)
        if draws is None:
            value, lo, hi = uncertainty.delta_interval(fitted, lambda p: np.log(quantity(p)), self.level)
            # e^±600: without a limit, written so that JSON can hold it.
            return np.exp(value), np.exp(np.clip(np.stack([lo, hi], axis=-1), -600.0, 600.0))
        value = np.asarray(quantity({k: np.atleast_1d(v) for k, v in fitted.params.items()}))[0]
        tail = 0.5 * (1 - self.level)
        return value, np.moveaxis(np.quantile(quantity(draws.params), [tail, 1 - tail], axis=0), 0, -1)

    def _optimum(self, flops: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """N*, D*, D*/N* and the loss there at each C, with intervals."""
        form, cost = self.fits[self.surface].form, self.cost

        def num_params(p):
            return allocation.optimal_num_params(form, p, flops, cost)

        def num_tokens(p):
            return flops / cost.flops_per_token(num_params(p))

        def loss(p):
            n = num_params(p)
            return form.predict({k: v[:, None] for k, v in p.items()}, num_params=n,
                                num_tokens=flops / cost.flops_per_token(n))  # fmt: skip

        def ratio(p):
            n = num_params(p)
            return flops / cost.flops_per_token(n) / n

        quantities = {"num_params": num_params, "num_tokens": num_tokens, "loss": loss, "tokens_per_param": ratio}
        return {name: self._band(q) for name, q in quantities.items()}

    def _frontier(self) -> list[dict]:
        if self.surface is None:
            return []
        fitted = self.observations.columns["flops"]
        known = [row["flops"] for row in self.observations.excluded if row["reason"] == "holdout" and row["flops"]]
        top = max([fitted.max(), *known]) * FRONTIER_BEYOND
        flops = np.geomspace(fitted.min(), top, FRONTIER_POINTS)
        found = self._optimum(flops)
        return [
            {"flops": float(C)}
            | {name: float(value[i]) for name, (value, _) in found.items()}
            | {f"{name}_interval": band[i].tolist() for name, (_, band) in found.items()}
            for i, C in enumerate(flops)
        ]

    def _allocation(self) -> dict:
        """Exponents and tokens per parameter of the surface law.

        ``a``, ``b`` are asymptotic: those of a cost proportional to N D. ``a_local`` is the mean slope of
        log N*(C) over the fitted range under the records' own cost, which is what an IsoFLOP fit estimates.
        """
        if self.surface is None:
            return {}
        fitted = self.fits[self.surface]
        flops = self.observations.columns["flops"]
        out = {"law": self.surface, "cost": self.cost.describe(), "cost_max_error": self.cost.max_error}
        out |= {"fitted_flops": [float(flops.min()), float(flops.max())]}
        if allocation.exponents(fitted.form, fitted.params) is not None:
            for k, name in enumerate(("a", "b")):
                value, band = self._band(lambda p, k=k: allocation.exponents(fitted.form, p)[k][:, None])
                out |= {name: float(value[0]), f"{name}_interval": band[0].tolist()}
            if "a" in self.profiles.get(self.surface, {}):
                out["a_profile_interval"] = self.profiles[self.surface]["a"].interval
        ends = np.array([flops.min(), flops.max()])
        if ends[1] > ends[0] * 1.1:

            def slope(p):
                n = np.log(allocation.optimal_num_params(fitted.form, p, ends, self.cost))
                return (np.diff(n, axis=-1) / np.log(ends[1] / ends[0])).clip(1e-12)

            value, band = self._band(slope)
            out |= {"a_local": float(value[0]), "a_local_interval": band[0].tolist()}
        at = np.array([p["flops"] for p in self.isoflop.get("budgets", [])])
        if not len(at):
            at = np.array([ends[0], math.sqrt(ends[0] * ends[1]), ends[1]])
        held_out = [row["flops"] for row in self.observations.excluded if row["reason"] == "holdout"]
        if held_out and max(held_out) > at.max() * 1.1:
            at = np.append(at, max(held_out))
        value, band = self._optimum(at)["tokens_per_param"]
        out["tokens_per_param"] = {
            f"{C:.4g}": {"value": float(v), "interval": i.tolist()} for C, v, i in zip(at, value, band)
        }
        return out

    def _forecast(self, held_out: Sequence[Mapping]) -> list[dict]:
        known = [row for row in held_out if row["num_params"] and row["num_tokens"]]
        if not known or self.surface is None:
            return []
        cells = [{"run_id": row["run"], **{c: row[c] for c in ("num_params", "num_tokens", "flops")}} for row in known]
        return [f | {"actual": row["loss"]} for f, row in zip(forecast(self, cells), known)]


def forecast(analysis: Analysis, cells: Sequence[Mapping], level: float = 0.90) -> list[dict]:
    """Predicted loss of new runs, with an interval for the run itself: the law's uncertainty and the runs' own noise.

    Args:
      cells: each with run_id, num_params, num_tokens (in the analysis's convention) and flops.

    Raises:
      ValueError: no law of N and D was fitted.
    """
    if analysis.surface is None:
        why = "; ".join(analysis.warnings) or "it was not asked for"
        raise ValueError(f"{analysis.observations.source}: no law of N and D to forecast from: {why}")
    fitted, draws = analysis.fits[analysis.surface], analysis.draws.get(analysis.surface)
    columns = {c: np.array([float(cell[c]) for cell in cells]) for c in ("num_params", "num_tokens")}
    if not cells:
        return []
    predicted = np.broadcast_to(fitted.predict(**columns), len(cells))
    if draws is not None:
        tail = 0.5 * (1.0 - level)
        losses = uncertainty.prediction_draws(fitted, draws, seed=analysis.seed, **columns)
        lower, upper = np.quantile(losses, [tail, 1.0 - tail], axis=0)
    else:
        _, lower, upper = uncertainty.delta_interval(
            fitted,
            lambda p: np.log(fitted.form.predict({k: v[:, None] for k, v in p.items()}, **columns)),
            level,
            noise=fitted.residual_rmse * math.sqrt(fitted.num_observations / max(fitted.degrees_of_freedom, 1)),
        )
        lower, upper = np.exp(lower), np.exp(upper)
    return [
        {
            "run_id": cell["run_id"],
            "flops": float(cell["flops"]),
            "predicted": float(predicted[i]),
            "interval": [float(lower[i]), float(upper[i])],
            "level": level,
        }
        for i, cell in enumerate(cells)
    ]


def analyse(
    table: "pd.DataFrame",
    curves: "pd.DataFrame | None" = None,
    *,
    num_params: str = "non_embedding",
    flops: str = "exact",
    laws: Sequence[str] = DEFAULT_LAWS,
    loss: str = "huber",
    delta: float | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    holdout_flops: float | None = None,
    source: str = "table",
) -> Analysis:
    """Fits laws to a table of runs, by the three approaches, with intervals.

    Args:
      table: ``records.load(...)``, or columns num_params, num_tokens, loss and optionally flops, run, weight.
        Rows that are not completed, or held out, are not fitted; they are named in ``excluded``.
      curves: ``records.curves(...)``, for the envelope.
      num_params, flops: the conventions to fit under, where the table carries several.
      laws: forms by name, import path, or themselves.
      loss, delta: the objective (``estimate.fit``); delta None takes it from the residuals.
      bootstrap: resamples behind the intervals; 0 uses the delta method.
      holdout_flops: leave out, and forecast, rows with more compute.

    Raises:
      ValueError: the table cannot be read as observations, or identifies none of the laws; says what would mend it.
    """
    observations = from_table(table, num_params=num_params, flops=flops, holdout_flops=holdout_flops, source=source)
    columns = observations.columns
    clustered = len(np.unique(observations.run)) < len(observations)
    fits, draws, selections, warnings, problems = {}, {}, {}, list(observations.warnings), []
    for form in map(forms.get, laws):
        if form.target != "loss":
            raise ValueError(
                f"{source}: {form.name} is a law of {form.target}, not of the loss: fit it from Python, "
                f'scaling.fit_law(table, "{form.name}"), on a table with a column {form.target}'
            )
        rows, selections[form.name] = select(observations, form)
        chosen = observations.take(rows)
        try:
            fits[form.name] = fit(chosen, form, loss=loss, delta=delta)
        except ValueError as e:
            problems.append(str(e))
            continue
        if bootstrap:
            clusters = chosen.run if clustered else None
            draws[form.name] = uncertainty.bootstrap(fits[form.name], bootstrap, seed=seed, clusters=clusters)
        warnings += _doubts(fits[form.name], draws.get(form.name))
    if not fits:
        raise ValueError(problems[0] if problems else f"{source}: no law was asked for: write --law chinchilla")
    left_out = Counter(row["reason"] for row in observations.excluded)
    warnings += [f"{count} {reason} runs are not fitted" for reason, count in sorted(left_out.items())]
    found = Analysis(
        observations=observations,
        fits=fits,
        draws=draws,
        cost=allocation.cost_of(columns["num_params"], columns["num_tokens"], columns["flops"]),
        isoflop=approaches.isoflop(observations, num_bootstrap=bootstrap, seed=seed) or {},
        envelope=approaches.envelope(observations, curves, flops=flops) or {},
        warnings=tuple(dict.fromkeys(problems + warnings)),
        seed=seed,
        selections=selections,
        resampled="run" if clustered else "observation",
    )
    return _with_evidence(found)


def _with_evidence(found: Analysis) -> Analysis:
    """Adds the laws' profiles, the bias of approach 2 on this grid, and disagreements in words."""
    profiles, warnings, isoflop = {}, list(found.warnings), dict(found.isoflop)
    for law, fitted in found.fits.items():
        if fitted.num_observations <= MAX_PROFILED_ROWS and not fitted.at_bound:
            profiles[law] = {name: profile(fitted, name, found.level) for name in fitted.params}
            if allocation.exponents(fitted.form, fitted.params) is not None:
                profiles[law]["a"] = profile(
                    fitted, lambda p, form=fitted.form: allocation.exponents(form, p)[0], found.level
                )
    warnings += [
        f"{law}: {p.describe(name)}: weakly identified"
        for law, entries in profiles.items()
        for name, p in entries.items()
        if not np.isfinite(p.interval).all()
    ]
    if isoflop and found.surface is not None:
        surface = found.fits[found.surface]
        groups = approaches.profiles(found.observations)
        isoflop["bias"] = bias.profile_bias(surface.form, surface.params, groups, found.cost)
    found = dataclasses.replace(found, isoflop=isoflop, profiles=profiles)
    return dataclasses.replace(found, warnings=tuple(warnings + _disagreements(found)))


def _disagreements(found: Analysis) -> list[str]:
    """Approaches whose exponents differ by more than their intervals allow."""
    law = found._allocation()
    if law.get("a_local") is None:
        return []
    lo, hi = law["a_local_interval"]
    parametric = f"the parametric law's over the fitted range, {law['a_local']:.3f} ({lo:.3f} to {hi:.3f})"
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


def select(observations: Observations, form: forms.Form) -> tuple[np.ndarray, str]:
    """Rows a form is fitted to, and why.

    A law of one quantity alone holds where nothing else limits the loss: on the frontier, the runs that no run with as
    little of that quantity beats. Forms of several columns take every row.
    """
    if len(form.columns) == 1 and form.columns[0] in ("num_params", "num_tokens", "flops"):
        tolerance = 0.05 if form.columns[0] == "flops" else 0.02
        rows = approaches.frontier(observations, form.columns[0], tolerance)
        return rows, f"frontier: runs that no run with as little {form.columns[0]} beats"
    return np.arange(len(observations)), "all rows"


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


def finite(value):
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
