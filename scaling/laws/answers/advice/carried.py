"""What a page carries to answer questions by itself: the law, its draws, other forms, the optimum's loss by budget."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from scaling.laws.answers.advice.basis import MAX_DECADES, Basis
from scaling.laws.answers.advice.machines import critical, own_batches
from scaling.laws.answers.allocation import Cost
from scaling.laws.answers.at_best import LawAtBest
from scaling.laws.answers.forecast import forecast
from scaling.laws.answers.optimum import Surfaced

DIGITS = 7  # of a draw: a size N^α of 1e12 parameters moves by less than 1e-5 with the last of them
# Mantissas of a decade's budgets: preferred numbers of IEC 60063, series E24.
STEPS = (1.0, 1.1, 1.2, 1.3, 1.5, 1.6, 1.8, 2.0, 2.2, 2.4, 2.7, 3.0, 3.3, 3.6, 3.9, 4.3, 4.7, 5.1, 5.6, 6.2, 6.8, 7.5,
         8.2, 9.1)  # fmt: skip
DECADES_BELOW, DECADES_BEYOND = 0.5, 4.0  # budgets run from this far below the least compute fitted to beyond the most
OPTIMA = ("num_params", "num_tokens", "tokens_per_param")


def of(found: Surfaced) -> dict[str, Any]:
    """Returns what ``scaling/report/ask.js`` answers from, in fit.json's plain numbers; empty where advice has no law.

    A law is (E, log A, α, log B, β, γ, k) of E + r / (1 + k r), r = (A N^-α + B D^-β)^γ; columns of numbers are texts,
    one line each. ``open_ends`` says which ends of an optimum's interval the profile at the largest compute does not
    have. ``optimum`` has the loss of the run that is best for each budget, as it is forecast (``questions.of_budget``).
    """
    try:
        basis = Basis(found)
    except ValueError:
        return {}
    drawn = found.draws.get(str(found.surface))
    laws = {"best": basis.best, **basis.others()}
    if drawn is not None:
        laws["draws"] = basis.law(drawn.params)
    held = {name: numbers_of(law) for name, law in laws.items()}
    if not all(np.isfinite(law).all() and (law[[2, 4]] > 0).all() for law in held.values()):
        return {}  # a loss that does not fall with N or D has no optimum to ask for
    flops = found.observations.columns["flops"]
    draws, best = held.pop("draws", None), held.pop("best")
    return {
        "law": found.surface,
        "level": found.level,
        "top": basis.top,
        "bottom": basis.bottom,
        "cost": cost_of(found.cost),
        "own_batch": own_batches(found.observations, critical(None)),
        "best": best[:, 0].tolist(),
        "others": {name: law[:, 0].tolist() for name, law in held.items()},
        "draws": None if draws is None else [_text(column) for column in draws],
        "open_ends": {
            name: [not np.isfinite(end) for end in found.derived[name].interval]
            for name in OPTIMA
            if name in found.derived
        },
        "optimum": _optimum(found, basis, budgets(flops.min(), basis.top)),
        "repeated": _repeated(found),
    }


def budgets(low: float, top: float) -> np.ndarray:
    """Budgets from below the least compute to beyond the most, two digits each, equally far apart but for rounding."""
    ends = low * 10**-DECADES_BELOW, top * 10**DECADES_BEYOND
    powers = range(int(np.floor(np.log10(ends[0]))), int(np.ceil(np.log10(ends[1]))))
    # Read as a person writes them: 2.2e13, not 2.2 times a power that rounding has touched.
    every = np.array([float(f"{step}e{power}") for power in powers for step in STEPS])
    return every[(every >= ends[0]) & (every <= ends[1])]


def cost_of(cost: Cost) -> dict[str, float]:
    return {"sign": cost.sign, "scale": cost.scale, "gamma": cost.gamma, "factor": cost.factor}


def numbers_of(law: LawAtBest) -> np.ndarray:
    """(7, B): E, log A, α, log B, β, γ, k of laws of two powers, as they stand inside the power γ; k of a ceiling
    (``LawAtBest.per_span``)."""
    by_column = {next(iter(exponents)): (log_a, exponents) for log_a, exponents in law.terms()}
    rows = [law.floor]
    for column in ("num_params", "num_tokens"):
        log_amplitude, exponents = by_column[column]
        rows += [log_amplitude / law.join, exponents[column] / law.join]
    rows += [law.join, law.per_span]
    return np.stack([np.broadcast_to(row, law.floor.shape)[:, 0] for row in rows])


def _optimum(found: Surfaced, basis: Basis, flops: np.ndarray) -> dict[str, Any]:
    """The loss at the optimum for each C, its interval where it is worth one, and what other forms say where not."""
    log_n = basis.best.best_size(np.log(flops))[0]
    tokens = flops / basis.cost.flops_per_token(np.exp(log_n))
    cells = [
        {"run_id": "asked", "num_params": float(n), "num_tokens": float(d), "flops": float(C)}
        for C, n, d in zip(flops, np.exp(log_n), tokens)
    ]
    near = [basis.decades(C) <= MAX_DECADES for C in flops]
    known = _with_members(found)
    # One by one: what a run draws of its noise depends on which runs are asked for with it.
    said = [forecast(known, [cell], found.level)[0] for cell, worth in zip(cells, near) if worth]
    said += forecast(known, [cell for cell, worth in zip(cells, near) if not worth], found.level)
    laws = sorted({name for row in said for name in row["by_law"]})
    return {
        "flops": " ".join(f"{C:.1e}" for C in flops),
        "loss": _text(row["predicted"] for row in said),
        "lower": _text(row["interval"][0] for row, worth in zip(said, near) if worth),
        "upper": _text(row["interval"][1] for row, worth in zip(said, near) if worth),
        "by_law": {name: _text(row["by_law"][name] for row in said) for name in laws},
    }


def _with_members(found: Surfaced) -> Surfaced:
    """The analysis with the resamples of every law that forecasts, which a forecast makes anew each time."""
    if found.combination is None or not found.draws:
        return found
    rows = found.fits[str(found.forecaster)].observations
    clusters, noise = (rows.run if found.resampled == "run" else None), found.noise.get(str(found.forecaster))
    made = found.combination.resamples(
        max(map(len, found.draws.values())), found.seed, clusters, noise, known=found.draws
    )
    return dataclasses.replace(found, draws={**found.draws, **made})  # type: ignore[type-var]  # an Analysis


def _repeated(found: Surfaced) -> dict[str, Any] | None:
    """The data-constrained law (Muennighoff et al. 2023) and its draws, where it was fitted."""
    fitted = found.fits.get("data_constrained")
    if fitted is None:
        return None
    drawn = found.draws.get("data_constrained")
    return {
        "params": dict(fitted.params),
        "draws": None if drawn is None else {name: _text(values) for name, values in drawn.params.items()},
    }


def _text(values: Iterable[float]) -> str:
    return " ".join(f"{v:.{DIGITS}g}" for v in values)
