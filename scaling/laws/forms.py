"""Laws: each one function of data columns and parameters, with names, domains, units and source.

A form is written once, as the equation reads, and is a plain NumPy function that broadcasts. Its positional arguments
are data columns, its keyword-only arguments parameters:

    @law("My law, someone 2025.", E=offset(), A=amplitude("alpha", "num_params"), alpha=exponent())
    def mine(num_params, *, E, A, alpha):
        return E + A * num_params**-alpha

Fitting happens in coordinates where amplitudes are taken at the data's centre (``Coordinates``), which turns a Hessian
with condition number 1e11 into one with 1e2. Derivatives are exact: analytic for sums of powers (``PowerSum``),
complex-step for every other form.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

COMPLEX_STEP = 1e-30


@dataclass(frozen=True)
class Parameter:
    """A parameter's domain, and how it is represented while fitting.

    ``kind`` says what is fitted in its place (s is the median loss, x0 the geometric mean of a column):

    - ``plain``      the value itself, within [lower, upper]
    - ``log``        its logarithm
    - ``amplitude``  A of A x^-α: log(A x0^-α / s), the term at the data's centre; ``of`` lists (exponent, column)
    - ``critical``   x_c of (x_c/x)^α: α log(x_c/x0) - log s; ``of`` is ((exponent, column),)

    ``starts`` are values that a multi-start grid tries (natural units; ignored for linear parameters).
    ``linear``: the loss is linear in it when the others are held, so its start comes from linear least squares.
    """

    kind: str = "plain"
    lower: float = -np.inf
    upper: float = np.inf
    unit: str = ""
    starts: tuple[float, ...] = ()
    of: tuple[tuple[str | float, str], ...] = ()
    linear: bool = False


def offset(unit: str = "nats/token") -> Parameter:
    """E: the loss that neither size nor data removes; zero or more."""
    return Parameter(lower=0.0, unit=unit, linear=True)


def amplitude(*of: str, unit: str = "nats/token") -> Parameter:
    """A of A x^-α y^-β: ``amplitude("alpha", "x", "beta", "y")``; positive."""
    return Parameter("amplitude", lower=0.0, unit=unit, of=tuple(zip(of[::2], of[1::2])), linear=True)


def critical(exponent_name: str, column: str, unit: str) -> Parameter:
    """x_c of (x_c/x)^α; positive."""
    return Parameter("critical", lower=0.0, unit=unit, of=((exponent_name, column),))


def exponent(*starts: float, lower: float = 0.01, upper: float = 3.0) -> Parameter:
    """A power's exponent. The bounds are far outside anything published: a fit that touches one says so."""
    return Parameter(lower=lower, upper=upper, starts=starts or (0.05, 0.15, 0.3, 0.5, 0.8, 1.2))


@dataclass(frozen=True)
class PowerSum:
    """L = E + Σ_k A_k Π_j x_j^-α_kj, as data: what makes derivatives of a form analytic.

    ``terms``: (amplitude's name, {column: exponent's name or a fixed number}).
    """

    offset: str | None
    terms: tuple[tuple[str, Mapping[str, str | float]], ...]


@dataclass(frozen=True)
class Form:
    """A law: ``function(*columns, **parameters) -> loss``, and what is needed to fit it."""

    name: str
    function: Callable
    parameters: dict[str, Parameter]
    columns: tuple[str, ...]
    equation: str = ""
    source: str = ""
    target: str = "loss"
    powers: PowerSum | None = None
    extra: dict = field(default_factory=dict)

    def predict(self, params: Mapping[str, float], **columns) -> np.ndarray:
        """The law's value, in float64, broadcast over ``columns`` (and over arrays of parameter values).

        Raises ValueError naming a missing column or parameter.
        """
        for kind, wanted, given in (("column", self.columns, columns), ("parameter", self.parameters, params)):
            missing = [name for name in wanted if name not in given]
            if missing:
                raise ValueError(f"{self.name} needs {kind} {', '.join(missing)}: it has {', '.join(given) or 'none'}")
        x = [_as_float(columns[name]) for name in self.columns]
        return self.function(*x, **{name: np.asarray(params[name], np.float64) for name in self.parameters})

    def __call__(self, params: Mapping[str, float], **columns) -> np.ndarray:
        return self.predict(params, **columns)


