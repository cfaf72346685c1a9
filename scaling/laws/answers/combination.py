"""Forecasts from several forms at once, each weighted by how far it can be trusted at the distance that is asked.

A law fits its own range well and is still not the truth beyond it: forms with an offset level off too early, forms
without one never do. Their errors far out have opposite signs, so a weighted mean forecasts better than the form that
fits best (Bates and Granger 1969 on combining forecasts), and the spread between forms is the part of the uncertainty
that no bootstrap of a single law can see.

At h = log C / C_max the weight of a form is the inverse of its mean squared error there,

    v(h) + δ² + c² h^2q,

v the variance that the data leave it, δ² what it misses of the rows beyond their noise, and c h^q what it misses the
more, the farther: by its own rolling forecasts, and by what is known of its kind where these say little (``Misfit``). A
form without a floor may forecast the next factor of three well and is wrong by a third at 10⁴.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy import stats

from scaling.laws.fitting.estimate import Draws, Fit, fit
from scaling.laws.forms import catalogue
from scaling.laws.forms.law import Form, Params
from scaling.laws.intervals import diagnosis, resampling
from scaling.laws.intervals.diagnosis import Noise
from scaling.laws.tables.observations import Observations

# Two with an offset, one without, and one that bends, where there are rows enough for its nine parameters. Kaplan's
# joint law was tried too: a weight of .01 to .1, no gain.
MEMBERS = ("chinchilla", "chinchilla_tied", "product", "farseer")
ROWS_PER_PARAMETER = 5  # of a form with more than ``FEW_PARAMETERS``
FEW_PARAMETERS = 5


@dataclass(frozen=True)
class Misfit:
    """What a form misses at h = log C / C_max: ``coefficient`` h^``power``, relative, as root mean square."""

    coefficient: float
    power: float


# Of forms that were not yet seen to forecast. Measured between the forms themselves, of runs that one of them made and
# another was fitted to (results/README.md, forecasts): with a floor for a law without one and the reverse. What a form
# without a floor misses bends upwards: 2, 5, 12, 21, 32 % at 3, 10, 100, 10³, 10⁴ times the compute.
WITH_FLOOR, WITHOUT_FLOOR, FARSEER = Misfit(0.015, 1.0), Misfit(0.0215, 1.4), Misfit(0.008, 1.0)
# Along N or D alone a factor is twice as far as along C.
MISFIT_OF_ONE_COLUMN = 2.0
# A run nearer than this is forecast as one at this distance: within the rows a form's misfit is not zero.
NEAREST = 2.0
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

    ``error`` is log actual - log predicted, ``sd`` the standard error that the delta method gives to log predicted, and
    ``factor`` C / cut, one array a cut.
    """

    law: str
    cuts: tuple[float, ...]
    num_fitted: tuple[int, ...]
    error: tuple[np.ndarray, ...] = field(repr=False)
    factor: tuple[np.ndarray, ...] = field(repr=False)
    sd: tuple[np.ndarray, ...] = field(repr=False)

    @property
    def mean_error(self) -> float:
        """Mean |relative error|, every cut counting alike."""
        return float(np.mean([np.abs(np.expm1(e)).mean() for e in self.error]))

    def to_json(self) -> dict[str, Any]:
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


def axis_of(form: Form) -> str:
    """The column along which a form forecasts: compute, or the only one that it has."""
    return form.columns[0] if len(form.columns) == 1 else "flops"


def rolling(
    observations: Observations, form: "str | Form", whole: Fit | None = None, **options: Any
) -> Forecasts | None:
    """Fits a form to the smaller runs and asks it for the larger ones, with the fitted range growing along ``axis_of``.

    Args:
      whole: the fit to every row, where there is one: the parts' searches begin near it.
      options: of ``fit``.

    None where no cut leaves rows enough on both sides.
    """
    form = catalogue.get(form)
    if axis_of(form) not in observations.columns:
        return None
    size = observations.columns[axis_of(form)]
    starts = None
    if whole is not None:
        starts = _around(whole)
        # One objective throughout: a δ of each part's own would compare forms under different ones.
        options = options | ({"delta": whole.loss.delta} if whole.loss.name in ("huber", "asymmetric", "tukey") else {})
    found = []
    for cut in np.unique([size[size <= c * BEYOND].max() for c in np.quantile(size, SHARES, method="lower")]):
        below, above = size <= cut * (1 + 1e-9), size > cut * BEYOND
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
            sd = standard_error(fitted, **{c: rows.columns[c] for c in form.columns})
            found.append((float(cut), int(below.sum()), error, size[above] / cut, sd))
    return Forecasts(form.name, *map(tuple, zip(*found))) if found else None


def _around(whole: Fit) -> list[dict[str, float]]:
    """Three starts: the optimum of part of the rows is near that of all of them, or in the next valley."""
    return [{k: v * f for k, v in whole.params.items()} for f in (1.0, 0.8, 1.25)]


