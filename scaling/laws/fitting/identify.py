"""Whether data can determine a law or an exponent: the refusals, before a fit and after it, and the single run that
would mend each."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from scaling.laws.forms.law import Form
from scaling.laws.tables.observations import Observations

# Singular values of the logs below this share of the largest are one column said twice.
SAME_LINE = 1e-3
SAME_PLACE = 1e-3  # of two runs' sizes or horizons, in log: rounding to whole batches moves them so far
# Runs within this much (RMS, in log) of a curve on which one column follows from the others may not tell them apart:
# whether they can, their losses decide. Runs whose compute differs by no more are of one budget.
NEAR_LINE = 0.10
# How the loss changes across that curve must be known to a quarter of how it changes along it (one standard error): a
# 95 % interval then leaves half of the effect to be one column's or the other's.
KNOWN_TO = 0.25
# No loss is known better than this, relative, whatever a table without noise says: another seed moves it by as much.
LEAST_NOISE = 3e-3
# Laws that a run is chosen by: exponents of N and D as Hoffmann et al. 2022 (arXiv 2203.15556) and Besiroglu et al.
# 2024 (arXiv 2404.10102) report them, with either term the larger at the middle of the runs, beside as much of a floor.
EXPONENTS = ((0.34, 0.28), (0.3478, 0.3658))
SHARES = ((0.25, 0.25), (0.40, 0.10), (0.10, 0.40))
# What is known without any run: exponents to within 1, amplitudes to e³ either way; it keeps flat directions finite.
PRIOR_SD = {"exponent": 1.0, "amplitude": 3.0}
# A run has a size between those there are, tokens per parameter up to this many times outside theirs, compute down to
# the same share of their least and up to this many times their most: beyond, other things than N and D change.
REACH, MOST_FLOPS, CANDIDATES = 16.0, 4.0, 13
# Of the runs that tell a nearly as well as the best one (within this factor), the cheapest is named.
NEARLY = 1.25
# A size beyond a minimum lies at least this many times past the best one tried, at most so many; where a law has its
# minimum further out than that, it says nothing of where, and no run is named.
LEAST_STEP, MOST_STEP = 4.0, 100.0
PAST = 2.5  # times the distance (in log N) of the minimum: half as far again beyond it as it is, or no higher a loss


@dataclass(frozen=True)
class Run:
    """A run that would mend a refusal, in round numbers."""

    num_params: float
    num_tokens: float
    flops: float

    def __str__(self) -> str:
        return f"N = {self.num_params:.2g} on D = {self.num_tokens:.3g} tokens ({self.flops:.2g} FLOPs)"


@dataclass(frozen=True)
class Unidentified:
    """A refusal: ``what`` cannot be known, ``why``, and ``mend``, in words; ``run`` is the single run that would do,
    None where one is not enough."""

    what: str
    why: str
    mend: str
    run: Run | None = None

    def __str__(self) -> str:
        named = "" if self.run is None else f": one would do, {self.run}"
        return f"{self.why}: {'; '.join(filter(None, (self.what, self.mend)))}{named}"

    def to_json(self) -> dict[str, object]:
        """Plain numbers for fit.json."""
        return {**vars(self), "run": None if self.run is None else vars(self.run), "reason": str(self)}


class NotIdentified(ValueError):
    """Data do not determine what was asked: ``told`` says why, and which run would mend it."""

    def __init__(self, source: str, told: Unidentified) -> None:
        super().__init__(f"{source}: {told}")
        self.told = told


class Sizes(Protocol):
    """The sizes of one compute budget, rising, a row each (``budgets.Profile.averaged``)."""

    @property
    def flops(self) -> float: ...

    @property
    def num_params(self) -> np.ndarray: ...

    @property
    def num_tokens(self) -> np.ndarray: ...

    @property
    def loss(self) -> np.ndarray: ...


# ---- a law ----------------------------------------------------------------------------------------------------------


def check(observations: Observations, form: Form, params: Mapping[str, float] | None = None) -> None:
    """Raises NotIdentified, a ValueError, when these data cannot determine the form (``unidentified``)."""
    told = unidentified(observations, form, params)
    if told is not None:
        raise NotIdentified(observations.source, told)


def unidentified(
    observations: Observations, form: Form, params: Mapping[str, float] | None = None
) -> Unidentified | None:
    """Says why these data cannot determine a law, and which single run would mend that; None where they can.

    Before a fit by where the runs are alone: too few of them, one value of a column, one budget, one column a power of
    another. With the fitted ``params`` also where columns move together but for so little that these losses cannot tell
    them apart: off the curve along which one column follows from the others, at a distance s (RMS over the n rows, in
    log), runs of noise σ tell the loss's slope across that curve to σ / (s √n). With D = 20 N ± 1 % that is as much as
    the slope along it, and any split of the loss between N and D fits as well.
    """
    told = _by_design(observations, form) if params is None else _by_losses(observations, form, params)
    return None if told is None else replace(told, run=_mending(observations, form))


def one_budget(observations: Observations) -> bool:
    """Whether all runs have one compute, within ``NEAR_LINE``, by their FLOPs or by N times D: an exponent of C is how
    something moves from one compute to another."""
    columns = observations.columns
    known = [columns["flops"]] if "flops" in columns else []
    if {"num_params", "num_tokens"} <= set(columns):
        known.append(columns["num_params"] * columns["num_tokens"])
    return len(observations) > 1 and any(np.log(x).std() <= NEAR_LINE for x in known)


def on_a_ray(observations: Observations) -> bool:
    """Whether runs chose their tokens by their size (or all one of them), within ``NEAR_LINE``: then N against C along
    them is the design's own power law, whatever their losses."""
    logs = np.log([observations.columns[c] for c in ("num_params", "num_tokens")])
    off = np.linalg.svd(logs - logs.mean(axis=1, keepdims=True), compute_uv=False)[-1]
    return bool(off / np.sqrt(len(observations)) <= NEAR_LINE)


