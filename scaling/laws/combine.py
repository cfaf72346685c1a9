"""Forecasts from several forms at once, each weighted by how it forecast the larger of the runs already there.

A law fits its own range well and is still not the truth beyond it: forms with an offset level off too early, forms
without one never do. Their errors far out have opposite signs, so a weighted mean forecasts better than the form that
fits best (Bates and Granger 1969 on combining forecasts), and the spread between forms is the part of the uncertainty
that no bootstrap of a single law can see.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from scaling.laws import forms, uncertainty
from scaling.laws.estimate import Fit, fit
from scaling.laws.form import Form
from scaling.laws.observations import Observations

# Two with an offset and one without. Kaplan's joint law was tried as a fourth: a weight of .01 to .1, no gain.
MEMBERS = ("chinchilla", "chinchilla_tied", "product")
# Shares of the rows, by compute, that a rolling forecast is fitted to; the rest it predicts.
SHARES = (0.4, 0.55, 0.7, 0.85)
# Rows this close in compute belong to one budget: a forecast must leave the budget it was fitted to.
BEYOND = 1.1
MIN_ROWS = 3
# Errors are reported by how far beyond the fitted compute a run lies: factors about 1, 2, 4, 8 …
FACTORS = tuple(2.0 ** (k - 0.5) for k in range(1, 9))


@dataclass(frozen=True)
class Forecasts:
    """What a form fitted to the smaller runs said of the larger ones, cut by cut.

    ``error`` is log actual - log predicted and ``factor`` C / cut, one array a cut.
    """

    law: str
    cuts: tuple[float, ...]
    num_fitted: tuple[int, ...]
    error: tuple[np.ndarray, ...] = field(repr=False)
    factor: tuple[np.ndarray, ...] = field(repr=False)

    @property
    def mean_error(self) -> float:
        """Mean |relative error|, every cut counting alike."""
        return float(np.mean([np.abs(np.expm1(e)).mean() for e in self.error]))

    def to_json(self) -> dict:
        factor = np.concatenate(self.factor)
        error = np.abs(np.expm1(np.concatenate(self.error)))
        bins = [(factor > lo) & (factor <= hi) for lo, hi in zip((1.0, *FACTORS), (*FACTORS, np.inf))]
        return {
            "law": self.law,
            "mean_error": self.mean_error,
            "cuts": [
                {"fitted_up_to": c, "num_fitted": n, "num_predicted": len(e), "mean_error": np.abs(np.expm1(e)).mean()}
                for c, n, e in zip(self.cuts, self.num_fitted, self.error)
            ],
            "by_factor": [
                {"factor": np.exp(np.log(factor[b]).mean()), "mean_error": error[b].mean(), "num": int(b.sum())}
                for b in bins
                if b.any()
            ],
        }


def rolling(observations: Observations, form: "str | Form", whole: Fit | None = None, **options) -> Forecasts | None:
    """Fits a form to the smaller runs and asks it for the larger ones, with the fitted range growing.

    Args:
      whole: the fit to every row, where there is one: the parts' searches begin near it.
      options: of ``fit``.

    None where no cut leaves rows enough on both sides.
    """
    form = forms.get(form)
    if "flops" not in observations.columns:
        return None
    flops = observations.columns["flops"]
    starts = None
    if whole is not None:
        starts = _around(whole)
        # One objective throughout: a δ of each part's own would compare forms under different ones.
        options = options | ({"delta": whole.loss.delta} if whole.loss.name in ("huber", "asymmetric", "tukey") else {})
    found = []
    for cut in np.unique([flops[flops <= c * BEYOND].max() for c in np.quantile(flops, SHARES, method="lower")]):
        below, above = flops <= cut * (1 + 1e-9), flops > cut * BEYOND
        if below.sum() < len(form.parameters) + MIN_ROWS or above.sum() < MIN_ROWS:
            continue
        try:
            fitted = fit(observations.take(below), form, starts=starts, **options)
        except ValueError:
            continue
        rows = observations.take(above)
        with np.errstate(all="ignore"):
            predicted = fitted.predict(**{c: rows.columns[c] for c in form.columns})
            error = np.log(rows.loss) - np.log(predicted)
        if np.isfinite(error).all():
            found.append((float(cut), int(below.sum()), error, rows.columns["flops"] / cut))
    return Forecasts(form.name, *map(tuple, zip(*found))) if found else None


def _around(whole: Fit) -> list[dict[str, float]]:
    """Three starts: the optimum of part of the rows is near that of all of them, or in the next valley."""
    return [{k: v * f for k, v in whole.params.items()} for f in (1.0, 0.8, 1.25)]


@dataclass(frozen=True)
class Combination:
    """Laws of N and D and the weight of each in a forecast: log loss is the weighted mean of theirs.

    ``weights`` ∝ 1 / (mean error of the law's rolling forecasts)²; ``forecasts`` are those.
    """

    fits: dict[str, Fit]
    weights: dict[str, float]
    forecasts: dict[str, Forecasts]

    def predict(self, **columns) -> np.ndarray:
        """The combined loss of new runs."""
        logs = [w * np.log(self.fits[name].predict(**columns)) for name, w in self.weights.items()]
        return np.exp(sum(logs))

    def by_law(self, **columns) -> dict[str, np.ndarray]:
        return {name: np.broadcast_to(f.predict(**columns), np.shape(columns["num_params"]))
                for name, f in self.fits.items()}  # fmt: skip

    def draws(self, num: int, *, seed: int = 0, clusters: np.ndarray | None = None, **columns) -> np.ndarray:
        """Losses of new runs (num, m): laws drawn by weight, each resampled, and a run's own noise."""
        share = np.array(list(self.weights.values()))
        counts = np.diff(np.round(np.concatenate([[0.0], np.cumsum(share)]) * num)).astype(int)
        parts = []
        for i, (fitted, count) in enumerate(zip(self.fits.values(), counts)):
            if count:
                resampled = uncertainty.bootstrap(fitted, int(count), seed=seed + i, clusters=clusters)
                parts.append(uncertainty.prediction_draws(fitted, resampled, seed=seed + i, **columns))
        return np.concatenate(parts)

    def interval(self, level: float, **columns) -> tuple[np.ndarray, np.ndarray]:
        """The same without resampling: the delta method within laws, their spread between."""
        centre = np.log(self.predict(**columns))
        variance, dof = 0.0, 1
        for name, fitted in self.fits.items():
            value, lo, hi = uncertainty.delta_interval(
                fitted,
                lambda p, form=fitted.form: np.log(form.predict({k: v[:, None] for k, v in p.items()}, **columns)),
                0.6827,
                noise=fitted.residual_rmse * np.sqrt(fitted.num_observations / max(fitted.degrees_of_freedom, 1)),
            )
            variance = variance + self.weights[name] * (((hi - lo) / 2) ** 2 + (value - centre) ** 2)
            dof = max(dof, fitted.degrees_of_freedom)
        half = stats.t.ppf(0.5 + 0.5 * level, dof) * np.sqrt(variance)
        return np.exp(centre - half), np.exp(centre + half)


def combine(
    observations: Observations,
    members: Sequence[str] = MEMBERS,
    known: Mapping[str, Fit] | None = None,
    **options,
) -> Combination | None:
    """Fits every member that these rows identify and weighs it by its rolling forecasts.

    Args:
      known: fits to these rows that need not be made again.
      options: of ``fit``.

    None where fewer than two members can be fitted and rolled.
    """
    fits, forecasts = {}, {}
    for name in members:
        try:
            fitted = (known or {}).get(name) or fit(observations, name, **options)
        except ValueError:
            continue
        rolled = rolling(observations, fitted.form, fitted, **options)
        if rolled is not None:
            fits[name], forecasts[name] = fitted, rolled
    if len(fits) < 2:
        return None
    # Only cuts that every member was asked at compare like with like.
    precision = {name: 1.0 / max(f.mean_error, 1e-12) ** 2 for name, f in _common(forecasts).items()}
    total = sum(precision.values())
    return Combination(fits, {name: p / total for name, p in precision.items()}, forecasts)


def _common(forecasts: Mapping[str, Forecasts]) -> dict[str, Forecasts]:
    shared = set.intersection(*(set(f.cuts) for f in forecasts.values()))
    if not shared:
        return dict(forecasts)
    out = {}
    for name, f in forecasts.items():
        keep = [i for i, c in enumerate(f.cuts) if c in shared]
        parts = (tuple(getattr(f, k)[i] for i in keep) for k in ("cuts", "num_fitted", "error", "factor"))
        out[name] = Forecasts(f.law, *parts)
    return out
