"""The law of a downstream error by the loss, for the question of what a doubling is worth."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from scaling.laws.fitting.estimate import Fit, fit
from scaling.laws.forms import catalogue
from scaling.laws.intervals import diagnosis
from scaling.laws.tables.columns import canonical
from scaling.laws.tables.observations import Observations, from_table
from scaling.laws.tables.reading import listed

if TYPE_CHECKING:
    import pandas as pd

LAW = "downstream_error"


def fitted(table: "pd.DataFrame", column: str, found: Observations, num_draws: int) -> tuple[Fit, tuple[str, ...]]:
    """Fits Err(L) = ε - k e^(-γ L) (Gadre et al. 2024, eq. 5) to a column of the table; returns it and its doubts.

    Rows without the error are left to the loss's law alone, those with more compute than the largest fitted to neither.

    Raises:
      ValueError: no such column, values that are no error, or a law that did not converge; says what to write.
    """
    source, form = found.source, catalogue.get(LAW)
    if not isinstance(column, str) or column not in table:
        there = listed(table.columns)
        raise ValueError(
            f"{source}: --downstream is {column}, which is no column (there is {there}): write that of the error"
        )
    table = canonical(table.assign(error=table[column]), source)
    known = table["error"].notna().to_numpy()
    errors = np.asarray(table["error"][known])
    if not np.issubdtype(errors.dtype, np.number) or not len(errors) or not ((errors > 0) & (errors <= 1)).all():
        raise ValueError(f"{source}: --downstream {column} is no error: write a column of shares above 0, at most 1")
    rows = from_table(table[known], source=f"{source}: {column}", target="error", columns=form.columns, **found.reading)
    if np.ptp(rows.loss) == 0 or not stats.spearmanr(rows.columns["loss"], rows.loss).statistic > 0:
        raise ValueError(
            f"{source}: --downstream {column} does not rise with the loss: of an accuracy write a column of 1 less it"
        )
    law = fit(rows, form)
    if not law.converged:
        why = "; ".join(law.reasons)
        raise ValueError(
            f"{source}: --downstream {column}: its law of the loss did not converge ({why}): name another error"
        )
    notes = [f"{column} is of {len(rows)} runs, its law's residuals {100 * law.residual_rmse:.2g} %"]
    if law.at_bound:
        held = ", ".join(sorted(law.at_bound))
        notes.append(f"{held} of {column}'s law at a bound: these runs do not tell it, and no interval is worth it")
    elif num_draws:
        law = replace(law, draws=diagnosis.resample(law, diagnosis.diagnose(law), num_draws))
    return law, tuple(notes)
