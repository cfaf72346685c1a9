"""How numbers are written on the report's page; None, what is not known, is a dash."""

import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup, escape

from scaling.numbers import compact, ended

PROVISIONAL = 'class="provisional"'  # of the page's first tag, where its sweep still runs
GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ"}


def is_provisional(page: Path) -> bool:
    """Whether a page was written while its sweep ran."""
    return page.exists() and PROVISIONAL in page.read_text(encoding="utf-8")[:200]


def num(value: float | None, digits: int = 4) -> str:
    """To so many digits, and no 1e+03."""
    if value is None:
        return "–"
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:.{digits}g}"


def amount(value: float | None, unit: str) -> str:
    """A quantity of the plan with its unit: 751 s, 360 MB, $4.20, 12 %."""
    if value is None:
        return "–"
    if unit == "bytes":
        return f"{compact(value).replace('K', ' k').replace('B', ' G').replace('M', ' M')}B"
    if unit == "$":
        return f"${num(value, 3)}"
    return f"{num(100 * value, 2)} %" if unit == "" else f"{num(value, 3)} {unit}"


def fixed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def scientific(value: float | None) -> str:
    """3×10 and its power, raised."""
    if not value:
        return "–" if value is None else "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    factor = f"{float(mantissa):g}"
    return Markup("" if factor == "1" else f"{factor}&hairsp;×&hairsp;") + Markup(f"10<sup>{int(exponent)}</sup>")


def plain(value: float | None, digits: int = 3) -> str:
    """A parameter of any size: powers of ten where digits would not fit."""
    return scientific(value) if value and not 1e-3 <= abs(value) < 1e6 else num(value, digits)


# What follows ^ in a form's equation: a bracket with what is in it, or all up to a blank, a bracket's end, a comma.
POWER = r"\^(\([^()]*\)|-?[^ ),]+)"


def equation(text: str) -> str:
    """N_c and D^-β with their index lowered, their exponent raised."""
    raised = re.sub(POWER, lambda m: f"<sup>{m[1]}</sup>", str(escape(text)))
    return Markup(re.sub(r"_(\w+)", r"<sub>\1</sub>", raised))


def span(pair: Sequence[float] | None, write=num) -> str:
    """An interval; an end that is null is one the data do not set."""
    if not pair:
        return ""
    return Markup("{}&hairsp;–&hairsp;{}").format(*("unbounded" if ended(end) is None else write(end) for end in pair))


# What the template calls them.
FILTERS = {
    "si": lambda v: "–" if v is None else compact(v),
    "amount": amount,
    "sci": scientific,
    "fixed": fixed,
    "num": num,
    "range": span,
    "range_fixed": lambda pair: span(pair, fixed),
    "range_si": lambda pair: span(pair, compact),
    "range_plain": lambda pair: span(pair, plain),
    "plain": plain,
    "equation": equation,
    "greek": lambda name: equation(GREEK.get(name, name)),  # type: ignore[arg-type]  # a name is a string
}