def _by_design(observations: Observations, form: Form) -> Unidentified | None:
    n, P = len(observations), len(form.parameters)
    missing = [c for c in form.columns if c not in observations.columns]
    if missing:
        why = f"{form.name} needs column {', '.join(missing)}, which has no positive numbers here"
        return Unidentified("", why, "add that column")
    if n < P + 1:
        why = f"{form.name} has {P} parameters and {n} observations"
        return Unidentified("", why, f"{P + 1} or more are needed")
    for column in _bases(observations, form):
        x = observations.columns[column]
        levels = len(np.unique(np.round(np.log(x), 3)))
        needed = 3 if _own_exponent(form, column) else 2
        if levels < needed:
            what = "one value" if levels == 1 else f"{levels} values"
            return Unidentified(
                f"the exponent of {column} in {form.name} cannot be known", f"{column} takes {what} only",
                f"add runs with {needed} or more different values of {column}",
            )  # fmt: skip
    # Repeats tell the noise and nothing of the law: through as many places as parameters it goes whatever they say.
    places = len(np.unique([_places(observations.columns[c]) for c in form.columns], axis=1).T)
    if places < P + 1:
        why = f"{form.name} has {P} parameters and {n} observations of {places} different {' and '.join(form.columns)}"
        return Unidentified("", why, f"{P + 1} or more different ones are needed")
    varied, centred = _varied(observations, form)
    if (len(varied) > 1 or form.columns == ("flops",)) and (told := _of_one_budget(observations, form)):
        return told
    if len(varied) > 1:
        spread = np.linalg.svd(centred, compute_uv=False)
        if spread[-1] < SAME_LINE * spread[0]:
            return Unidentified(
                f"{form.name} cannot tell their effects apart",
                f"{' and '.join(varied)} move together in every row (one is a power of the other)",
                "add runs off that line",
            )
    return None


def _by_losses(observations: Observations, form: Form, params: Mapping[str, float]) -> Unidentified | None:
    varied, centred = _varied(observations, form)
    if len(varied) < 2 or form.signed:  # what may be zero has no relative noise
        return None
    directions, spread, along = np.linalg.svd(centred, full_matrices=False)
    n = len(observations)
    off = _off_a_curve(spread[:, None] * along)
    if off > NEAR_LINE:
        return None
    columns = {c: observations.columns[c] for c in form.columns}
    step = 1e-3 * directions[:, 0]
    there, back = (columns | {c: columns[c] * np.exp(sign * h) for c, h in zip(varied, step)} for sign in (1, -1))
    with np.errstate(all="ignore"):
        here, there, back = (np.log(form.predict(params, **x)) for x in (columns, there, back))
        residual = np.abs(here - np.log(observations.loss))
        slope = float(np.sqrt(np.mean(((there - back) / 2e-3) ** 2)))
    noise = np.median(residual) / 0.6744897501960817 * np.sqrt(n / max(n - len(params), 1))
    noise = max(float(noise), LEAST_NOISE)
    error = noise / max(off * np.sqrt(n), 1e-300)
    if not (np.isfinite(slope) and error > KNOWN_TO * slope):
        return None
    return Unidentified(
        f"{form.name} cannot tell their effects apart",
        f"{' and '.join(varied)} move together in every row but for {off:.1%}: with a noise of {noise:.1%} the slope "
        f"of the loss across that line is known to {error:.2g}, beside {slope:.2g} along it",
        "add runs off that line",
    )