def standard_error(fitted: Fit, **columns: Any) -> np.ndarray:
    """Standard error (m,) of log predicted loss by the delta method, of the law alone. ``columns`` may be more than the
    law's own."""
    own = _own(fitted.form, columns)

    def log_loss(p: Params) -> np.ndarray:
        with np.errstate(all="ignore"):
            return np.log(fitted.form.predict({k: v[:, None] for k, v in p.items()}, **own))

    slope = resampling.gradient(fitted, log_loss)
    return np.sqrt(np.maximum(np.einsum("pm,pq,qm->m", slope, resampling.covariance(fitted), slope), 0.0))


def _own(form: Form, columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.atleast_1d(columns[name]) for name in form.columns}


def misfit(rolled: Forecasts, form: Form, noise: float) -> Misfit:
    """What a form misses of new runs, by its rolling forecasts.

    Each cut says c = Σ h^q e / Σ h^2q, with the variance of the rows' noise and of the law fitted below the cut. As
    cuts share their rows, they count as one, of their mean precision; with what is known of the form's kind,
    N(0, c₀²), that gives mean and variance, and here the root of their mean square.
    """
    kind = FARSEER if form.name == "farseer" else WITH_FLOOR if has_floor(form) else WITHOUT_FLOOR
    prior = kind.coefficient**2
    if axis_of(form) != "flops":
        prior *= MISFIT_OF_ONE_COLUMN**2
    found = []
    for error, factor, sd in zip(rolled.error, rolled.factor, rolled.sd):
        g = np.log(factor) ** kind.power
        square = (g**2).sum()
        found.append(((error * g).sum() / square, noise**2 / square + ((sd * g).sum() / square) ** 2))
    c, variance = np.array(found).T
    precision = 1.0 / np.maximum(variance, 1e-300)
    c, variance = np.average(c, weights=precision), 1.0 / precision.mean()
    share = prior / (prior + variance)
    return replace(kind, coefficient=float(np.sqrt((share * c) ** 2 + share * variance)))


def has_floor(form: Form) -> bool:
    """Whether the loss of a form has an offset, above which it ends."""
    return any(p.kind == "plain" and p.lower == 0.0 for p in form.parameters.values())


def is_found(fitted: Fit) -> bool:
    """Whether a law has converged; one at the end of its domain, as without an offset, E = 0, has too."""
    if not fitted.at_bound:
        return fitted.converged
    return fitted.ends_its_domain and all("at a bound" in reason for reason in fitted.reasons)


