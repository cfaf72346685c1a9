"""Which rows of a table make an IsoFLOP budget: those of one compute, told apart from what is near it by chance."""

from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from scaling.laws.tables.observations import Observations

MIN_SIZES = 4  # of an IsoFLOP profile: three make any parabola exact
TOLERANCE = 0.05  # rows of one budget lie within this of its compute, in log C
# Without labels, as many rows so near each other must come by chance in fewer than one of a hundred scattered tables.
CHANCE = 0.01
NEIGHBOURHOOD = np.log(2.0)  # in log C, either way: what is scattered about a group, to set its density against
SAME_SIZE = 3  # digits of log N that two rows of one size share


@dataclass(frozen=True)
class Profile:
    """The runs of one compute budget, by rising size."""

    flops: float  # geometric mean of what the runs achieved
    num_params: np.ndarray
    num_tokens: np.ndarray
    loss: np.ndarray
    weight: np.ndarray = field(default_factory=lambda: np.ones(()))  # relative; 1/variance of a row

    @property
    def row_weight(self) -> np.ndarray:
        """``weight`` of each row, of mean 1, (n,): a common factor of the weights means nothing."""
        weight = np.broadcast_to(self.weight, self.loss.shape).astype(np.float64)
        return weight / weight.mean()

    @property
    def size(self) -> np.ndarray:
        """Which of the profile's sizes each row has, 0 for the smallest, (n,): seeds of one size share a number."""
        return np.unique(np.round(np.log(self.num_params), SAME_SIZE), return_inverse=True)[1]

    def averaged(self) -> "Profile":
        """One row a size: means of log N, log D and loss over its rows, weighted; the weight is their sum."""
        w, size = self.row_weight, self.size
        total = np.bincount(size, w)
        mean = [np.bincount(size, w * x) / total for x in (np.log(self.num_params), np.log(self.num_tokens), self.loss)]
        return Profile(self.flops, np.exp(mean[0]), np.exp(mean[1]), mean[2], total)


def profiles(observations: Observations) -> list[Profile]:
    """Groups rows into IsoFLOP profiles, by rising compute (``grouped``)."""
    return grouped(observations)[0]


def grouped(observations: Observations) -> tuple[list[Profile], list[str]]:
    """The IsoFLOP profiles of a table, and in words which rows make none and why.

    Rows make a budget when ``MIN_SIZES`` or more sizes lie within ±5 % (``TOLERANCE``) of one compute. Where every row
    has a budget label, each label's rows about their median are asked. Where not, groups are looked for
    (``_by_chance``): they must lie nearer together than rows scattered over C would in one of a hundred such tables.
    """
    log_c = np.log(observations.columns["flops"])
    notes = []
    if np.isfinite(observations.budget).all():
        groups = []
        for rows in rows_by_budget(observations):
            label = observations.budget[rows[0]]
            near = rows[np.abs(log_c[rows] - np.median(log_c[rows])) <= TOLERANCE]
            if len(near) < len(rows):
                notes.append(
                    f"IsoFLOP: {len(rows) - len(near)} of {len(rows)} runs of budget {label:.3g} are more than "
                    f"{TOLERANCE:.0%} off its median compute and left out of its profile"
                )
            groups.append(near)
        groups = [rows for rows in groups if _num_sizes(observations, rows) >= MIN_SIZES]
    else:
        groups = _found(observations, log_c)
    if not groups:
        notes.append(
            f"no IsoFLOP approach: no {MIN_SIZES} sizes lie within {TOLERANCE:.0%} of one compute, apart from what "
            "scattered runs would do by chance; rows of one budget can be labelled in a column budget_flops"
        )
    return sorted((_profile(observations, rows) for rows in groups), key=lambda p: p.flops), notes


def rows_by_budget(observations: Observations) -> list[np.ndarray]:
    """Rows of each compute budget, by rising compute: of each label, or of the profiles found where rows have none."""
    if np.isfinite(observations.budget).all():
        return [np.flatnonzero(observations.budget == label) for label in np.unique(observations.budget)]
    if not {"flops", "num_params"} <= set(observations.columns):
        return []
    log_c = np.log(observations.columns["flops"])
    return sorted(_found(observations, log_c), key=lambda rows: log_c[rows].mean())