def _as_float(column):
    return column if isinstance(column, tuple) else np.asarray(column, dtype=np.float64)


FORMS: dict[str, Form] = {}


def law(source: str = "", *, powers: PowerSum | None = None, target: str = "loss", **parameters: Parameter):
    """Decorator: registers a function as the form of its name. The first line of its docstring is its equation."""

    def wrap(function: Callable) -> Form:
        form = _form(function, parameters, source=source, powers=powers, target=target)
        FORMS[form.name] = form
        return form

    return wrap


def _form(function: Callable, parameters: Mapping[str, Parameter], **options) -> Form:
    signature = inspect.signature(function).parameters.values()
    columns = tuple(p.name for p in signature if p.kind is p.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in signature if p.kind is p.KEYWORD_ONLY]
    if not columns or not names:
        raise ValueError(
            f"law {function.__name__}{inspect.signature(function)}: write data columns as positional arguments and "
            "parameters as keyword-only ones, as in mine(num_params, *, E, A, alpha)"
        )
    unknown = set(parameters) - set(names)
    if unknown:
        raise ValueError(f"law {function.__name__} declares {', '.join(sorted(unknown))}, which it does not take")
    described = {name: parameters.get(name) or Parameter("log", 0.0, starts=(1e-2, 0.3, 1.0, 10.0)) for name in names}
    equation = (inspect.getdoc(function) or "").split("\n")[0]
    return Form(function.__name__, function, described, columns, equation=equation, **options)


def get(name: "str | Form | Callable") -> Form:
    """A form by name, by import path (``package.module:function``), or from a function or Form itself.

    An undecorated function is taken with every parameter positive and fitted in its logarithm.
    Raises ValueError listing the forms there are.
    """
    if isinstance(name, Form):
        return name
    if callable(name):
        return _form(name, {})
    if name in FORMS:
        return FORMS[name]
    if ":" not in name:
        raise ValueError(f"law {name!r} is not known: write one of {', '.join(FORMS)}, or package.module:function")
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"law {name!r} cannot be imported ({e}): write package.module:function") from None
    return found if isinstance(found, Form) else _form(found, {})


