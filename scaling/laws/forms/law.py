"""What a law is: one function of data columns and parameters, with names, domains, units and source.

A form is written once, as the equation reads, and is a plain NumPy function that broadcasts. Its positional arguments
are data columns, its keyword-only arguments parameters:

    @law("My law, someone 2025.", E=offset(), A=amplitude("alpha", "num_params"), alpha=exponent())
    def mine(num_params, *, E, A, alpha):
        return E + A * num_params**-alpha

The catalogue is in ``catalogue``.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# Values by a parameter's name: numbers, or arrays of them where a law is taken at many points at once.
Params = Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """A parameter's domain, and how it is represented while fitting.

    ``kind`` says what is fitted in its place (s is the median loss, x0 the geometric mean of a column):

    - ``plain``      the value itself, within [lower, upper]
    - ``log``        its logarithm
    - ``amplitude``  A of A x^-α: log(A x0^-α / s), the term at the data's centre; ``of`` lists (exponent, column), an
      exponent being a parameter's name, "-name" for its negative, or a number
    - ``slope``      a of a x^γ + b: its slope in log x at the centre, a γ x0^γ; ``of`` is ((γ, column),)
    - ``level``      b of a x^γ + b: its value at the centre, a x0^γ + b; ``of`` is ((γ, a's name),)
    - ``location``   a place on a column's axis: its logarithm, within the data's range; starts are quantiles
    - ``critical``   x_c of (x_c/x)^α: α log(x_c/x0) - log s; ``of`` is ((exponent, column),)
    - ``place``      c of an optimum z = c x^-α: log(c x0^-α / z0), the optimum at the data's centre over that of z;
      ``of`` is ((1, z), (exponent, column), …)

    ``starts`` are values that a multi-start grid tries: of the parameter itself, or, for ``slope``, ``level`` and
    ``place``, of the number that is fitted in its place. Linear parameters need none.
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


def amplitude(*of: str | float, unit: str = "nats/token") -> Parameter:
    """A of A x^-α y^-β: ``amplitude("alpha", "x", "beta", "y")``; positive."""
    return Parameter("amplitude", lower=0.0, unit=unit, of=tuple(zip(of[::2], of[1::2])), linear=True)  # type: ignore[arg-type]  # exponent, column


def critical(exponent_name: str, column: str, unit: str) -> Parameter:
    """x_c of (x_c/x)^α; positive."""
    return Parameter("critical", lower=0.0, unit=unit, of=((exponent_name, column),))


def positive(*starts: float, unit: str = "", lower: float = 0.0, upper: float = np.inf) -> Parameter:
    """A positive parameter, fitted in its logarithm."""
    return Parameter("log", lower=lower, upper=upper, unit=unit, starts=starts or (0.1, 1.0, 10.0))


def real(*starts: float, unit: str = "", lower: float = -np.inf, upper: float = np.inf) -> Parameter:
    """A parameter of either sign, fitted as it is."""
    return Parameter(lower=lower, upper=upper, unit=unit, starts=starts or (-1.0, 0.0, 1.0))


def exponent(*starts: float, lower: float = 0.01, upper: float = 3.0) -> Parameter:
    """A power's exponent. The bounds are far outside anything published: a fit that touches one says so."""
    return Parameter(lower=lower, upper=upper, starts=starts or (0.06, 0.2, 0.4, 0.7, 1.1))


@dataclass(frozen=True)
class PowerSum:
    """L = E + Σ_k A_k Π_j x_j^-α_kj, as data: what makes derivatives of a form analytic.

    ``terms``: (amplitude's name, {column: α's name, "-name" for its negative, or a fixed number}). With ``join``, the
    name of a γ that is fitted in its logarithm, L = E + (Σ_k T_k^(1/γ))^γ of the terms T_k: each alone is the loss
    over E where the others vanish, and γ says how sharply one takes over from another. With ``ceiling``, the name of a
    loss L_0 that is fitted in its logarithm, L = E + r / (1 + r / (L_0 - E)) of that rise r over E: never above L_0.
    """

    offset: str | None
    terms: tuple[tuple[str, Mapping[str, str | float]], ...]
    join: str | None = None
    ceiling: str | None = None


@dataclass(frozen=True)
class Form:
    """A law: ``function(*columns, **parameters) -> target``, and what is needed to fit it.

    ``target`` names the column it predicts (``loss`` unless it is a law of something else). ``gradient``, where given,
    takes what ``function`` takes and returns {parameter: ∂ value / ∂ parameter}; without it derivatives come from
    complex steps through ``function``. ``indicators`` are those of its columns that say which group a row is of, no
    axes that runs must spread along (``joint``). ``signed``: the target may be zero or negative, so that residuals are
    of levels and never of logs.
    """

    name: str
    function: Callable[..., Any]
    parameters: dict[str, Parameter]
    columns: tuple[str, ...]
    equation: str = ""
    source: str = ""
    target: str = "loss"
    powers: PowerSum | None = None
    gradient: Callable[..., Any] | None = None
    indicators: tuple[str, ...] = ()
    signed: bool = False

    def predict(self, params: Params, **columns: Any) -> np.ndarray:
        """The law's value, in float64, broadcast over ``columns`` (and over arrays of parameter values).

        Raises ValueError naming a missing column or parameter.
        """
        for kind, wanted, given in (("column", self.columns, columns), ("parameter", self.parameters, params)):
            missing = [name for name in wanted if name not in given]
            if missing:
                raise ValueError(f"{self.name} needs {kind} {', '.join(missing)}: it has {', '.join(given) or 'none'}")
        x = [np.asarray(columns[name], dtype=np.float64) for name in self.columns]
        return self.function(*x, **{name: np.asarray(params[name], np.float64) for name in self.parameters})

    def fix(self, **values: float) -> "Form":
        """The same law with some parameters held at known values.

        Raises ValueError on a name the law does not have.
        """
        unknown = set(values) - set(self.parameters)
        if unknown:
            raise ValueError(f"{self.name} has no {', '.join(sorted(unknown))}: it has {', '.join(self.parameters)}")
        known = {name: float(v) for name, v in values.items()}

        def resolved(p: Parameter) -> Parameter:
            of = tuple((_known(e, known), c) for e, c in p.of)
            return dataclasses.replace(p, of=of)

        return dataclasses.replace(
            self,
            function=functools.partial(self.function, **known),
            parameters={name: resolved(p) for name, p in self.parameters.items() if name not in known},
            powers=None,
            gradient=None if self.gradient is None else functools.partial(self.gradient, **known),
        )

    def __call__(self, params: Params, **columns: Any) -> np.ndarray:
        return self.predict(params, **columns)


def _known(reference: str | float, known: Mapping[str, float]) -> str | float:
    if not isinstance(reference, str):
        return reference
    sign, name = (-1.0, reference[1:]) if reference.startswith("-") else (1.0, reference)
    return sign * known[name] if name in known else reference


def resolve(reference: str | float, params: Params) -> Any:
    """The value of an exponent that a power names: a number, a parameter's name, or "-name" for its negative."""
    if not isinstance(reference, str):
        return reference
    return -params[reference[1:]] if reference.startswith("-") else params[reference]


FORMS: dict[str, Form] = {}


def law(
    source: str = "", *, powers: PowerSum | None = None, target: str = "loss", register: bool = True,
    gradient: Callable[..., Any] | None = None, signed: bool = False, **parameters: Parameter,
) -> Callable[[Callable[..., Any]], Form]:  # fmt: skip
    """Decorator: makes a function a form, registered under its name unless ``register`` is false.

    The first line of the function's docstring is the form's equation.
    """

    def wrap(function: Callable[..., Any]) -> Form:
        form = _form(
            function, parameters, source=source, powers=powers, target=target, gradient=gradient, signed=signed
        )
        if register:
            FORMS[form.name] = form
        return form

    return wrap


def _form(function: Callable[..., Any], parameters: Mapping[str, Parameter], **options: Any) -> Form:
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


def get(name: "str | Form | Callable[..., Any]") -> Form:
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