def rows_by_size(observations: Observations) -> list[np.ndarray]:
    """Rows of each model size, by rising size."""
    size = np.round(np.log(observations.columns["num_params"]), SAME_SIZE)
    return [np.flatnonzero(size == x) for x in np.unique(size)]


def _num_sizes(observations: Observations, rows: np.ndarray) -> int:
    return len(rows_by_size(observations.take(rows)))


def _profile(observations: Observations, rows: np.ndarray) -> Profile:
    columns = observations.columns
    rows = rows[np.argsort(columns["num_params"][rows], kind="stable")]
    flops = float(np.exp(np.log(columns["flops"][rows]).mean()))
    return Profile(
        flops, columns["num_params"][rows], columns["num_tokens"][rows], observations.loss[rows],
        observations.weight[rows],
    )  # fmt: skip


def _found(observations: Observations, log_c: np.ndarray) -> list[np.ndarray]:
    """Disjoint groups of rows of nearly one compute, the least likely by chance first."""
    # Seeds are one point: that they share their compute says nothing about budgets.
    cells = np.stack([np.round(log_c, SAME_SIZE), np.round(np.log(observations.columns["num_params"]), SAME_SIZE)])
    first = np.unique(cells, axis=1, return_index=True)[1]
    first = first[np.argsort(log_c[first], kind="stable")]
    x = log_c[first]
    start, stop, chance = _by_chance(x)
    taken, groups = np.zeros(len(x), dtype=bool), []
    for k in np.lexsort((start - stop, chance)):
        if chance[k] > CHANCE:
            break
        if taken[start[k] : stop[k]].any() or _num_sizes(observations, first[start[k] : stop[k]]) < MIN_SIZES:
            continue
        taken[start[k] : stop[k]] = True
        inside = (log_c >= x[start[k]] - 1e-3) & (log_c <= x[stop[k] - 1] + 1e-3)
        groups.append(np.flatnonzero(inside))
    return groups


def _by_chance(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(start, stop, expected number by chance) of candidate groups ``x[start:stop]`` of sorted log C, (m,) each.

    Were the n rows scattered, k of them within a spread S would come about

    - with a gap of r S or more on both sides, n (1 + 2r)^-(k-1) times a table (spacings are exponential), and
    - n P(Poisson(λ S) ≥ k - 1) times, λ the density of the other rows within ``NEIGHBOURHOOD``.

    The smaller of the two counts twice, as two questions were asked.
    """
    n = len(x)
    widths = np.append(2 * TOLERANCE * 0.5 ** np.arange(18), 0.0)
    start = np.repeat(np.arange(n), len(widths))
    stop = np.searchsorted(x, x[start] + np.tile(widths, n) + 1e-9, side="right")
    start, stop = np.unique(np.stack([start, stop]), axis=1)
    enough = stop - start >= MIN_SIZES
    start, stop = start[enough], stop[enough]
    k, spread = stop - start, np.maximum(x[stop - 1] - x[start], 1e-9)
    padded = np.concatenate([[-np.inf], x, [np.inf]])
    gap = np.minimum(x[start] - padded[start], padded[stop + 1] - x[stop - 1])
    # A table of one group has no gaps to compare: its own tolerance stands in.
    isolated = n * (1 + 2 * np.minimum(gap, NEIGHBOURHOOD) / spread) ** -(k - 1.0)
    lo, hi = (np.searchsorted(x, v, side) for v, side in (  # type: ignore[call-overload]  # left, right
        (x[start] - NEIGHBOURHOOD, "left"), (x[stop - 1] + NEIGHBOURHOOD, "right")))  # fmt: skip
    others = hi - lo - k
    density = (others + 2 * np.sqrt(others) + 1) / (2 * NEIGHBOURHOOD)  # two standard errors up: a gap is not a law
    dense = n * stats.poisson.sf(k - 2, density * spread)
    return start, stop, 2 * np.minimum(isolated, dense)
