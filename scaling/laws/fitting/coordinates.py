"""A form on given data: the coordinates it is fitted in, and its derivatives there.

Fitting happens in coordinates where amplitudes are taken at the data's centre, which turns a Hessian with condition
number 1e11 into one with 1e3. Derivatives are exact: analytic for sums of powers and for forms that bring their own,
complex-step for every other form.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scaling.laws.forms.law import Form, Parameter, Params

COMPLEX_STEP = 1e-30
# Value (B, n), Jacobian (B, P, n), and a function for second derivatives: see ``Model.derivatives``.
Derivatives = tuple[np.ndarray, np.ndarray, Callable[[np.ndarray, np.ndarray], np.ndarray]]
# Adds Σ_i u_i ∇² of something, (B, P, P), to its second argument; u (B, n).
Bend = Callable[[np.ndarray, np.ndarray], None]


class Coordinates:
    """Maps a form's parameters to the unconstrained-scale vector θ that is fitted, and back.

    Args:
      form: the law.
      columns: the data, to take centres from.
      loss: the observed losses, to take their scale from.
    """

    # Amplitudes between s·e^-16 (nothing) and s·e^8 at the data's centre.
    AMPLITUDE_BOUNDS = (-16.0, 8.0)
    # An optimum's place, up to a factor e^12 from the centre of what was tried.
    PLACE_BOUNDS = (-12.0, 12.0)

    def __init__(self, form: Form, columns: Mapping[str, np.ndarray], loss: np.ndarray) -> None:
        self.form = form
        self.names = tuple(form.parameters)
        self.index = {name: j for j, name in enumerate(self.names)}
        with np.errstate(divide="ignore"):  # a column that is no power's base may be zero
            log_columns = {c: np.log(columns[c]) for c in form.columns}
        self.centre = {c: float(x.mean()) for c, x in log_columns.items()}
        self.log_scale = float(np.log(np.median(np.abs(loss))))
        bounds = [self._bounds(p, log_columns) for p in form.parameters.values()]
        self.lower, self.upper = (np.array(b, dtype=np.float64) for b in zip(*bounds))
        # What a multi-start tries for each parameter, natural units.
        self.starts = {
            name: tuple(np.exp(np.quantile(log_columns[p.of[0][1]], p.starts))) if p.kind == "location" else p.starts
            for name, p in form.parameters.items()
        }

    def _bounds(self, p: Parameter, log_columns: Mapping[str, np.ndarray]) -> tuple[float, float]:
        if p.kind in ("amplitude", "critical"):
            return self.AMPLITUDE_BOUNDS
        if p.kind == "place":
            return self.PLACE_BOUNDS
        if p.kind == "location":
            x = log_columns[p.of[0][1]]
            return float(x.min()), float(x.max())
        if p.kind == "log":
            return (np.log(p.lower) if p.lower > 0 else -60.0), (np.log(p.upper) if np.isfinite(p.upper) else 60.0)
        return p.lower, p.upper

    def _shift(self, p: Parameter, exponents: Callable[..., Any]) -> np.ndarray:
        return self.log_scale + sum(exponents(e) * self.centre[c] for e, c in p.of)

    def _at_centre(self, p: Parameter, exponents: Callable[..., Any]) -> np.ndarray:
        """What the log of a ``place`` is, beyond the number that is fitted for it."""
        return sum(exponents(e) * self.centre[c] for e, c in p.of)

    def _resolve(self, reference: str | float, at: Callable[..., Any]) -> Any:
        """An exponent's value: a number, ``at(its index)``, or minus that for "-name"."""
        if not isinstance(reference, str):
            return reference
        sign, name = (-1.0, reference[1:]) if reference.startswith("-") else (1.0, reference)
        return sign * at(self.index[name])

    def decode(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """θ (…, P), real or complex, to natural parameters, each (…)."""

        def value(reference: str | float) -> Any:
            return self._resolve(reference, lambda j: theta[..., j])

        out = {}
        for j, (name, p) in enumerate(self.form.parameters.items()):
            t = theta[..., j]
            if p.kind == "amplitude":
                t = np.exp(t + self._shift(p, value))
            elif p.kind == "place":
                t = np.exp(t + self._at_centre(p, value))
            elif p.kind == "slope":
                (e, c), *_ = p.of
                t = t / value(e) * np.exp(-value(e) * self.centre[c])
            elif p.kind == "level":
                (e, slope), *_ = p.of
                t = t - value(slope) / value(e)
            elif p.kind == "critical":
                (e, c), *_ = p.of
                # A tiny exponent puts x_c beyond float64: infinite, as it should read.
                with np.errstate(over="ignore"):
                    t = np.exp((t + self.log_scale) / value(e) + self.centre[c])
            elif p.kind in ("log", "location"):
                t = np.exp(t)
            out[name] = t
        return out

    def encode(self, params: Params) -> np.ndarray:
        """Natural parameters to θ; the inverse of ``decode``, clipped to the bounds."""
        values = [np.asarray(params[name], dtype=np.float64) for name in self.names]
        theta = np.stack(np.broadcast_arrays(*values), axis=-1).astype(np.float64)

        def value(reference: str | float) -> Any:
            return self._resolve(reference, lambda j: values[j])

        with np.errstate(divide="ignore"):
            for j, p in enumerate(self.form.parameters.values()):
                if p.kind == "amplitude":
                    theta[..., j] = np.log(values[j]) - self._shift(p, value)
                elif p.kind == "place":
                    theta[..., j] = np.log(values[j]) - self._at_centre(p, value)
                elif p.kind == "slope":
                    (e, c), *_ = p.of
                    theta[..., j] = values[j] * value(e) * np.exp(value(e) * self.centre[c])
                elif p.kind == "level":
                    (e, slope), *_ = p.of
                    theta[..., j] = values[j] + theta[..., self.index[slope]] / value(e)
                elif p.kind == "critical":
                    (e, c), *_ = p.of
                    theta[..., j] = value(e) * (np.log(values[j]) - self.centre[c]) - self.log_scale
                elif p.kind in ("log", "location"):
                    theta[..., j] = np.log(values[j])
        return np.clip(theta, self.lower, self.upper)

    def natural_starts(self, values: Mapping[str, float]) -> dict[str, float]:
        """Starts of a grid in natural units: those of ``slope``, ``level``, ``place`` are given as what is fitted."""
        out = dict(values)

        def value(reference: str | float) -> Any:  # of a parameter, or of one held at a known value by ``Form.fix``
            return self._resolve(reference, lambda j: values[self.names[j]])

        for name, p in self.form.parameters.items():
            if p.kind == "slope":
                (e, c), *_ = p.of
                out[name] = values[name] / value(e) * math.exp(-value(e) * self.centre[c])
            elif p.kind == "level":
                (e, slope), *_ = p.of
                out[name] = values[name] - value(slope) / value(e)
            elif p.kind == "place":
                out[name] = math.exp(values[name] + self._at_centre(p, value))
        return out


class Model:
    """A form on given data, with derivatives in θ: what the solver sees.

    Args:
      coordinates: of the form on these data.
      columns: data, each (n,).
      log: whether the value is the logarithm of the loss.
      exact: whether second derivatives are complete; otherwise those of a form that is no sum of powers are
        Gauss-Newton's, which cost nothing and are enough to come near an optimum.
    """

    def __init__(
        self, coordinates: Coordinates, columns: Mapping[str, np.ndarray], log: bool = True, exact: bool = True
    ) -> None:
        self.coordinates, self.log, self.exact = coordinates, log, exact
        self.form = coordinates.form
        self.columns = [columns[c] for c in self.form.columns]
        if self.form.powers is not None:
            z = {c: np.log(columns[c]) - coordinates.centre[c] for c in self.form.columns}
            self.terms = [self._term(name, exponents, z) for name, exponents in self.form.powers.terms]

    def take(self, rows: np.ndarray) -> "Model":
        """The same form in the same coordinates on some of the rows."""
        columns = dict(zip(self.form.columns, (x[rows] for x in self.columns)))
        return Model(self.coordinates, columns, self.log, self.exact)

    def _term(
        self, name: str, exponents: Mapping[str, str | float], z: Mapping[str, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(parameter indices (q,), their derivatives of the term's log (q, n), the constant part (n,))."""
        derivatives = {self.coordinates.index[name]: np.ones(len(next(iter(z.values()))))}
        constant = np.full(len(next(iter(z.values()))), self.coordinates.log_scale)
        for column, e in exponents.items():
            if isinstance(e, str):
                sign, e = (-1.0, e[1:]) if e.startswith("-") else (1.0, e)
                j = self.coordinates.index[e]
                derivatives[j] = derivatives.get(j, 0.0) - sign * z[column]
            else:
                constant = constant - e * z[column]
        design = np.stack(list(derivatives.values()))
        outer = (design[:, None, :] * design[None, :, :]).reshape(-1, design.shape[1]).T
        return np.array(list(derivatives)), design, constant, np.ascontiguousarray(outer)

    def value(self, theta: np.ndarray) -> np.ndarray:
        """The (log) loss of each row, (B, n), at θ (B, P)."""
        params = {k: v[:, None] for k, v in self.coordinates.decode(theta).items()}
        with np.errstate(all="ignore"):
            level = self.form.function(*self.columns, **params)
            return np.log(level) if self.log else level

    def derivatives(self, theta: np.ndarray) -> Derivatives:
        """Value (B, n), Jacobian (B, P, n), and a function for second derivatives.

        That function takes c, v (B, n) and returns Σ_i c_i J_i J_iᵀ + v_i ∇²f_i, (B, P, P).
        """
        return self._power_derivatives(theta) if self.form.powers is not None else self._step_derivatives(theta)

    def _power_derivatives(self, theta: np.ndarray) -> Derivatives:
        (B, P), n = theta.shape, len(self.columns[0])
        jacobian = np.zeros((B, P, n))
        level = np.zeros((B, n))
        powers = self.form.powers
        assert powers is not None  # a sum of powers
        if powers.offset is not None and powers.ceiling is None:
            j = self.coordinates.index[powers.offset]
            level += theta[:, j, None]
            jacobian[:, j] = 1.0
        logs = [theta[:, indices] @ design + constant for indices, design, constant, _ in self.terms]
        bend = (self._joined if powers.join else self._summed)(theta, logs, level, jacobian)
        if powers.ceiling is not None:
            level, jacobian, bend = self._below(theta, level, jacobian, bend)
        inverse: np.ndarray | float
        if self.log:
            with np.errstate(all="ignore"):
                inverse = 1.0 / level
                jacobian *= inverse[:, None, :]
                value = np.log(level)
        else:
            inverse, value = 1.0, level

        def second(c: np.ndarray, v: np.ndarray) -> np.ndarray:
            u = v * inverse
            if self.log:
                c = c - v  # ∇² log L = ∇²L / L - J Jᵀ
            hessian = (jacobian * c[:, None, :]) @ jacobian.swapaxes(1, 2)
            bend(u, hessian)
            return hessian

        return value, jacobian, second

    def _summed(self, theta: np.ndarray, logs: list[np.ndarray], level: np.ndarray, jacobian: np.ndarray) -> Bend:
        """Adds Σ T, of terms whose logs are given, to the value and its slopes; returns what adds Σ_i u_i ∇²."""
        B, values = len(theta), []
        for (indices, design, *_), log in zip(self.terms, logs):
            with np.errstate(over="ignore"):
                term = np.exp(log)
            level += term
            values.append(term)
            for j, row in zip(indices, design):
                jacobian[:, j] += term * row

        def bend(u: np.ndarray, hessian: np.ndarray) -> None:
            for (indices, design, _, outer), term in zip(self.terms, values):
                q = len(design)
                hessian[:, indices[:, None], indices] += ((u * term) @ outer).reshape(B, q, q)

        return bend

    def _joined(self, theta: np.ndarray, logs: list[np.ndarray], level: np.ndarray, jacobian: np.ndarray) -> Bend:
        """The same of e^M, M = γ log Σ e^(l/γ) of the terms' logs l, with γ = e^θ.

        With w the softmax of l/γ, V and H the variance of l/γ under w and its entropy: ∂M/∂l = w, ∂M/∂θ = γ H,
        ∂²M/∂l∂l' = (δ w - w w')/γ, ∂²M/∂l∂θ = -w (l/γ - mean), ∂²M/∂θ² = γ (V + H).
        """
        (B, P), n = theta.shape, len(self.columns[0])
        at = self.coordinates.index[self.form.powers.join]  # type: ignore[union-attr, index]  # it joins
        gamma = np.exp(theta[:, at])[:, None]
        with np.errstate(all="ignore"):
            # From the largest term on, so that the entropy of one that is nearly all keeps its digits.
            scaled = np.stack(logs) / gamma
            largest = scaled.argmax(axis=0)[None]
            top = np.take_along_axis(scaled, largest, axis=0)
            others = np.exp(scaled - top)
            np.put_along_axis(others, largest, 0.0, axis=0)
            rest = np.log1p(others.sum(axis=0))
            log_weights = scaled - top - rest
            weights, above = np.exp(log_weights), np.exp(gamma * (top[0] + rest))
            entropy = -(weights * log_weights).sum(axis=0)
            off = log_weights + entropy
            spread = (weights * off**2).sum(axis=0)
        means, cross = np.zeros((B, P, n)), np.zeros((B, P, n))
        for (indices, design, *_), w, away in zip(self.terms, weights, off):
            for j, row in zip(indices, design):
                means[:, j] += w * row
                cross[:, j] -= w * away * row
        slope = means.copy()
        slope[:, at] = gamma * entropy
        level += above
        jacobian += slope * above[:, None, :]

        def bend(u: np.ndarray, hessian: np.ndarray) -> None:
            v = u * above
            hessian += (slope * v[:, None, :]) @ slope.swapaxes(1, 2)
            hessian -= (means * (v / gamma)[:, None, :]) @ means.swapaxes(1, 2)
            for (indices, design, _, outer), w in zip(self.terms, weights):
                q = len(design)
                hessian[:, indices[:, None], indices] += ((v / gamma * w) @ outer).reshape(B, q, q)
            mixed = (cross @ v[:, :, None])[:, :, 0]
            hessian[:, at] += mixed
            hessian[:, :, at] += mixed
            hessian[:, at, at] += (v * gamma * (spread + entropy)).sum(axis=1)

        return bend

    def _below(
        self, theta: np.ndarray, rise: np.ndarray, slope: np.ndarray, bend_rise: Bend
    ) -> tuple[np.ndarray, np.ndarray, Bend]:
        """E + g, g = r S / (r + S), S = L_0 - E, of a rise r whose slopes are given and whose ∇² ``bend_rise`` adds.

        With E = θ_e and L_0 = e^θ_c: ∂g/∂r = (S/(r+S))², ∂g/∂S = (r/(r+S))², and of second order -2 S²/(r+S)³,
        -2 r²/(r+S)³ and, mixed, 2 r S/(r+S)³.
        """
        powers = self.form.powers
        assert powers is not None
        assert powers.ceiling is not None
        at = self.coordinates.index[powers.ceiling]
        top = np.exp(theta[:, at])[:, None]
        floor = 0.0 if powers.offset is None else theta[:, self.coordinates.index[powers.offset], None]
        with np.errstate(all="ignore"):
            span = top - floor
            of_rise, of_span = 1 / (1 + rise / span), 1 / (1 + span / rise)  # S/(r+S), r/(r+S)
        by_rise, by_span = of_rise**2, of_span**2
        spans = np.zeros_like(slope)  # ∂S/∂θ
        spans[:, at] = top
        if powers.offset is not None:
            spans[:, self.coordinates.index[powers.offset]] = -1.0
        jacobian = by_rise[:, None] * slope + by_span[:, None] * spans
        if powers.offset is not None:
            jacobian[:, self.coordinates.index[powers.offset]] += 1.0

        def bend(u: np.ndarray, hessian: np.ndarray) -> None:
            with np.errstate(all="ignore"):
                curve = -2 * u / (rise + span)
            # -2 (of_rise ∂r - of_span ∂S)(…)' / (r + S): the form is homogeneous of the first degree in r and S.
            away = of_rise[:, None] * slope - of_span[:, None] * spans
            hessian += (away * curve[:, None]) @ away.swapaxes(1, 2)
            bend_rise(u * by_rise, hessian)
            hessian[:, at, at] += (u * by_span * top).sum(axis=1)

        return floor + span * of_span, jacobian, bend

    def _step_derivatives(self, theta: np.ndarray) -> Derivatives:
        value = self.value(theta)
        jacobian = self._jacobian(theta)

        def second(c: np.ndarray, v: np.ndarray) -> np.ndarray:
            hessian = (jacobian * c[:, None, :]) @ jacobian.swapaxes(1, 2)
            if not self.exact:
                return hessian
            # Central differences of the exact gradient: the step balances truncation against rounding.
            step = 1e-5
            for j in range(theta.shape[1]):
                shift = np.zeros(theta.shape[1])
                shift[j] = step
                difference = self._jacobian(theta + shift) - self._jacobian(theta - shift)
                hessian[:, :, j] += (difference @ v[:, :, None])[:, :, 0] / (2 * step)
            return 0.5 * (hessian + hessian.swapaxes(1, 2))

        return value, jacobian, second

    def _jacobian(self, theta: np.ndarray) -> np.ndarray:
        B, P = theta.shape
        stepped = (theta[:, None, :] + 1j * COMPLEX_STEP * np.eye(P)).reshape(B * P, P)
        if self.form.gradient is not None:
            return self._chained(theta, stepped)
        value = self.value(stepped)
        return (value.imag / COMPLEX_STEP).reshape(B, P, -1)

    def _chained(self, theta: np.ndarray, stepped: np.ndarray) -> np.ndarray:
        """∂ value / ∂θ from the form's own gradient in natural parameters."""
        params = {k: v[:, None] for k, v in self.coordinates.decode(theta).items()}
        with np.errstate(all="ignore"):
            natural = self.form.gradient(*self.columns, **params)  # type: ignore[misc]  # it has one: see _jacobian
        inner = {k: v.imag.reshape(theta.shape) / COMPLEX_STEP for k, v in self.coordinates.decode(stepped).items()}
        shape = (len(theta), len(self.columns[0]))
        natural = np.stack([np.broadcast_to(natural[k], shape) for k in self.coordinates.names], axis=1)
        with np.errstate(all="ignore"):
            jacobian = np.stack([inner[k] for k in self.coordinates.names], axis=2) @ natural
            return jacobian / self.form.function(*self.columns, **params)[:, None, :] if self.log else jacobian


class Scaled:
    """A model with every row multiplied by a number: residuals in units of their own noise."""

    def __init__(self, model: Model, factor: np.ndarray) -> None:
        self.model, self.factor = model, factor
        self.form, self.coordinates = model.form, model.coordinates

    def take(self, rows: np.ndarray) -> "Scaled":
        """The same on some of the rows."""
        return Scaled(self.model.take(rows), self.factor[rows])

    @property
    def log(self) -> bool:
        return self.model.log

    @property
    def exact(self) -> bool:
        return self.model.exact

    @exact.setter
    def exact(self, value: bool) -> None:
        self.model = copy.copy(self.model)
        self.model.exact = value

    def value(self, theta: np.ndarray) -> np.ndarray:
        return self.model.value(theta) * self.factor

    def derivatives(self, theta: np.ndarray) -> Derivatives:
        value, jacobian, second = self.model.derivatives(theta)
        k = self.factor
        return value * k, jacobian * k, lambda c, v: second(c * k**2, v * k)
