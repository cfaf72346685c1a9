"""One law for several groups of rows: exponents and floor shared, amplitudes each group's own."""

import dataclasses
from typing import Any

import numpy as np

from scaling.laws.forms.law import Form, Parameter, Params, PowerSum, resolve

# An amplitude e^20 times another group's is none that one law would be asked for.
LOG_RATIO_BOUND = 20.0
INDICATOR = "compared_"  # how the names of groups' columns begin


def indicator(k: int) -> str:
    """The column that says which rows are of group ``k`` ≥ 1: e on them and 1 elsewhere, so that its power is a factor
    of these rows alone."""
    return f"{INDICATOR}{k}"


def joint(form: Form, num_groups: int) -> Form:
    """Returns the law L_g = E + Σ_k A_kg Π_j x_j^-α_kj of ``num_groups`` groups g that differ in the A_kg alone.

    Every term is written A_k Π_j x_j^-α_kj Π_g e_g^-a_kg, with e_g the ``indicator`` of group g ≥ 1: again a sum of
    powers, which the solver knows. The a_kg are the logarithms of A_k0 / A_kg. With A_kg = A_k ρ_kg^-α_k it is the law
    of Volkova et al. 2026 (arXiv 2602.07712): exponents shared, and a factor ρ on parameters and on tokens for each
    group.

    Raises ValueError where the form is no sum of powers.
    """
    if form.powers is None:
        raise ValueError(f"{form.name} is no sum of powers: its groups cannot share exponents; write --law chinchilla")
    shared = {name: p for name, p in form.parameters.items() if name not in dict(form.powers.terms)}
    columns = tuple(indicator(k) for k in range(1, num_groups))
    amplitudes, terms = {}, []
    for name, exponents in form.powers.terms:
        own = {f"{name}_{k}": indicator(k) for k in range(1, num_groups)}
        of = (*((e, c) for c, e in exponents.items()), *own.items())
        amplitudes[name] = Parameter("amplitude", lower=0.0, unit="nats/token", of=of, linear=True)
        amplitudes |= {ratio: Parameter(lower=-LOG_RATIO_BOUND, upper=LOG_RATIO_BOUND, starts=(0.0,)) for ratio in own}
        terms.append((name, {**exponents, **{c: ratio for ratio, c in own.items()}}))
    powers = dataclasses.replace(form.powers, terms=tuple(terms))
    names = (*form.columns, *columns)

    def function(*x: np.ndarray, **p: Any) -> Any:
        return _value(powers, dict(zip(names, x)), p)

    return Form(
        f"{form.name}, exponents shared", function, shared | amplitudes, names, form.equation, form.source,
        powers=powers, indicators=columns,
    )  # fmt: skip


def _value(powers: PowerSum, x: dict[str, np.ndarray], p: Params) -> Any:
    """E + Σ_k A_k Π_j x_j^-α_kj, or the terms joined, or below a ceiling."""
    floor = p[powers.offset] if powers.offset is not None else 0.0
    plain = powers.join is None and powers.ceiling is None
    total, gamma = (floor if plain else 0.0), (1.0 if powers.join is None else p[powers.join])
    for name, exponents in powers.terms:
        term = p[name]
        for column, e in exponents.items():
            term = term * x[column] ** -resolve(e, p)
        total = total + (term if powers.join is None else term ** (1 / gamma))
    if plain:
        return total
    rise = total if powers.join is None else total**gamma
    return floor + (rise if powers.ceiling is None else rise / (1 + rise / (p[powers.ceiling] - floor)))


def of_group(form: Form, params: Params, k: int) -> dict[str, Any]:
    """Parameters of ``form`` itself for group ``k``, from those of ``joint(form, …)``: numbers, or arrays of draws."""
    out = {name: params[name] for name in form.parameters if name not in dict(form.powers.terms)}  # type: ignore[union-attr]  # a sum of powers
    for name, _ in form.powers.terms:  # type: ignore[union-attr]  # likewise
        log = np.log(params[name]) - (params[f"{name}_{k}"] if k else 0.0)
        declared = form.parameters[name]
        if declared.kind == "critical":  # (x_c/x)^α: its amplitude is x_c^α
            log = log / resolve(declared.of[0][0], params)
        with np.errstate(over="ignore"):
            out[name] = np.exp(log)
    return {name: out[name] for name in form.parameters}