def _off_a_curve(turned: np.ndarray) -> float:
    """RMS distance of rows from a line, or from a bent one, a parabola, where that is nearer: rows of one budget under
    a FLOP rule that is not 6 N D lie on such.

    ``turned`` (k, n): the rows along their principal axes, the longest first.
    """
    n, (first, *_, last) = turned.shape[1], turned
    straight = np.sqrt(np.mean(last**2))
    if len(turned) > 2 or n < 5 or straight <= SAME_LINE * first.std():
        return float(straight)
    u = first / first.std()
    rest = last - np.polyval(np.polyfit(u, last, 2), u)
    return float(min(straight, np.sqrt((rest**2).sum() / (n - 3))))


def check_compute(observations: Observations, form: Form) -> None:
    """Raises NotIdentified where a table has one budget, of a law of its best runs (``approaches.select``): of one
    quantity along them, the others follow from it. Those runs alone may be of one budget, where the table has more."""
    if told := _of_one_budget(observations, form):
        raise NotIdentified(observations.source, replace(told, run=_mending(observations, form)))


def _of_one_budget(observations: Observations, form: Form) -> Unidentified | None:
    if set(form.columns) - set(form.indicators) - {"num_params", "num_tokens", "flops"} or not one_budget(observations):
        return None
    return Unidentified(
        f"{form.name} cannot tell their effects apart",
        "all runs are of one budget, where num_params and num_tokens move together in every row",
        "add runs of other compute",
    )


# ---- the approaches -------------------------------------------------------------------------------------------------


def unidentified_points(observations: Observations) -> Unidentified | None:
    """Why the best runs of a table (approach 1 without curves) tell no exponent; None where they may."""
    what = "the envelope of final points has no exponent"
    if one_budget(observations):
        return Unidentified(what, "all runs are of one budget", "add runs of other compute")
    if on_a_ray(observations):
        why = "every run's tokens follow from its size: N against C along them is the design's, not the best"
        return Unidentified(what, why, "add runs off that line")
    return None


def unidentified_minima(budgets: Sequence[Sizes], bracketed: Sequence[bool]) -> Unidentified | None:
    """Why IsoFLOP profiles (approach 2) tell no exponent: fewer than two minima lie inside the sizes tried. None where
    two do."""
    if sum(bracketed) >= 2:
        return None
    what = "the exponents of its minima cannot be known"
    if len(budgets) < 2:
        mend = "add as many sizes at another compute, one run is not enough"
        return Unidentified(what, f"IsoFLOP: all its sizes are of one budget, {budgets[0].flops:.3g} FLOPs", mend)
    open_ = [p for p, inside in zip(budgets, bracketed) if not inside]
    ends = {-1: "the smallest size is best", 1: "the largest size is best", 0: "noise hides the minimum"}
    said = [
        f"{word} at {', '.join(f'{p.flops:.3g}' for p in open_ if best_end(p) == side)} FLOPs"
        for side, word in ends.items()
        if any(best_end(p) == side for p in open_)
    ]
    sided = [p for p in open_ if best_end(p)]
    enough = sum(bracketed) == 1 and bool(sided)
    mend = "add sizes beyond it" if sided else "add seeds or sizes there"
    mend += "" if enough or not sided else " at two budgets or more, one run is not enough"
    return Unidentified(
        what, f"IsoFLOP: {sum(bracketed)} of {len(budgets)} minima lie inside their sizes: {', '.join(said)}", mend,
        _past_the_end(sided[0]) if enough else None,
    )  # fmt: skip


