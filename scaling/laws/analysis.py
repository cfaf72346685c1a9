"""Everything a sweep's losses say, in one object: laws with intervals, the three approaches, allocation, forecasts."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws import payload
from scaling.laws.answers import allocation, approaches, budgets, isoflop_bias
from scaling.laws.answers.allocation import Cost
from scaling.laws.answers.combination import MEMBERS, Combination, combine
from scaling.laws.fitting import identify, run_noise
from scaling.laws.fitting.estimate import Draws, Fit, fit
from scaling.laws.fitting.identify import NotIdentified, Unidentified
from scaling.laws.fitting.run_noise import RunNoise
from scaling.laws.forms import catalogue
from scaling.laws.intervals import diagnosis, influence
from scaling.laws.intervals.profile import Profile, Quantity, positive_profile, profile
from scaling.laws.tables.observations import Observations, from_table, settings_of
from scaling.numbers import check_resamples

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_LAWS = ("chinchilla", "kaplan_n", "kaplan_d", "kaplan_c")
STRAIGHT = ("chinchilla", "chinchilla_tied")  # sums of powers, which those that bend have in them
BENDING = ("joined", "saturating")
# Above this many rows profiles would take longer than everything else together.
MAX_PROFILED_ROWS = 2000


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
    run_noise: RunNoise | None = None  # measured between repeats, where fits are weighted by it
    residuals: dict[str, influence.Residuals] = field(default_factory=dict)
    leverage: influence.Leverage | None = None  # of the law that forecasts
    asked: dict[str, Any] = field(default_factory=dict)  # the options of ``analyse`` that a refit of these runs takes
    refused: dict[str, Unidentified] = field(default_factory=dict)  # by law; "allocation": a, N*, D* of any law

    @property
    def surface(self) -> str | None:
        """Name of the first fitted law of both N and D: the one that allocation and forecast use."""
        for name, fitted in self.fits.items():
            if set(fitted.form.columns) == {"num_params", "num_tokens"}:
                return name
        return None

    @property
    def no_allocation(self) -> str | None:
        """Why nothing can be said of N* and D*, in words; None where something can."""
        told = self.refused.get("allocation")
        return self.cost.problem or (None if told is None else str(told))

    @property
    def forecaster(self) -> str | None:
        """The law that forecasts where no combination does: the surface, else the first of one column."""
        return self.surface or next((n for n, f in self.fits.items() if len(f.form.columns) == 1), None)

    def to_json(self) -> dict[str, Any]:
        """fit.json's content (``payload.of``)."""
        return payload.of(self)


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
    noise: str = "constant",
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
      noise: of log loss from run to run: ``constant``, or ``measured`` where cells are repeated with seeds, as a
        function of size and data, by which fits are weighted (``run_noise.measure``).
      bootstrap: resamples behind the intervals; 0 uses the delta method.
      holdout_flops: leave out, and forecast, rows with more compute.
      combined: forecast from several forms weighted by their own rolling forecasts (``combine``), not from the first
        law of N and D alone.

    Raises:
      ValueError: the table cannot be read as observations, or identifies none of the laws; says what would mend it.
    """
    check_resamples("bootstrap", bootstrap)
    reading: dict[str, Any] = {
        "num_params": num_params,
        "flops": flops,
        "holdout_flops": holdout_flops,
        "source": source,
    }
    # Runs that differ in a rate or a batch are rows to a law of that, and tries of one cell to the others.
    settings = {catalogue.get(law).name: settings_of(catalogue.get(law).columns) for law in laws}
    usual = min(settings.values(), key=len, default=())
    observations = from_table(table, **reading, columns=usual)
    own = {name: from_table(table, **reading, columns=of) for name, of in settings.items() if set(of) != set(usual)}
    columns = observations.columns
    clusters, said = diagnosis.run_clusters(observations)
    objective: dict[str, Any] = {"loss": loss, "delta": delta, "tau": tau}
    names = [law if isinstance(law, str) else catalogue.get(law).name for law in laws]
    asked: dict[str, Any] = {"laws": names, "noise": noise, "bootstrap": bootstrap, **objective}
    asked["holdout_flops"] = holdout_flops
    measured, told_of_noise = run_noise.asked(noise, observations, map(catalogue.get, laws), objective)
    if measured is not None:
        objective["variance"] = measured.variance
    fits, draws, diagnoses, selections, problems = {}, {}, {}, {}, []
    refused: dict[str, Unidentified] = {}
    warnings = [*observations.warnings, *([said] if said else []), *told_of_noise]
    forms = [catalogue.get(law) for law in laws]
    if observations.repeated and any({"num_tokens"} == {"num_tokens", "unique_tokens"} & set(f.columns) for f in forms):
        warnings.append(observations.repeated)
    for form in map(catalogue.get, laws):
        if form.target != "loss":
            raise ValueError(
                f"{source}: {form.name} is a law of {form.target}, not of the loss: fit it from Python, "
                f'scaling.fit_law(table, "{form.name}"), on a table with a column {form.target}'
            )
        try:
            of_law = own.get(form.name, observations)
            rows, selections[form.name] = approaches.select(of_law, form)
            fits[form.name] = fit(of_law.take(rows), form, **objective)
        except ValueError as e:
            problems.append(str(e))
            if isinstance(e, NotIdentified):
                refused[form.name] = e.told
                if set(form.columns) == {"num_params", "num_tokens"}:
                    refused.setdefault("allocation", e.told)
            continue
        if bootstrap:
            of_runs = clusters if form.name not in own else diagnosis.run_clusters(of_law)[0]
            told = diagnosis.diagnose(fits[form.name], None if of_runs is None else of_runs[rows])
            diagnoses[form.name] = told
            draws[form.name] = diagnosis.resample(fits[form.name], told, bootstrap, seed)
            if told.doubtful:
                warnings.append(f"{form.name}: {told.reason}")
            if told.groups is not None:
                how = "allow for it" if told.kind == "uneven" else f"are a wild bootstrap's, {told.unit}"
                warnings.append(f"{form.name}: {told.reason}: intervals {how}")
        warnings += _doubts(fits[form.name], draws.get(form.name))
    if not fits and refused:
        raise NotIdentified(observations.source, next(iter(refused.values())))
    if not fits:
        raise ValueError(problems[0] if problems else f"{source}: no law was asked for: write --law chinchilla")
    warnings += observations.left_out()
    found = Analysis(
        observations=observations,
        fits=fits,
        draws=draws,
        cost=allocation.cost_of(columns["num_params"], columns["num_tokens"], columns["flops"]),
        isoflop=approaches.isoflop(run_noise.weighed(observations, measured), num_bootstrap=bootstrap, seed=seed) or {},
        envelope=approaches.envelope(observations, curves, flops=flops) or {},
        warnings=tuple(dict.fromkeys(problems + warnings)),
        seed=seed,
        selections=selections,
        resampled="run" if clusters is not None else "observation",
        noise=diagnoses,
        run_noise=measured,
        asked=asked,
        refused=refused,
    )
    found = dataclasses.replace(found, refused=_refused(found))
    if combined and found.forecaster is not None:
        rows, _ = approaches.select(observations, found.fits[found.forecaster].form)
        forecasting = combine(observations.take(rows), _members(found), fits, **objective)
        found = dataclasses.replace(found, combination=forecasting)
    return _with_evidence(found)


def _refused(found: Analysis) -> dict[str, Unidentified]:
    """``Analysis.refused`` with ``allocation`` as it is once all laws are in: the refusal of a law of N and D where
    none was fitted, or, of the one that was, that all rows lie on one side of every minimum."""
    if found.surface is None:
        return found.refused
    budgets = [p.averaged() for p in approaches.profiles(found.observations)]
    by_law = {name: told for name, told in found.refused.items() if name != "allocation"}
    if found.cost.problem or not budgets:
        return by_law
    form, params, columns = found.fits[found.surface].form, found.fits[found.surface].params, found.observations.columns
    C = np.append(columns["flops"], [p.flops for p in budgets])
    best = allocation.optimal_num_params(form, params, C, found.cost)
    n = len(found.observations)
    told = identify.one_sided(found.surface, budgets, columns["num_params"], best[:n], best[n:])
    return by_law if told is None else by_law | {"allocation": told}


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
    if found.surface in STRAIGHT and residuals[found.surface].bends and not found.fits.keys() & set(BENDING):
        laws = " ".join((found.surface, *BENDING))
        warnings.append(f"{found.surface}: laws of N and D that may bend so: --law {laws}")
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
    if found.forecaster is not None and (found.surface is None or "allocation" not in found.refused):
        found = dataclasses.replace(found, leverage=influence.leverage(found.fits[found.forecaster], _foretold(found)))
    if found.surface is not None:
        warnings += payload.no_allocation(found)
        if found.cost.max_error > allocation.SAID_ERROR and not found.no_allocation:
            warnings.append(
                f"{found.cost.describe()} misses the C of a row by {found.cost.max_error:.0%}: the allocation is that "
                "of this cost, not of every row's"
            )
    return dataclasses.replace(found, warnings=tuple(warnings + _disagreements(found)))


def _foretold(found: Analysis) -> dict[str, Quantity]:
    """The loss whose moves are told beside the exponent's: of the largest run held out, else at the best size of the
    largest compute fitted, by one law alone."""
    form = found.fits[found.forecaster].form  # type: ignore[index]  # there is a forecaster
    held = [r for r in payload.rows_held_out(found) if all(r.get(c) for c in ("flops", *form.columns))]
    if held:
        largest = max(held, key=lambda row: row["flops"])
        columns = {c: np.array([float(largest[c])]) for c in form.columns}
        return {"held_out_loss": lambda p: form.predict({k: np.atleast_1d(v) for k, v in p.items()}, **columns)}
    C = found.observations.columns["flops"].max()
    if found.surface is None or found.no_allocation or allocation.exponents(form, found.fits[form.name].params) is None:
        return {}
    return {"best_loss": allocation.quantities(form, (C, C), found.cost)["loss"]}


def _derived(found: Analysis) -> dict[str, Profile]:
    """Profiles of what the surface law implies: its exponents, and the optimum at the largest compute fitted."""
    fitted, C = found.fits[found.surface], found.observations.columns["flops"]  # type: ignore[index]  # there is one
    if allocation.exponents(fitted.form, fitted.params) is None:
        return {}  # an optimum found by search, thousands of times over
    if "allocation" in found.refused:
        return {}
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
    law = payload.allocation_entry(found)
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