class Coordinates:
    """Maps a form's parameters to the unconstrained-scale vector θ that is fitted, and back.

    Args:
      form: the law.
      columns: the data, to take centres from.
      loss: the observed losses, to take their scale from.
    """

    # Amplitudes between s·e^-16 (nothing) and s·e^8 at the data's centre.
    AMPLITUDE_BOUNDS = (-16.0, 8.0)

    def __init__(self, form: Form, columns: Mapping[str, np.ndarray], loss: np.ndarray):
        self.form = form
        self.names = tuple(form.parameters)
        self.index = {name: j for j, name in enumerate(self.names)}
        self.centre = {c: float(np.mean(np.log(x))) for c, x in columns.items() if not isinstance(x, tuple)}
        self.log_scale = float(np.log(np.median(loss)))
        bounds = [self._bounds(p) for p in form.parameters.values()]
        self.lower, self.upper = (np.array(b, dtype=np.float64) for b in zip(*bounds))

    def _bounds(self, p: Parameter) -> tuple[float, float]:
        if p.kind in ("amplitude", "critical"):
            return self.AMPLITUDE_BOUNDS
        if p.kind == "log":
            return (np.log(p.lower) if p.lower > 0 else -60.0), (np.log(p.upper) if np.isfinite(p.upper) else 60.0)
        return p.lower, p.upper

    def _shift(self, p: Parameter, exponents: Callable) -> np.ndarray:
        return self.log_scale + sum(exponents(e) * self.centre[c] for e, c in p.of)

    def decode(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """θ (…, P), real or complex, to natural parameters, each (…)."""

        def value(name_or_number):
            return theta[..., self.index[name_or_number]] if isinstance(name_or_number, str) else name_or_number

        out = {}
        for j, (name, p) in enumerate(self.form.parameters.items()):
            t = theta[..., j]
            if p.kind == "amplitude":
                t = np.exp(t + self._shift(p, value))
            elif p.kind == "critical":
                (e, c), *_ = p.of
                t = np.exp((t + self.log_scale) / value(e) + self.centre[c])
            elif p.kind == "log":
                t = np.exp(t)
            out[name] = t
        return out

    def encode(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Natural parameters to θ; the inverse of ``decode``, clipped to the bounds."""
        values = [np.asarray(params[name], dtype=np.float64) for name in self.names]
        theta = np.stack(np.broadcast_arrays(*values), axis=-1).astype(np.float64)

        def value(name_or_number):
            return values[self.index[name_or_number]] if isinstance(name_or_number, str) else name_or_number

        with np.errstate(divide="ignore"):
            for j, p in enumerate(self.form.parameters.values()):
                if p.kind == "amplitude":
                    theta[..., j] = np.log(values[j]) - self._shift(p, value)
                elif p.kind == "critical":
                    (e, c), *_ = p.of
                    theta[..., j] = value(e) * (np.log(values[j]) - self.centre[c]) - self.log_scale
                elif p.kind == "log":
                    theta[..., j] = np.log(values[j])
        return np.clip(theta, self.lower, self.upper)


class Model:
    """A form on given data, with derivatives in θ: what the solver sees.

    Args:
      coordinates: of the form on these data.
      columns: data, each (n,).
      log: whether the value is the logarithm of the loss.
    """

    def __init__(self, coordinates: Coordinates, columns: Mapping[str, np.ndarray], log: bool = True):
        self.coordinates, self.log = coordinates, log
        self.form = coordinates.form
        self.columns = [columns[c] for c in self.form.columns]
        if self.form.powers is not None:
            z = {c: np.log(columns[c]) - coordinates.centre[c] for c in self.form.columns}
            self.terms = [self._term(name, exponents, z) for name, exponents in self.form.powers.terms]

    def _term(self, name: str, exponents: Mapping[str, str | float], z: Mapping[str, np.ndarray]):
        """(parameter indices (q,), their derivatives of the term's log (q, n), the constant part (n,))."""
        derivatives = {self.coordinates.index[name]: np.ones(len(next(iter(z.values()))))}
        constant = np.full(len(next(iter(z.values()))), self.coordinates.log_scale)
        for column, e in exponents.items():
            if isinstance(e, str):
                j = self.coordinates.index[e]
                derivatives[j] = derivatives.get(j, 0.0) - z[column]
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

    def derivatives(self, theta: np.ndarray):
        """Value (B, n), Jacobian (B, P, n), and a function for second derivatives.

        That function takes c, v (B, n) and returns Σ_i c_i J_i J_iᵀ + v_i ∇²f_i, (B, P, P).
        """
        return self._power_derivatives(theta) if self.form.powers is not None else self._step_derivatives(theta)

    def _power_derivatives(self, theta):
        (B, P), n = theta.shape, len(self.columns[0])
        jacobian = np.zeros((B, P, n))
        level = np.zeros((B, n))
        if self.form.powers.offset is not None:
            j = self.coordinates.index[self.form.powers.offset]
            level += theta[:, j, None]
            jacobian[:, j] = 1.0
        values = []
        for indices, design, constant, _ in self.terms:
            with np.errstate(over="ignore"):
                term = np.exp(theta[:, indices] @ design + constant)
            level += term
            values.append(term)
            for j, row in zip(indices, design):
                jacobian[:, j] += term * row
        if self.log:
            with np.errstate(all="ignore"):
                inverse = 1.0 / level
                jacobian *= inverse[:, None, :]
                value = np.log(level)
        else:
            inverse, value = 1.0, level

        def second(c, v):
            u = v * inverse
            if self.log:
                c = c - v  # ∇² log L = ∇²L / L - J Jᵀ
            hessian = (jacobian * c[:, None, :]) @ jacobian.swapaxes(1, 2)
            for (indices, design, _, outer), term in zip(self.terms, values):
                q = len(design)
                hessian[:, indices[:, None], indices] += ((u * term) @ outer).reshape(B, q, q)
            return hessian

        return value, jacobian, second

    def _step_derivatives(self, theta):
        value = self.value(theta)
        jacobian = self._jacobian(theta)

        def second(c, v):
            hessian = (jacobian * c[:, None, :]) @ jacobian.swapaxes(1, 2)
            # Central differences of the exact gradient: the step balances truncation against rounding.
            step = 1e-5
            for j in range(theta.shape[1]):
                shift = np.zeros(theta.shape[1])
                shift[j] = step
                difference = self._jacobian(theta + shift) - self._jacobian(theta - shift)
                hessian[:, :, j] += (difference @ v[:, :, None])[:, :, 0] / (2 * step)
            return 0.5 * (hessian + hessian.swapaxes(1, 2))

        return value, jacobian, second

    def _jacobian(self, theta):
        B, P = theta.shape
        stepped = (theta[:, None, :] + 1j * COMPLEX_STEP * np.eye(P)).reshape(B * P, P)
        value = self.value(stepped)
        return (value.imag / COMPLEX_STEP).reshape(B, P, -1)


# The catalogue.


@law(
    "Kaplan et al. 2020, eq. 1.1",
    powers=PowerSum(None, (("N_c", {"num_params": "alpha"}),)),
    N_c=critical("alpha", "num_params", "parameters"),
    alpha=exponent(),
)
def kaplan_n(num_params, *, N_c, alpha):
    """L(N) = (N_c / N)^α"""
    return (N_c / num_params) ** alpha


@law(
    "Kaplan et al. 2020, eq. 1.2",
    powers=PowerSum(None, (("D_c", {"num_tokens": "alpha"}),)),
    D_c=critical("alpha", "num_tokens", "tokens"),
    alpha=exponent(),
)
def kaplan_d(num_tokens, *, D_c, alpha):
    """L(D) = (D_c / D)^α"""
    return (D_c / num_tokens) ** alpha


@law(
    "Kaplan et al. 2020, eq. 1.3",
    powers=PowerSum(None, (("C_c", {"flops": "alpha"}),)),
    C_c=critical("alpha", "flops", "FLOPs"),
    alpha=exponent(),
)
def kaplan_c(flops, *, C_c, alpha):
    """L(C) = (C_c / C)^α"""
    return (C_c / flops) ** alpha


@law(
    "Henighan et al. 2020, eq. 1.1",
    powers=PowerSum("E", (("N_c", {"num_params": "alpha"}),)),
    E=offset(),
    N_c=critical("alpha", "num_params", "parameters"),
    alpha=exponent(),
)
def kaplan_n_offset(num_params, *, E, N_c, alpha):
    """L(N) = E + (N_c / N)^α"""
    return E + (N_c / num_params) ** alpha


@law(
    "Henighan et al. 2020, eq. 1.1",
    powers=PowerSum("E", (("D_c", {"num_tokens": "alpha"}),)),
    E=offset(),
    D_c=critical("alpha", "num_tokens", "tokens"),
    alpha=exponent(),
)
def kaplan_d_offset(num_tokens, *, E, D_c, alpha):
    """L(D) = E + (D_c / D)^α"""
    return E + (D_c / num_tokens) ** alpha


@law(
    "Henighan et al. 2020, eq. 1.1",
    powers=PowerSum("E", (("C_c", {"flops": "alpha"}),)),
    E=offset(),
    C_c=critical("alpha", "flops", "FLOPs"),
    alpha=exponent(),
)
def kaplan_c_offset(flops, *, E, C_c, alpha):
    """L(C) = E + (C_c / C)^α"""
    return E + (C_c / flops) ** alpha


@law(
    "Hoffmann et al. 2022, eq. 2 (approach 3)",
    powers=PowerSum("E", (("A", {"num_params": "alpha"}), ("B", {"num_tokens": "beta"}))),
    E=offset(),
    A=amplitude("alpha", "num_params"),
    alpha=exponent(),
    B=amplitude("beta", "num_tokens"),
    beta=exponent(),
)
def chinchilla(num_params, num_tokens, *, E, A, alpha, B, beta):
    """L(N, D) = E + A N^-α + B D^-β"""
    return E + A * num_params**-alpha + B * num_tokens**-beta


@law(
    "Hoffmann et al. 2022 with one exponent, as Muennighoff et al. 2023 fit it",
    powers=PowerSum("E", (("A", {"num_params": "alpha"}), ("B", {"num_tokens": "alpha"}))),
    E=offset(),
    A=amplitude("alpha", "num_params"),
    B=amplitude("alpha", "num_tokens"),
    alpha=exponent(),
)
def chinchilla_tied(num_params, num_tokens, *, E, A, B, alpha):
    """L(N, D) = E + A N^-α + B D^-α"""
    return E + A * num_params**-alpha + B * num_tokens**-alpha


@functools.cache
def names() -> tuple[str, ...]:
    """Names of the registered forms."""
    return tuple(FORMS)