def one_sided(
    law: str, budgets: Sequence[Sizes], num_params: np.ndarray, best: np.ndarray, best_of_budgets: np.ndarray
) -> Unidentified | None:
    """Why a law's allocation cannot be known although the law is: at every budget the best size is the last one on the
    same side, and by the law too all runs lie on one side of their compute's best size. None where some lie beyond.

    Args:
      num_params, best: the rows' sizes and N*(C) by the law at their compute, (n,); of ``budgets``, (m,).
    """
    ends = {best_end(p) for p in budgets}
    if len(ends) != 1 or 0 in ends:
        return None
    (side,) = ends
    if not (side * np.log(best) >= side * np.log(num_params)).all():
        return None
    words = {-1: ("smallest", "smaller"), 1: ("largest", "larger")}[side]
    distance = np.abs(np.log(best_of_budgets) - [np.log(p.num_params[side if side < 0 else -1]) for p in budgets])
    distance = np.where(np.isfinite(distance), distance, np.inf)
    nearest = int(distance.argmin())
    known = bool(distance[nearest] <= np.log(MOST_STEP))
    return Unidentified(
        f"{law} tells no a, N* or D*",
        f"at every budget the {words[0]} size is best: all runs lie on one side of every minimum",
        f"add {words[1]} sizes" + ("" if known else ", how many times, these runs do not tell"),
        _past_the_end(budgets[nearest], float(distance[nearest])) if known else None,
    )  # fmt: skip


def best_end(sizes: Sizes) -> int:
    """Where the lowest loss is: -1 at the smallest size, 1 at the largest, 0 between."""
    at = int(np.argmin(sizes.loss))
    return -1 if at == 0 else 1 if at == len(sizes.loss) - 1 else 0


# ---- the run that would mend it -------------------------------------------------------------------------------------


def _past_the_end(sizes: Sizes, distance: float = 0.0) -> Run:
    """A run of the budget beyond the minimum, which lies ``distance`` (in log N) past the best size, an end.

    ``PAST`` times that distance, or that of the vertex of the parabola through the sizes where it is further out.
    """
    side = best_end(sizes)
    x = np.log(sizes.num_params)
    bend, tilt, _ = np.polyfit(x - x[0], sizes.loss, 2)
    vertex = side * (x[0] - tilt / (2 * bend) - x[sizes.loss.argmin()]) if bend > 0 else 0.0
    step = np.clip(PAST * max(distance, vertex), np.log(LEAST_STEP), np.log(MOST_STEP))
    n = float(np.exp(x[sizes.loss.argmin()] + side * step))
    per_token = _flops_per_token(sizes.num_params, sizes.flops / sizes.num_tokens, np.array([n]))[0]
    return _rounded(n, sizes.flops / per_token, per_token, digits=3)  # within the budget


def _mending(observations: Observations, form: Form) -> Run | None:
    """The cheapest single run that tells a nearly as well as the best one does, of those after which the design is no
    longer refused; None where no single one is enough, or the form takes more than N, D and C."""
    columns = observations.columns
    others = set(form.columns) - {"num_params", "num_tokens", "flops", "unique_tokens", *form.indicators}
    if others or not {"num_params", "num_tokens"} <= set(columns):
        return None
    n, d = columns["num_params"], columns["num_tokens"]
    flops = columns.get("flops", 6 * n * d)
    sizes = np.geomspace(n.min(), n.max(), CANDIDATES)
    spent = np.geomspace(flops.min() / REACH, flops.max() * MOST_FLOPS, CANDIDATES)
    per_token = _flops_per_token(n, flops / d, sizes)
    tried = [_rounded(size, C / each, each) for (size, each), C in itertools.product(zip(sizes, per_token), spent)]
    low, high = (d / n).min() / REACH, (d / n).max() * REACH
    tried = [run for run in tried if low <= run.num_tokens / run.num_params <= high]
    left = _left_unknown(n, d, tried)
    cheap = sorted(np.flatnonzero(left <= NEARLY * left.min()), key=lambda k: tried[k].flops)
    for k in (*cheap, *np.argsort(left, kind="stable")):
        if _by_design(_with_run(observations, tried[k]), form) is None:
            return tried[k]
    return None


