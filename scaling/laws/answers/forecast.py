"""What runs that nobody has trained will score: an interval for the run itself, law and noise."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from scaling.laws.answers.combination import Combination
from scaling.laws.fitting.estimate import Draws, Fit
from scaling.laws.intervals import resampling
from scaling.laws.intervals.diagnosis import Noise
from scaling.laws.tables.observations import Observations


class Fitted(Protocol):
    """What a forecast is made from: of an ``analysis.Analysis``, which forecasts its own held-out runs, these parts."""

    @property
    def observations(self) -> Observations: ...

    @property
    def fits(self) -> dict[str, Fit]: ...

    @property
    def draws(self) -> dict[str, Draws]: ...

    @property
    def noise(self) -> dict[str, Noise]: ...

    @property
    def combination(self) -> Combination | None: ...

    @property
    def resampled(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...

    @property
    def forecaster(self) -> str | None: ...


def forecast(analysis: Fitted, cells: Sequence[Mapping[str, Any]], level: float = 0.90) -> list[dict[str, Any]]:
    """Predicted loss of new runs, with an interval for the run itself.

    From the combination of forms where there is one (``combine``): laws by weight, each law's uncertainty and misfit, a
    run's noise; from one law alone otherwise, of N and D or of one column. ``by_law`` says what each form expects on
    its own.

    Args:
      cells: each with run_id, flops, and the columns of the laws (num_params, num_tokens in the analysis's convention).

    Raises:
      ValueError: no law that could forecast was fitted, a cell lacks a column or has no positive number in it, or level
        is no share.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}: write a share, above 0 and below 1")
    if analysis.forecaster is None:
        why = "; ".join(analysis.warnings) or "none was asked for"
        raise ValueError(f"{analysis.observations.source}: no law to forecast from: {why}")
    if not cells:
        return []
    combined, alone = analysis.combination, analysis.fits[analysis.forecaster]
    wanted = alone.form.columns if combined is None else combined.columns
    for cell in cells:
        if missing := [c for c in wanted if cell.get(c) is None]:
            raise ValueError(f"cell {cell.get('run_id')}: {', '.join(missing)} is missing: the laws are of it")
        if bad := [c for c in wanted if not (math.isfinite(float(cell[c])) and float(cell[c]) > 0)]:
            said = ", ".join(f"{c} is {cell[c]}" for c in bad)
            raise ValueError(f"cell {cell.get('run_id')}: {said}: write a positive number")
    columns = {c: np.array([float(cell[c]) for cell in cells]) for c in wanted}
    if combined is None:
        by_law = {analysis.forecaster: alone.predict(**columns)}
        predicted, (lower, upper) = by_law[analysis.forecaster], _of_one_law(analysis, columns, level)
    else:
        predicted, by_law = combined.predict(**columns), combined.by_law(**columns)
        lower, upper = _of_several(analysis, columns, level)
    predicted = np.broadcast_to(predicted, len(cells))
    return [
        {
            "run_id": cell.get("run_id"),
            "flops": None if cell.get("flops") is None else float(cell["flops"]),
            "predicted": float(predicted[i]),
            "interval": [float(lower[i]), float(upper[i])],
            "level": level,
            "by_law": {name: float(np.broadcast_to(values, len(cells))[i]) for name, values in by_law.items()},
        }
        for i, cell in enumerate(cells)
    ]


def _of_several(analysis: Fitted, columns: Mapping[str, Any], level: float) -> tuple[np.ndarray, np.ndarray]:
    if not analysis.draws:
        return analysis.combination.interval(level, **columns)  # type: ignore[union-attr]  # see forecast
    num = max(map(len, analysis.draws.values()))
    rows = analysis.fits[analysis.forecaster].observations  # type: ignore[index]  # see forecast
    shared: dict[str, Any] = {
        "clusters": rows.run if analysis.resampled == "run" else None,
        "noise": analysis.noise.get(analysis.forecaster),  # type: ignore[arg-type]  # see forecast
        "known": analysis.draws,
    }
    losses = analysis.combination.draws(num, seed=analysis.seed, **shared, **columns)  # type: ignore[union-attr]  # see forecast
    tail = 0.5 * (1.0 - level)
    return tuple(np.quantile(losses, [tail, 1.0 - tail], axis=0))


def _of_one_law(analysis: Fitted, columns: Mapping[str, Any], level: float) -> tuple[np.ndarray, np.ndarray]:
    fitted, draws = analysis.fits[analysis.forecaster], analysis.draws.get(analysis.forecaster)  # type: ignore[index, arg-type]  # see forecast
    if draws is not None:
        tail = 0.5 * (1.0 - level)
        losses = resampling.prediction_draws(fitted, draws, seed=analysis.seed, **columns)
        return tuple(np.quantile(losses, [tail, 1.0 - tail], axis=0))
    _, lower, upper = resampling.delta_interval(
        fitted,
        lambda p: np.log(fitted.form.predict({k: v[:, None] for k, v in p.items()}, **columns)),
        level,
        noise=fitted.noise_at(**columns)
        * fitted.residual_rmse
        * math.sqrt(fitted.num_observations / max(fitted.degrees_of_freedom, 1)),
    )
    return np.exp(lower), np.exp(upper)
