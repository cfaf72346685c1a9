"""Which form, and which convention: laws side by side on the same data, and one law under every counting rule."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.laws.answers import allocation
from scaling.laws.answers.advice import carried
from scaling.laws.answers.at_best import LawAtBest
from scaling.laws.fitting import run_noise
from scaling.laws.fitting.estimate import Fit, Variance, fit
from scaling.laws.forms import catalogue
from scaling.laws.forms.law import Form, Params
from scaling.laws.intervals import resampling
from scaling.laws.intervals.profile import deviance_scale
from scaling.laws.tables.observations import Observations, from_table, settings_of

if TYPE_CHECKING:
    import pandas as pd

DECADE = 10.0
GROWTH_STEPS = 4
# Fewer rows than this on either side of a cut say nothing about a forecast.
MIN_ROWS = 3


def applicable(observations: Observations) -> list[str]:
    """Registered laws of the loss whose columns these observations have."""
    return [
        name
        for name, form in catalogue.FORMS.items()
        if form.target == "loss" and all(c in observations.columns for c in form.columns)
    ]


def surfaces(observations: Observations) -> list[str]:
    """Those of ``applicable`` that take both size and data: laws of one quantity alone do not fit every row, and those
    of a rate or a batch are of other rows, all that were tried."""
    columns = {name: catalogue.FORMS[name].columns for name in applicable(observations)}
    return [name for name, of in columns.items() if len(of) > 1 and not settings_of(of)]


def laws(
    observations: Observations,
    names: Sequence["str | Form"],
    *,
    loss: str = "huber",
    delta: float | None = None,
    tau: float = 0.5,
    variance: Variance | None = None,
) -> list[dict[str, Any]]:
    """Fits every law to every row, under one objective, and ranks them.

    - ``aicc``: 2 Σ w ρ / τ + 2P + 2P(P+1)/(n-P-1), with δ and the scale τ = E ψ² / E ψ' of the law that fits best
      (for squared loss this is AICc with a common variance; Ronchetti 1985 for robust objectives). Compare
      differences only.
    - ``held_out``: fitted below the last decade of compute, mean relative error on that decade.
    - ``growth``: the same with the fitted range growing towards it: what more compute would have bought.

    Laws that cannot be fitted are listed with ``problem``. Sorted by AICc.
    """
    rows: list[dict[str, Any]]
    objective: dict[str, Any]
    fits, rows, objective = {}, [], {"loss": loss, "delta": delta, "tau": tau, "variance": variance}
    for name in names:
        form = catalogue.get(name)
        try:
            fits[form.name] = fit(observations, form, **objective)
        except ValueError as e:
            rows.append({"law": form.name, "problem": str(e), "aicc": None})
    if not fits:
        return rows
    best = min(fits.values(), key=lambda f: np.median(np.abs(f.residuals)) / max(f.degrees_of_freedom, 1) ** 0.5)
    chosen = best.loss.delta
    if delta is None and loss in ("huber", "tukey"):
        fits = {name: fit(observations, f.form, **objective | {"delta": chosen}) for name, f in fits.items()}
    best = min(fits.values(), key=lambda f: f.objective)
    scale = deviance_scale(best)
    for fitted in fits.values():
        grown = growth(observations, fitted.form, **objective)
        last = observations.columns["flops"].max() / DECADE if "flops" in observations.columns else None
        # The last of the growing ranges ends where ``held_out`` does: one fit serves both.
        whole = grown[-1] if grown and np.isclose(grown[-1]["fitted_up_to"], last, rtol=1e-9) else None  # type: ignore[arg-type]  # grown only where there are FLOPs
        rows.append(
            {
                "law": fitted.form.name,
                "equation": fitted.form.equation,
                "num_parameters": len(fitted.params),
                "converged": fitted.converged,
                "reasons": list(fitted.reasons),
                "residual_rmse": fitted.residual_rmse,
                "aicc": _aicc(fitted, scale),
                "held_out": whole or held_out(observations, fitted.form, **objective),
                "growth": grown,
            }
        )
    known = [r["aicc"] for r in rows if r["aicc"] is not None]
    for row in rows:
        row["delta_aicc"] = None if row["aicc"] is None else row["aicc"] - min(known)
    return sorted(rows, key=lambda r: ("problem" in r, np.inf if r["aicc"] is None else r["aicc"]))


def _aicc(fitted: Fit, scale: float) -> float | None:
    n, P = fitted.num_observations, len(fitted.params)
    if n - P - 1 <= 0:
        return None
    return float(2 * fitted.objective / scale + 2 * P + 2 * P * (P + 1) / (n - P - 1))


def held_out(
    observations: Observations, form: Form, *, cut: float | None = None, **options: Any
) -> dict[str, Any] | None:
    """Mean and worst relative error on the largest compute, fitted to the rest.

    ``cut``: fit rows with flops up to it (a tenth of the largest by default), predict those of the last decade. None
    where either side has too few rows, or flops are not known.
    """
    if "flops" not in observations.columns:
        return None
    flops = observations.columns["flops"]
    last = flops.max() / DECADE
    cut = last if cut is None else cut
    below, above = flops <= cut * (1 + 1e-9), flops > last * (1 + 1e-9)
    if below.sum() < len(form.parameters) + MIN_ROWS or above.sum() < MIN_ROWS:
        return None
    try:
        fitted = fit(observations.take(below), form, **options)
    except ValueError:
        return None
    rows = observations.take(above)
    error = np.abs(fitted.predict(**{c: rows.columns[c] for c in form.columns}) / rows.loss - 1)
    return {
        "fitted_up_to": float(cut),
        "predicted_above": float(last),
        "num_fitted": int(below.sum()),
        "num_predicted": int(above.sum()),
        "mean_error": float(error.mean()),
        "worst_error": float(error.max()),
    }


def growth(observations: Observations, form: Form, **options: Any) -> list[dict[str, Any]]:
    """``held_out`` for fitted ranges that grow in log C up to the last decade."""
    if "flops" not in observations.columns:
        return []
    C = observations.columns["flops"]
    if C.max() / DECADE <= C.min():
        return []
    cuts = np.geomspace(C.min(), C.max() / DECADE, GROWTH_STEPS + 1)[1:]
    found = [held_out(observations, form, cut=float(cut), **options) for cut in cuts]
    return [f for f in found if f]


def conventions(
    table: "pd.DataFrame", law: "str | Form" = "chinchilla", *, bootstrap: int = 200, seed: int = 0,
    noise: str = "constant", **options: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Refits a law under every parameter count and FLOP rule the table carries: what each choice moves.

    Args:
      options: of ``from_table`` (holdout_flops, source) and ``fit`` (loss, delta).

    Returns:
      [{num_params, flops, params, a, a_local, a_local_interval, tokens_per_param at the largest fitted C}], and of a
      law of two powers ``ask``, as ``advice.carried`` has law and cost.
    """
    counts = [c.removeprefix("num_params_") for c in table.columns if c in _COUNTS] or ["as given"]
    rules = [c.removeprefix("flops_") for c in table.columns if _is_rule(c)] or ["as given"]
    reading = {k: options.pop(k) for k in ("holdout_flops", "source") if k in options}
    rows = []
    for count in counts:
        fitted, is_of_flops = None, "flops" in catalogue.get(law).columns
        for rule in rules:
            observations = from_table(table, num_params=count, flops=rule, **reading)
            measured, _ = run_noise.asked(noise, observations, [catalogue.get(law)], options)
            # A law of N and D knows no rule of C, unless the rule says which rows are held out.
            if fitted is None or measured is not None or is_of_flops or reading.get("holdout_flops") is not None:
                variance = None if measured is None else measured.variance
                fitted = fit(observations, law, **options, variance=variance)
            rows.append({"num_params": count, "flops": rule} | _moved(observations, fitted, bootstrap, seed))
    return rows