def _left_unknown(num_params: np.ndarray, num_tokens: np.ndarray, runs: Sequence[Run]) -> np.ndarray:
    """Standard error of a = β/(α+β) with each run added, the largest over the laws of ``EXPONENTS`` and ``SHARES``.

    By the information of E + A N^-α + B D^-β about (log E, log A, α, log B, β), from log losses of ``LEAST_NOISE``.
    """
    log_n, log_d = np.log(num_params), np.log(num_tokens)
    new = np.log([[r.num_params, r.num_tokens] for r in runs]).T
    prior = np.array([PRIOR_SD[k] for k in ("amplitude", "amplitude", "exponent", "amplitude", "exponent")]) ** -2.0
    worst = np.zeros(len(runs))
    for (alpha, beta), (of_n, of_d) in itertools.product(EXPONENTS, SHARES):

        def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            x, y = x - log_n.mean(), y - log_d.mean()
            a, b, floor = of_n * np.exp(-alpha * x), of_d * np.exp(-beta * y), 1.0 - of_n - of_d  # noqa: B023
            return np.stack([np.full_like(x, floor), a, -a * x, b, -b * y], axis=1) / (floor + a + b)[:, None]

        J, added = slopes(log_n, log_d) / LEAST_NOISE, slopes(*new) / LEAST_NOISE
        known = J.T @ J + np.diag(prior) + added[:, :, None] * added[:, None, :]
        g = np.array([0.0, 0.0, -beta, 0.0, alpha]) / (alpha + beta) ** 2
        worst = np.maximum(worst, np.sqrt(np.einsum("p,rpq,q->r", g, np.linalg.inv(known), g)))
    return worst


def _flops_per_token(num_params: np.ndarray, per_token: np.ndarray, at: np.ndarray) -> np.ndarray:
    """C/D of new sizes: the rows' C/(N D), interpolated in log N, its ends' beyond them."""
    order = np.argsort(num_params)
    ratio = np.log(per_token / num_params)[order]
    return at * np.exp(np.interp(np.log(at), np.log(num_params)[order], ratio))


def _rounded(num_params: float, num_tokens: float, flops_per_token: float, digits: int = 2) -> Run:
    n = float(f"{num_params:.2g}")
    d = float(f"{num_tokens * num_params / n:.{digits}g}")
    return Run(n, d, float(f"{flops_per_token * n / num_params * d:.3g}"))


def _with_run(observations: Observations, run: Run) -> Observations:
    """The rows and one more, whose other columns are the first row's."""
    more = observations.take(np.append(np.arange(len(observations)), 0))
    for name, x in vars(run).items():
        if name in more.columns:
            more.columns[name][-1] = x
    return more


# ---- columns --------------------------------------------------------------------------------------------------------


def _places(x: np.ndarray) -> np.ndarray:
    """Numbers values along a column, those as one that lie within ``SAME_PLACE`` of the one before: of one another in
    logarithms, of the column's range where it is not all positive."""
    along = np.log(x) if (x > 0).all() else x / max(float(np.ptp(x)), 1e-300)
    order = np.argsort(along, kind="stable")
    out = np.empty(len(x), dtype=int)
    out[order] = np.concatenate([[0], np.cumsum(np.diff(along[order]) > SAME_PLACE)])
    return out


def _bases(observations: Observations, form: Form) -> list[str]:
    """Columns that a form takes powers of. One corpus will do, and no repetition too: ``unique_tokens`` is no axis
    that runs must spread along, and neither is what says which group a row is of."""
    apart = {"unique_tokens", *form.indicators}
    return [c for c in form.columns if c not in apart and (observations.columns[c] > 0).all()]


def _varied(observations: Observations, form: Form) -> tuple[list[str], np.ndarray]:
    """Columns that take several values, and their centred logarithms (k, n)."""
    logs = {c: np.log(observations.columns[c]) for c in _bases(observations, form)}
    varied = [c for c, x in logs.items() if np.ptp(x) > 0]
    return varied, np.array([logs[c] - logs[c].mean() for c in varied])


def _own_exponent(form: Form, column: str) -> bool:
    """Whether a sum of powers with an offset has an exponent that only this column tells: three values then."""
    if form.powers is None or form.powers.offset is None:
        return False
    used: dict[str, set[str]] = {}
    for _, exponents in form.powers.terms:
        for c, e in exponents.items():
            if isinstance(e, str):
                used.setdefault(c, set()).add(e.removeprefix("-"))
    others = set().union(*(names for c, names in used.items() if c != column))
    return bool(used.get(column, set()) - others)
