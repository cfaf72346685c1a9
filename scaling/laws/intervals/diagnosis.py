"""What the residuals say of the noise: whether rows are independent and alike, and which rows share an error.

Intervals that take every row for one independent draw of the same noise promise too much where errors grow with the
loss, or are shared by the rows of a run, of a size, of a budget or of a cell. Each is tested here.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from scaling.laws.answers.budgets import TOLERANCE
from scaling.laws.fitting import run_noise
from scaling.laws.fitting.estimate import Draws, Fit
from scaling.laws.intervals import resampling
from scaling.laws.tables.observations import Observations

# Below this many clusters their sums say too little of how they scatter (Cameron, Gelbach & Miller 2008, §III: with
# ten and fewer even corrected intervals are off); rows are taken instead, and that is said.
MIN_CLUSTERS = 10
# A test's level: each gives one in twenty tables with plain noise the wider interval. Stricter, it misses
# a third of the errors that five sizes share, and the profile's interval then holds 60 % in place of 90 %.
SIGNIFICANCE = 0.05
DOUBTFUL = 0.25  # a p value up to which a share of more than half between groups is told, though not acted on
NUM_NULL = 999
MAX_TESTED_ROWS = 20_000


@dataclass(frozen=True)
class Noise:
    """Which noise intervals are made for, and why.

    Attributes:
      kind: ``independent``, or what rows share: ``run``, ``num_params``, ``budget``, ``cell``; ``uneven`` where rows
        are independent and their scatter depends on the loss.
      groups: number of each row's cluster (n,); None where rows are independent and alike.
      reason: in words.
      p_values: of each test that could be made, by kind.
      cells: number of each row's cell (n,), where independent rows repeat cells: these are resampled whole.
    """

    kind: str = "independent"
    groups: np.ndarray | None = field(default=None, repr=False)
    reason: str = "no test of the residuals speaks against independent rows of one scale"
    p_values: dict[str, float] = field(default_factory=dict)
    doubtful: bool = False  # rows count as independent, but half the residuals' squares lie between groups
    cells: np.ndarray | None = field(default=None, repr=False)

    @property
    def unit(self) -> str:
        """What the wild bootstrap draws as one, in words."""
        if self.kind == "uneven":
            return "each row's error of its own scale"
        return f"over {int(self.groups.max()) + 1} clusters of rows by {self.kind}"  # type: ignore[union-attr]  # there are

    def to_json(self) -> dict[str, Any]:
        drawn = self.cells if self.groups is None else self.groups
        count = None if drawn is None else int(drawn.max()) + 1
        return {"kind": self.kind, "num_clusters": count, "reason": self.reason, "p_values": self.p_values}


def run_clusters(observations: Observations) -> tuple[np.ndarray | None, str | None]:
    """Reads a repeated label of runs as clusters: (number of each row's cluster (n,) or None, what to tell the reader).

    Rows of one run share its noise. A run has one size, so a label that goes with several is a project's name or a
    repeat's number; and fewer than ``MIN_CLUSTERS`` clusters say too little of their own scatter. Both leave rows
    independent.
    """
    labels, member = np.unique(observations.run, return_inverse=True)
    if len(labels) == len(observations):
        return None, None
    count = f"{len(labels)} value{'s' if len(labels) > 1 else ''} in {len(observations)} rows"
    found = f"column {observations.run_column or 'run'} has {count}"
    size = observations.columns.get("num_params")
    if size is not None and len({*zip(member.tolist(), size.tolist())}) > len(labels):
        return None, f"{found} and rows of one value differ in num_params: no label of runs, rows count as independent"
    if len(labels) < MIN_CLUSTERS:
        few = f"{found}: clusters of rows, but fewer than {MIN_CLUSTERS} say too little of how clusters scatter"
        return None, f"{few}; intervals take rows as independent and are too narrow if rows of one value share an error"
    return member, f"{found}: rows of one value are one cluster in the intervals"


def diagnose(fit: Fit, clusters: np.ndarray | None = None, *, seed: int = 0) -> Noise:
    """Says which noise a fit's intervals have to allow for, by tests of its residuals (``_tested``).

    Args:
      clusters: number of each row's run (n,), where the table names runs: taken whatever the tests say.
    """
    found = _tested(fit, clusters, seed)
    if found.groups is not None:
        return found
    cells = run_noise.cells_of(fit.observations)
    repeated = MIN_CLUSTERS <= cells.max() + 1 < len(cells)
    return replace(found, cells=cells) if repeated else found


def _tested(fit: Fit, clusters: np.ndarray | None, seed: int) -> Noise:
    """Tests a fit's residuals and says which noise its intervals have to allow for.

    With e = √w r, winsorised at three robust standard deviations: Σ_g (Σ_{i∈g} e_i)² / Σ e² for the rows of one size,
    of one budget (its C within 5 % of the next) and of one cell (the score test of a random effect), and
    |corr(|e|, log predicted)|. Each is compared with its own value on ``NUM_NULL`` draws of independent noise after the
    same projection on the law's tangent plane. Of the groups found, those whose statistic lies farthest out are taken;
    scale against the loss matters only where no group is found.
    """
    if clusters is not None:
        return Noise("run", _numbered(clusters), "the table says which rows are of one run")
    if fit.num_observations > MAX_TESTED_ROWS or fit.degrees_of_freedom < 3:
        return Noise(reason="residuals not tested: too few, or too many, rows")
    scale = 3.0 * np.median(np.abs(fit.residuals)) / 0.6744897501960817
    root = np.sqrt(fit.observations.weight)
    e = root * np.clip(fit.residuals, -scale, scale)
    if not e.any() or scale < 1e-9:
        return Noise(reason="residuals not tested: the law goes through the rows")
    basis = _tangent(fit, root)
    null = np.random.default_rng(seed).normal(size=(NUM_NULL, len(e)))
    null -= (null @ basis) @ basis.T
    groups = {kind: g for kind, g in groupings(fit.observations).items() if g.max() + 1 < len(e)}
    found = {kind: _compare(_shared(e[None], g)[0], _shared(null, g)) for kind, g in groups.items()}
    level = np.log(fit.form.predict(fit.params, **{c: fit.observations.columns[c] for c in fit.form.columns}))
    uneven, _ = _compare(_uneven(e[None], level)[0], _uneven(null, level))
    p_values = {kind: p for kind, (p, _) in found.items()} | {"scale": uneven}
    shared = {kind: distance for kind, (p, distance) in found.items() if p <= SIGNIFICANCE}
    if shared:
        kind = max(shared, key=shared.get)  # type: ignore[arg-type]  # every key is there
        what = {"num_params": "num_params", "budget": "compute budget", "cell": "num_params and num_tokens"}[kind]
        part = intraclass(e, groups[kind])
        reason = f"residuals of one {what} go together (p {p_values[kind]:.2g}, {part:.0%} of their variance)"
        return Noise(kind, groups[kind], reason, p_values)
    if uneven <= SIGNIFICANCE:
        reason = f"the residuals' scale changes with the loss (p {uneven:.2g})"
        return Noise("uneven", np.arange(len(e)), reason, p_values)
    for kind in ("num_params", "budget"):
        if kind in groups and p_values[kind] < DOUBTFUL and (part := between(e, groups[kind])) > 0.5:
            reason = f"{part:.0%} of the residuals' squares lie between values of {kind} (p {p_values[kind]:.2g})"
            return Noise(reason=f"{reason}: too little to show a shared error, which would widen the interval",
                         p_values=p_values, doubtful=True)  # fmt: skip
    return Noise(p_values=p_values)


def resample(fit: Fit, noise: Noise, num: int, seed: int = 0) -> Draws:
    """Draws laws as this noise lets the fit move: by refits to resampled rows where these are independent and alike, by
    ``resampling.uneven`` or ``resampling.wild`` otherwise."""
    if noise.kind == "uneven":
        return resampling.uneven(fit, num, seed=seed)
    if noise.groups is not None:
        return resampling.wild(fit, noise.groups, num, seed=seed)
    return resampling.bootstrap(fit, num, seed=seed, clusters=noise.cells)


def between(e: np.ndarray, groups: np.ndarray) -> float:
    """The share of residuals' sum of squares that is their groups' means'."""
    mean = np.bincount(groups, e) / np.bincount(groups)
    return float(((mean[groups] - e.mean()) ** 2).sum() / max(((e - e.mean()) ** 2).sum(), 1e-300))


MIN_SHARED = 3  # groups of more than one row


def groupings(observations: Observations) -> dict[str, np.ndarray]:
    """Numbers rows by what they may share, {kind: (n,)}: size, budget and cell, where three or more are different and
    three or more are shared: of one pair nothing is seen."""
    columns, out = observations.columns, {}
    size, tokens = (columns.get(c) for c in ("num_params", "num_tokens"))
    if size is not None:
        out["num_params"] = _numbered(size)
    budget = np.asarray(observations.budget, dtype=np.float64)
    if np.isfinite(budget).all():
        out["budget"] = _numbered(budget)
    elif "flops" in columns:
        order = np.argsort(columns["flops"])
        steps = np.diff(np.log(columns["flops"][order]), prepend=np.log(columns["flops"][order[0]]))
        out["budget"] = np.empty(len(order), dtype=int)
        out["budget"][order] = np.cumsum(steps > TOLERANCE)
    if size is not None and tokens is not None:
        out["cell"] = np.unique(np.stack([size, tokens]), axis=1, return_inverse=True)[1].ravel()
    return {kind: g for kind, g in out.items() if g.max() >= 2 and (np.bincount(g) > 1).sum() >= MIN_SHARED}


def intraclass(e: np.ndarray, groups: np.ndarray) -> float:
    """The share of residuals' variance that their groups share, by the analysis of variance: (between - within) over
    (between + (m - 1) within), m the rows of a group."""
    count = np.bincount(groups)
    mean = np.bincount(groups, e) / count
    k, n = len(count), len(e)
    between = (count * (mean - e.mean()) ** 2).sum() / (k - 1)
    within = ((e - mean[groups]) ** 2).sum() / max(n - k, 1)
    m = (n - (count**2).sum() / n) / (k - 1)
    return float(np.clip((between - within) / max(between + (m - 1) * within, 1e-300), 0.0, 1.0))


def _numbered(labels: np.ndarray) -> np.ndarray:
    return np.unique(labels, return_inverse=True)[1]


def _tangent(fit: Fit, root: np.ndarray) -> np.ndarray:
    """An orthonormal basis (n, P) of the directions in which the law can follow the residuals."""
    _, jacobian, _ = fit.problem.model.derivatives(fit.theta[None])
    left, values, _ = np.linalg.svd((jacobian[0] * root).T, full_matrices=False)
    return left[:, values > 1e-12 * values[0]]


def _shared(e: np.ndarray, groups: np.ndarray) -> np.ndarray:
    order = np.argsort(groups, kind="stable")
    first = np.flatnonzero(np.diff(groups[order], prepend=-1))
    sums = np.add.reduceat(e[:, order], first, axis=1)
    return (sums**2).sum(axis=1) / (e**2).sum(axis=1)


def _uneven(e: np.ndarray, level: np.ndarray) -> np.ndarray:
    size, x = np.abs(e), level - level.mean()
    size = size - size.mean(axis=1, keepdims=True)
    return np.abs(size @ x) / np.sqrt((size**2).sum(axis=1) * max((x**2).sum(), 1e-300))


def _compare(seen: float, null: np.ndarray) -> tuple[float, float]:
    """(p value, standard deviations above the mean of the null's draws)."""
    p = (1 + (null >= seen).sum()) / (1 + len(null))
    return float(p), float((seen - null.mean()) / max(null.std(), 1e-300))