_COUNTS = ("num_params_non_embedding", "num_params_total")


def _is_rule(column: str) -> bool:
    """Whether a records' column counts the FLOPs of a run, by whatever rule the records knew."""
    return str(column).startswith("flops_") and not str(column).startswith("flops_per_")


def _moved(observations: Observations, fitted: Fit, bootstrap: int, seed: int) -> dict[str, Any]:
    columns = observations.columns
    cost = allocation.cost_of(columns["num_params"], columns["num_tokens"], columns["flops"])
    ends = np.array([columns["flops"].min(), columns["flops"].max()])

    def optimum(p: Params) -> np.ndarray:
        return allocation.optimal_num_params(fitted.form, p, ends, cost)

    def slope(p: Params) -> np.ndarray:
        n = optimum(p)
        known = np.where(allocation.found(n), n, np.nan)
        return np.diff(np.log(known), axis=-1)[..., 0] / np.log(ends[1] / ends[0])

    n = optimum(fitted.params)[1]
    out = {
        "params": fitted.params,
        "converged": fitted.converged,
        "a_local": None,
        "tokens_per_param": None,
        "cost": cost.describe(),
    }
    known = cost.problem is None and bool(allocation.found(optimum(fitted.params)).all())
    if known:
        out |= {
            "a_local": float(slope(fitted.params)),
            "tokens_per_param": float(ends[1] / cost.flops_per_token(n) / n),
        }
    if cost.problem is None and allocation.has_two_powers(fitted.form):
        law = LawAtBest(fitted.form, {k: np.atleast_1d(v) for k, v in fitted.params.items()}, cost)
        best = carried.numbers_of(law)[:, 0].tolist()
        out["ask"] = {"law": fitted.form.name, "best": best, "cost": carried.cost_of(cost)}
    exponents = allocation.exponents(fitted.form, fitted.params)
    out["a"] = None if exponents is None else float(exponents[0])
    if bootstrap and known:
        draws = resampling.bootstrap(fitted, bootstrap, seed=seed)
        out["a_local_interval"] = resampling.interval(slope(draws.params))
    return out