@dataclass(frozen=True)
class Combination:
    """Laws of the same columns that forecast together: log loss is the weighted mean of theirs, by distance.

    ``columns`` are what every method wants of new runs, each (m,): those of the laws, and ``axis``, along which the
    rows end at ``reach``. ``beyond_noise`` is δ of each law, ``forecasts`` its rolling forecasts.
    """

    fits: dict[str, Fit]
    forecasts: dict[str, Forecasts]
    misfit: dict[str, Misfit]
    beyond_noise: dict[str, float]
    axis: str
    reach: float

    @property
    def columns(self) -> tuple[str, ...]:
        laws = next(iter(self.fits.values())).form.columns
        return tuple(dict.fromkeys([*laws, self.axis]))

    def _distance(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """h of new runs."""
        return np.log(np.maximum(np.atleast_1d(columns[self.axis]) / self.reach, NEAREST))

    def misses(self, name: str, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """c h^q of a law for new runs."""
        return self.misfit[name].coefficient * self._distance(columns) ** self.misfit[name].power

    def weights(self, **columns: Any) -> dict[str, np.ndarray]:
        """Weight (m,) of each law for new runs."""
        precision = {}
        for name, fitted in self.fits.items():
            own = standard_error(fitted, **columns) ** 2 + self.beyond_noise[name] ** 2
            square = own + self.misses(name, columns) ** 2
            precision[name] = np.where(np.isfinite(square), 1.0 / np.maximum(square, 1e-24), 0.0)
        total = sum(precision.values())
        return {name: p / total for name, p in precision.items()}

    def predict(self, **columns: Any) -> np.ndarray:
        """The combined loss of new runs."""
        each = self.by_law(**columns)
        return np.exp(sum(w * np.log(each[name]) for name, w in self.weights(**columns).items()))

    def by_law(self, **columns: Any) -> dict[str, np.ndarray]:
        size = np.shape(self._distance(columns))
        return {n: np.broadcast_to(f.predict(**_own(f.form, columns)), size) for n, f in self.fits.items()}

    def draws(
        self, num: int, *, seed: int = 0, clusters: np.ndarray | None = None, noise: Noise | None = None,
        known: Mapping[str, Draws] | None = None, **columns: Any,
    ) -> np.ndarray:  # fmt: skip
        """Losses of new runs (num, m), run by run: laws drawn by weight, each resampled, its misfit at that distance,
        and a run's own noise. What one draw says of two runs may come from two laws.

        Args:
          clusters: labels of the rows that are resampled together.
          noise: what the residuals say of the rows' errors, where they are not independent and alike.
          known: draws of a law that need not be made again.
        """
        weights = self.weights(**columns)
        size = len(self._distance(columns))
        share = np.cumsum([np.zeros(size), *weights.values()], axis=0)
        ends = np.round(share * num).astype(int)
        out = np.empty((num, size))
        for i, (name, fitted) in enumerate(self.fits.items()):
            count = ends[i + 1] - ends[i]
            if not count.any():
                continue
            resampled = (known or {}).get(name)
            if resampled is None or len(resampled) < count.max():
                resampled = self._resampled(name, int(count.max()), num, seed + i, clusters, noise)
            resampled = resampled.first(int(count.max()))
            losses = resampling.prediction_draws(fitted, resampled, seed=seed + i, **_own(fitted.form, columns))
            off = np.random.default_rng(seed + i).normal(size=(len(losses), 1)) * self.misses(name, columns)
            losses = losses * np.exp(off)
            for j in np.flatnonzero(count):
                out[ends[i, j] : ends[i + 1, j], j] = losses[: count[j], j]
        return out

    def resamples(
        self, num: int, seed: int, clusters: np.ndarray | None, noise: Noise | None, known: Mapping[str, Draws]
    ) -> dict[str, Draws]:
        """The resamples of laws not ``known`` that ``draws`` makes for any runs, or more of the same."""
        missing = [(i, name) for i, name in enumerate(self.fits) if name not in known]
        return {name: self._resampled(name, num, num, seed + i, clusters, noise) for i, name in missing}

    def _resampled(
        self, name: str, least: int, num: int, seed: int, clusters: np.ndarray | None, noise: Noise | None
    ) -> Draws:
        """Laws as the rows let them move; where a refit is costly by the wild bootstrap, which makes none.

        At least ``least``: the wild bootstrap's depend on how many are made, so of these always ``num``."""
        fitted = self.fits[name]
        if noise is not None and noise.groups is not None:
            return diagnosis.resample(fitted, noise, num, seed)
        if clusters is None and noise is not None:
            clusters = noise.cells
        if fitted.form.powers is not None:
            return resampling.bootstrap(fitted, least, seed=seed, clusters=clusters)
        rows = np.arange(fitted.num_observations) if clusters is None else clusters
        return resampling.wild(fitted, np.unique(rows, return_inverse=True)[1], num, seed=seed)

    def interval(self, level: float, **columns: Any) -> tuple[np.ndarray, np.ndarray]:
        """The same without resampling: the delta method within laws, their misfit, their spread between."""
        each, weights = self.by_law(**columns), self.weights(**columns)
        centre = np.log(self.predict(**columns))
        variance, dof = 0.0, 1
        for name, fitted in self.fits.items():
            value = np.log(each[name])
            noise = fitted.residual_rmse**2 * fitted.num_observations / max(fitted.degrees_of_freedom, 1)
            here = noise * fitted.noise_at(**_own(fitted.form, columns)) ** 2
            own = standard_error(fitted, **columns) ** 2 + here + self.misses(name, columns) ** 2
            variance = variance + weights[name] * (own + (value - centre) ** 2)
            dof = max(dof, fitted.degrees_of_freedom)
        half = stats.t.ppf(0.5 + 0.5 * level, dof) * np.sqrt(variance)
        return np.exp(centre - half), np.exp(centre + half)


def combine(
    observations: Observations,
    members: Sequence[str] = MEMBERS,
    known: Mapping[str, Fit] | None = None,
    **options: Any,
) -> Combination | None:
    """Fits every member that these rows identify, and finds what it misses.

    Args:
      members: forms of the same columns.
      known: fits to these rows that need not be made again.
      options: of ``fit``.

    None where no member has both converged and forecast larger rows from smaller ones.
    """
    fits, forecasts = {}, {}
    for name in members:
        form = known[name].form if name in (known or {}) else catalogue.get(name)  # type: ignore[index]  # known, then
        few = len(form.parameters) <= FEW_PARAMETERS
        if not few and name not in (known or {}) and len(observations) < ROWS_PER_PARAMETER * len(form.parameters):
            continue
        try:
            fitted = (known or {}).get(name) or fit(observations, form, **options)  # a user's own is known by now
        except ValueError:
            continue
        rolled = rolling(observations, fitted.form, fitted, **options) if is_found(fitted) else None
        if rolled is not None:
            fits[name], forecasts[name] = fitted, rolled
    if not fits:
        return None
    noise = {n: f.residual_rmse * math.sqrt(f.num_observations / max(f.degrees_of_freedom, 1)) for n, f in fits.items()}
    least = min(noise.values())
    axis = axis_of(next(iter(fits.values())).form)
    return Combination(
        fits,
        forecasts,
        misfit={name: misfit(forecasts[name], f.form, least) for name, f in fits.items()},
        beyond_noise={name: float(np.sqrt(noise[name] ** 2 - least**2)) for name in fits},
        axis=axis,
        reach=float(observations.columns[axis].max()),
    )
