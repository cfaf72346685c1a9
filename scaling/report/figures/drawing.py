"""What every figure is drawn from and drawn into, and what of fit.json several of them read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from scaling import records
from scaling.laws.forms import catalogue

FULL, HALF = 11.0, 5.6  # widths of a figure in inches: the page, and half of it
USUAL_UNIT = "nats per token"  # of a loss, where nothing says otherwise


@dataclass(frozen=True)
class Drawing:
    """A figure, its file name's stem, and the words that go with it."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Seen:
    """What figures are drawn from.

    Args:
      done: the table of runs that have a loss, counted as the fit counts, with a ``label`` each.
      fit: fit.json; may be empty.
      runs: the records that the table is of; none of a CSV's.
      groups: rows of groups with laws of their own (``group_rows``).
    """

    done: Any
    fit: Mapping
    runs: Sequence[records.RunRecord] = ()
    groups: Sequence[Mapping] = ()


def loss_unit(fit: Mapping) -> str:
    return fit.get("loss_unit", USUAL_UNIT)


def convention(fit: Mapping) -> Mapping[str, str]:
    return fit.get("convention") or {"num_params": "non_embedding", "flops": "exact"}


def labels(table) -> list[str]:
    """Rows as fit.json names them."""
    for column in ("run_id", "run", "name", "run_name"):
        if column in table:
            return table[column].astype(str).tolist()
    return [f"row {i}" for i in range(len(table))]


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def part(fit: Mapping, key: str) -> Mapping:
    return fit.get(key) or {}


def predictor(fit: Mapping, law: str | None = None):
    """A fitted law as a function of its columns (num_params=…, num_tokens=…); by default the one allocation is from.

    None if it was not fitted, or is a form of the user's that is not known here.
    """
    law = law or part(fit, "allocation").get("law")
    fitted = part(fit, "laws").get(law)
    if not fitted or law not in catalogue.FORMS:
        return None
    form = catalogue.FORMS[law]
    return lambda **columns: form.predict(fitted["params"], **columns)


def engineering_flops(value: float) -> str:
    """2.9e19, without the plus that Python writes."""
    return f"{value:.2g}".replace("e+", "e")
