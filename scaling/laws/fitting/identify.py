"""Whether data can determine a law: refusals that say which runs would mend it, before a fit and after it."""

import numpy as np

from scaling.laws.forms.law import Form
from scaling.laws.tables.observations import Observations

# Singular values of the logs below this share of the largest are one column said twice.
SAME_LINE = 1e-3
# Runs within this much (RMS, in log) of a line on which one column is a power of the others may not tell them apart:
# whether they can, their losses decide.
NEAR_LINE = 0.10
# How the loss changes across that line must be known to a quarter of how it changes along it (one standard error): a
# 95 % interval then leaves half of the effect to be one column's or the other's.
KNOWN_TO = 0.25
# No loss is known better than this, relative, whatever a table without noise says: another seed moves it by as much.
LEAST_NOISE = 3e-3


def check_identifiable(observations: Observations, form: Form) -> None:
    """Raises ValueError when these data cannot determine the form, saying what would."""
    source, n, P = observations.source, len(observations), len(form.parameters)
    missing = [c for c in form.columns if c not in observations.columns]
    if missing:
        raise ValueError(f"{source}: {form.name} needs column {', '.join(missing)}, which has no positive numbers here")
    if n < P + 1:
        raise ValueError(f"{source}: {form.name} has {P} parameters and {n} observations: {P + 1} or more are needed")
    for column in _bases(observations, form):
        x = observations.columns[column]
        levels = len(np.unique(np.round(np.log(x), 3)))
        needed = 3 if _own_exponent(form, column) else 2
        if levels < needed:
            what = "one value" if levels == 1 else f"{levels} values"
            raise ValueError(
                f"{source}: {column} takes {what} only: the exponent of {column} in {form.name} cannot be known; "
                f"add runs with {needed} or more different values of {column}"
            )
    varied, centred = _varied(observations, form)
    if len(varied) > 1:
        spread = np.linalg.svd(centred, compute_uv=False)
        if spread[-1] < SAME_LINE * spread[0]:
            raise ValueError(
                f"{source}: {' and '.join(varied)} move together in every row (one is a power of the other): "
                f"{form.name} cannot tell their effects apart; add runs off that line"
            )


def check_apart(observations: Observations, form: Form, params: dict[str, float]) -> None:
    """Raises ValueError when columns move together but for so little that these losses cannot tell them apart.

    Off the line along which one column is a power of the others, at a distance s (RMS over the n rows, in log), runs of
    noise σ tell the loss's slope across that line to σ / (s √n). With D = 20 N ± 1 % that is as much as the slope along
    it, and any split of the loss between N and D fits as well.
    """
    varied, centred = _varied(observations, form)
    if len(varied) < 2 or form.signed:  # what may be zero has no relative noise
        return
    directions, spread, _ = np.linalg.svd(centred, full_matrices=False)
    n = len(observations)
    off = spread[-1] / np.sqrt(n)
    if off > NEAR_LINE:
        return
    columns = {c: observations.columns[c] for c in form.columns}
    step = 1e-3 * directions[:, 0]
    there, back = (columns | {c: columns[c] * np.exp(sign * h) for c, h in zip(varied, step)} for sign in (1, -1))
    with np.errstate(all="ignore"):
        here, there, back = (np.log(form.predict(params, **x)) for x in (columns, there, back))
        residual = np.abs(here - np.log(observations.loss))
        slope = float(np.sqrt(np.mean(((there - back) / 2e-3) ** 2)))
    noise = np.median(residual) / 0.6744897501960817 * np.sqrt(n / max(n - len(params), 1))
    noise = max(float(noise), LEAST_NOISE)
    error = noise / max(off * np.sqrt(n), 1e-300)
    if np.isfinite(slope) and error > KNOWN_TO * slope:
        raise ValueError(
            f"{observations.source}: {' and '.join(varied)} move together in every row but for {off:.1%}: with a noise "
            f"of {noise:.1%} the slope of the loss across that line is known to {error:.2g}, beside {slope:.2g} along "
            f"it: {form.name} cannot tell their effects apart; add runs off that line"
        )


def on_a_ray(observations: Observations) -> bool:
    """Whether runs chose their tokens by their size (or all one of them), within ``NEAR_LINE``: then N against C along
    them is the design's own power law, whatever their losses."""
    logs = np.log([observations.columns[c] for c in ("num_params", "num_tokens")])
    off = np.linalg.svd(logs - logs.mean(axis=1, keepdims=True), compute_uv=False)[-1]
    return bool(off / np.sqrt(len(observations)) <= NEAR_LINE)


def _bases(observations: Observations, form: Form) -> list[str]:
    """Columns that a form takes powers of. One corpus will do, and no repetition too: ``unique_tokens`` is no axis
    that runs must spread along, and neither is what says which group a row is of."""
    apart = {"unique_tokens", *form.indicators}
    return [c for c in form.columns if c not in apart and (observations.columns[c] > 0).all()]


def _varied(observations: Observations, form: Form) -> tuple[list[str], np.ndarray]:
    """Columns that take several values, and their centred logarithms (k, n)."""
    logs = {c: np.log(observations.columns[c]) for c in _bases(observations, form)}
    varied = [c for c, x in logs.items() if np.ptp(x) > 0]
    return varied, np.array([logs[c] - logs[c].mean() for c in varied])


def _own_exponent(form: Form, column: str) -> bool:
    """Whether a sum of powers with an offset has an exponent that only this column tells: three values then."""
    if form.powers is None or form.powers.offset is None:
        return False
    used: dict[str, set[str]] = {}
    for _, exponents in form.powers.terms:
        for c, e in exponents.items():
            if isinstance(e, str):
                used.setdefault(c, set()).add(e.removeprefix("-"))
    others = set().union(*(names for c, names in used.items() if c != column))
    return bool(used.get(column, set()) - others)
