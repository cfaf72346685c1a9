"""What a design can be trusted with: coverage of intervals and scatter of estimates on data whose law is known.

``coverage`` asks of a planned grid, before anything is trained, whether its intervals would hold what they promise and
how wide they would be.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from scaling.laws.answers import allocation
from scaling.laws.answers.multiplier import compare
from scaling.laws.fitting import run_noise
from scaling.laws.fitting.estimate import Fit, fit
from scaling.laws.forms.law import Form, Params
from scaling.laws.intervals import diagnosis, resampling
from scaling.laws.intervals.profile import profile
from scaling.laws.tables.observations import Observations

METHODS = ("bootstrap", "profile", "delta")
CHOSEN = "chosen"  # the profile or the wild bootstrap, as the residuals' tests choose for a user
MEASURED = "measured"  # the same of fits that are weighted by the noise between repeats (``run_noise``)
# Noise that exists beside the Gaussian: growing with the loss; one error, .8 of the variance, for all rows of a size,
# of a budget, or of three seeds of a run that each are a row; two seeds in every third cell, with equal noise, and with
# noise that grows fivefold from the least loss to the largest.
REPEATED = ("twins", "fivefold")  # those with a second seed in every ``TWINS``-th cell
NOISES = ("gaussian", "loss", "sizes", "seeds", "budgets", *REPEATED)
SHARED = 0.8
GROWTH = 4.0  # σ ∝ L⁴: sixteen times as noisy where the loss is twice as large
TWINS = 3
Quantity = Callable[[Params], np.ndarray]


def quantities(form: Form, truth: Mapping[str, float], flops: float) -> dict[str, Quantity]:
    """a, log N* at ``flops`` and log loss at the true optimum there: what coverage is asked about by default."""
    cost, C = allocation.Cost(), np.array([flops])
    n = allocation.optimal_num_params(form, truth, C, cost)[0]

    def exponent(p: Params) -> np.ndarray:
        return allocation.exponents(form, p)[0]  # type: ignore[index]  # of laws that have them

    def size(p: Params) -> np.ndarray:
        return np.log(allocation.optimal_num_params(form, p, C, cost))[..., 0]

    def loss(p: Params) -> np.ndarray:
        return np.log(form.predict(p, num_params=n, num_tokens=flops / (6 * n)))

    return {"a": exponent, "num_params": size, "loss": loss}


def synthetic(
    design: Observations,
    form: Form,
    truth: Mapping[str, float],
    noise: float,
    rng: np.random.Generator,
    outliers: float = 0.0,
    kind: str = "gaussian",
) -> Observations:
    """Draws the design's losses from a known law with noise of the log, of root mean square ``noise``.

    Args:
      outliers: share of runs whose noise is ten times wider (Gaussian noise only).
      kind: one of ``NOISES``; ``seeds`` has three rows for each of the design's, ``twins`` and ``fivefold`` two for
        every third.

    Raises ValueError for another kind.
    """
    if kind not in NOISES:
        raise ValueError(f"noise is {kind!r}: write one of {', '.join(NOISES)}")
    if kind != "gaussian":
        return _structured(design, form, truth, noise, rng, kind)
    exact = form.predict(truth, **{c: design.columns[c] for c in form.columns})
    scale = np.where(rng.random(len(design)) < outliers, 10 * noise, noise)
    loss = exact * np.exp(scale * rng.normal(size=len(design)))
    return Observations(design.columns, loss, design.weight, design.run, design.budget, design.source)


def _structured(
    design: Observations, form: Form, truth: Mapping[str, float], noise: float, rng: np.random.Generator, kind: str
) -> Observations:
    """Losses whose errors are of unequal scale, or shared by groups of rows."""
    twice = kind in REPEATED
    repeats = np.full(len(design), 3 if kind == "seeds" else 1)
    if twice:
        repeats[::TWINS] = 2
    rows = design.take(np.repeat(np.arange(len(design)), repeats))
    if len(rows) > len(design):
        rows = replace(rows, run=np.array([f"row {i}" for i in range(len(rows))]))
    exact = form.predict(truth, **{c: rows.columns[c] for c in form.columns})
    own = rng.normal(size=len(rows))
    if kind == "loss":
        scale = (exact / exact.mean()) ** GROWTH
        error = scale / np.sqrt(np.mean(scale**2)) * own
    elif twice:
        height = np.log(exact) - np.log(exact).min()
        scale = 5.0 ** (height / height.max()) if kind == "fivefold" else np.ones(len(rows))
        error = scale / np.sqrt(np.mean(scale**2)) * own
    else:
        label = np.arange(len(rows)) // 3
        if kind != "seeds":
            x = np.log(rows.columns["num_params" if kind == "sizes" else "flops"])
            label = np.unique(np.round(x, 6), return_inverse=True)[1]
        common = rng.normal(size=label.max() + 1)[label]
        error = np.sqrt(SHARED) * common + np.sqrt(1 - SHARED) * own
    return replace(rows, loss=exact * np.exp(noise * error))


def _near(truth: Mapping[str, float]) -> list[dict[str, float]]:
    """Two starts: the optimum of data from this law is near it."""
    return [dict(truth), {name: 1.05 * value for name, value in truth.items()}]


def coverage(
    design: Observations,
    form: Form,
    truth: Mapping[str, float],
    *,
    noise: float,
    flops: float,
    level: float = 0.90,
    num_draws: int = 500,
    num_bootstrap: int = 400,
    methods: Sequence[str] = METHODS,
    seed: int = 0,
    kind: str = "gaussian",
    evaluation: float = 0.0,
    **options: Any,
) -> dict[str, dict[str, dict[str, float]]]:
    """How often intervals hold the truth on data drawn from a known law, and how far off estimates are.

    Args:
      design: whose columns say where the runs are; its losses are not used.
      noise: standard deviation of log loss.
      kind: of the noise, one of ``NOISES``.
      flops: where N* and the loss are asked for.
      evaluation: standard deviation, in the loss's unit, of an error that all losses of a draw share, as a validation
        set has it. The law of the losses on that set has another E, and the loss asked for is on the same set.
      options: of ``fit`` (loss, delta).

    Returns:
      {method: {quantity: {"coverage": share, "width": median width, "rmse": root mean square error}}}
    """
    rng = np.random.default_rng(seed)
    asked = quantities(form, truth, flops)
    ends: Any
    out: dict[str, dict[str, dict[str, float]]]
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {(m, k): [] for m in methods for k in asked}
    for draw in range(num_draws):
        here = {**truth, "E": truth["E"] + evaluation * rng.normal()} if evaluation else truth
        drawn = synthetic(design, form, here, noise, rng, kind=kind)
        # From the form's own starts, as a user's fit: near the truth a worse optimum would never be met.
        fits = {CHOSEN: fit(drawn, form, **options)}
        if MEASURED in methods:
            measured, _ = run_noise.asked("measured", drawn, [form], options)
            fits[MEASURED] = fit(drawn, form, **options, variance=None if measured is None else measured.variance)
        for method in methods:
            fitted = fits.get(method, fits[CHOSEN])
            way = CHOSEN if method == MEASURED else method
            for k, ends in _intervals(fitted, way, asked, level, num_bootstrap, seed + draw).items():
                found[method, k].append((*ends, _value(asked[k], fitted.params), _value(asked[k], here)))
    out = {m: {} for m in methods}
    for (m, k), ends in found.items():
        lo, hi, value, true = np.array(ends).T
        inside = (lo <= true) & (true <= hi)
        error = float(np.sqrt(np.mean((value - true) ** 2)))
        out[m][k] = {"coverage": float(inside.mean()), "width": float(np.median(hi - lo)), "rmse": error}
    return out


def _value(quantity: Quantity, params: Mapping[str, float]) -> float:
    return float(quantity({name: np.array([v]) for name, v in params.items()})[0])


def _intervals(
    fitted: Fit, method: str, asked: Mapping[str, Quantity], level: float, num_bootstrap: int, seed: int
) -> dict[str, tuple[float, ...]]:
    if method == CHOSEN:
        found = diagnosis.diagnose(fitted)
        if found.groups is None:
            return _intervals(fitted, "profile", asked, level, num_bootstrap, seed)
        draws = diagnosis.resample(fitted, found, num_bootstrap, seed)
        return {k: tuple(resampling.interval(q(draws.params), level)) for k, q in asked.items()}
    if method == "bootstrap":
        draws = resampling.bootstrap(fitted, num_bootstrap, seed=seed)
        return {k: tuple(resampling.interval(q(draws.params), level)) for k, q in asked.items()}
    if method == "profile":
        return {k: tuple(profile(fitted, q, level).interval) for k, q in asked.items()}
    if method == "delta":
        return {k: tuple(map(float, resampling.delta_interval(fitted, q, level)[1:])) for k, q in asked.items()}
    raise ValueError(f"method is {method!r}: write one of {', '.join((*METHODS, CHOSEN))}")


def scatter(
    design: Observations,
    form: Form,
    truth: Mapping[str, float],
    quantity: Quantity,
    *,
    noise: float,
    outliers: float = 0.0,
    num_draws: int = 200,
    seed: int = 0,
    **options: Any,
) -> float:
    """Root mean square error of an estimated quantity on data drawn from a known law."""
    rng = np.random.default_rng(seed)
    errors = []
    for _ in range(num_draws):
        fitted = fit(synthetic(design, form, truth, noise, rng, outliers), form, starts=_near(truth), **options)
        errors.append(_value(quantity, fitted.params) - _value(quantity, truth))
    return float(np.sqrt(np.mean(np.square(errors))))


def prediction_coverage(
    design: Observations,
    form: Form,
    truth: Mapping[str, float],
    new: Mapping[str, np.ndarray],
    *,
    noise: float,
    level: float = 0.90,
    num_draws: int = 150,
    num_bootstrap: int = 400,
    seed: int = 0,
    **options: Any,
) -> float:
    """How often prediction intervals hold the losses of new runs, ``new`` being their columns."""
    rng = np.random.default_rng(seed)
    exact = form.predict(truth, **new)
    tails = [0.5 * (1 - level), 0.5 * (1 + level)]
    held = []
    for draw in range(num_draws):
        fitted = fit(synthetic(design, form, truth, noise, rng), form, starts=_near(truth), **options)
        actual = exact * np.exp(noise * rng.normal(size=len(exact)))
        draws = resampling.bootstrap(fitted, num_bootstrap, seed=seed + draw)
        predicted = resampling.prediction_draws(fitted, draws, seed=seed + draw, **new)
        lo, hi = np.quantile(predicted, tails, axis=0)
        held.append((lo <= actual) & (actual <= hi))
    return float(np.mean(held))


def multiplier_coverage(
    design: Observations,
    form: Form,
    truths: Mapping[str, Mapping[str, float]],
    *,
    multiplier: float,
    noise: float,
    shared: float = 0.0,
    num_draws: int = 1000,
    num_bootstrap: int = 400,
    seed: int = 0,
) -> dict[str, float]:
    """How often the interval of a multiplier holds what was planted, and the test of shared exponents rejects.

    Args:
      design: whose columns say where the runs of each group are.
      truths: parameters of ``form`` of two groups, the one that others are held against first.
      multiplier: of the second over the first, at every compute.
      noise: standard deviation of log loss, of whose square the part ``shared`` is that of both runs of a cell.
      num_bootstrap: 0 asks the test alone.

    Returns:
      {"coverage", "lower", "upper": the ends' means, "rejected"}, at the most compute within the fitted rows.
    """
    import pandas as pd

    found, rejected = [], []
    for draw in range(num_draws):
        rng = np.random.default_rng([seed, draw])
        common = np.sqrt(shared) * rng.normal(size=len(design))
        parts = []
        for name, truth in truths.items():
            exact = form.predict(truth, **{c: design.columns[c] for c in form.columns})
            error = common + np.sqrt(1.0 - shared) * rng.normal(size=len(design))
            parts.append(pd.DataFrame({**design.columns, "loss": exact * np.exp(noise * error), "truth": name}))
        told = compare(pd.concat(parts), "truth", law=form, bootstrap=num_bootstrap, seed=draw)
        rejected.append(told.sharing is not None and told.sharing.rejected)
        if num_bootstrap:
            found.append(told.pairs[0].shared.interval[~told.pairs[0].extrapolated][-1])
    out = {"rejected": float(np.mean(rejected))}
    if found:
        lower, upper = np.array(found).T
        inside = (lower <= multiplier) & (multiplier <= upper)
        out |= {"coverage": float(inside.mean()), "lower": float(lower.mean()), "upper": float(upper.mean())}
    return out
