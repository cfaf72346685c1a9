"""How much better one group of runs is than another: the compute multiplier at equal loss, from laws fitted jointly.

``comparison`` asks which form fits one group of rows; here one form is fitted to several groups.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from scaling.laws.answers import allocation, rows_by_group
from scaling.laws.answers.allocation import Cost
from scaling.laws.answers.at_best import LawAtBest, log_multiplier, log_multiplier_at_size
from scaling.laws.fitting import identify, run_noise
from scaling.laws.fitting.estimate import Draws, Fit, fit
from scaling.laws.fitting.run_noise import RunNoise
from scaling.laws.forms.joint import joint, of_group
from scaling.laws.forms.law import Form, Params
from scaling.laws.intervals import resampling
from scaling.laws.intervals.diagnosis import MIN_CLUSTERS
from scaling.laws.intervals.profile import deviance_scale
from scaling.laws.tables.columns import NAMES, canonical
from scaling.laws.tables.observations import Observations
from scaling.numbers import check_resamples

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.90
SIGNIFICANCE = 0.05  # of the test of shared exponents
NUM_POINTS = 25
# Multipliers are told this far beyond the largest compute fitted, and marked there.
BEYOND = 10.0
UNITS = {"flops": "FLOPs", "num_tokens": "tokens", "num_params": "parameters"}  # of what a multiplier counts


@dataclass(frozen=True)
class Group:
    """The fitted runs of one value of the compared column.

    ``cost`` is the group's own FLOPs per token; None where the law is of one column, which then is what is paid.
    ``alone`` is its law fitted to these rows alone, None where they are too few for it; ``alone_draws`` its resamples.
    """

    name: str
    observations: Observations
    cost: Cost | None
    alone: Fit | None = None
    alone_draws: Draws | None = None


@dataclass(frozen=True)
class Sharing:
    """Whether exponents and floor may be shared: F = (2 (S_joint - S_apart) / τ) / q against F(q, n - P).

    S is the objective, of the joint law and summed over the groups' own; q the parameters that sharing saves, P those
    of the laws apart, τ the scale of their residuals (``profile.deviance_scale``). Rows count as independent: where
    runs of one cell share an error, exponents differ by less than F expects, and the test rejects too seldom.
    """

    statistic: float
    p_value: float
    degrees_of_freedom: tuple[int, int]

    @property
    def rejected(self) -> bool:
        return self.p_value < SIGNIFICANCE


@dataclass(frozen=True)
class Curve:
    """A multiplier at each point of a pair's axis, (m,), and its interval, (m, 2); inf or NaN where there is none."""

    value: np.ndarray
    interval: np.ndarray


@dataclass(frozen=True)
class Pair:
    """What ``group`` is worth in units of ``over``: how many times as much ``over`` takes for the same loss.

    ``at`` is what ``group`` spends, (m,); ``shared`` the multiplier by the joint law, ``apart`` by the groups' own
    (None where one has none), ``same_size`` at the model size that is best for ``group`` (None of laws of one column).
    ``extrapolated`` marks where either of the two would lie outside its fitted rows.
    """

    group: str
    over: str
    at: np.ndarray
    shared: Curve
    apart: Curve | None
    same_size: Curve | None
    extrapolated: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Groups of runs compared by one law.

    Attributes:
      column: whose values tell the groups apart.
      form: the law, and ``joint`` its fit with a term's amplitude for each group (``forms.joint``).
      axis: what a multiplier counts: flops, or the column of a law of one.
      unit: of the loss.
      level: of the intervals; ``draws`` are the resamples behind them, None where they are the delta method's.
      cells: of each row (n,), and ``paired`` the rows whose cell all groups have.
      moves: how far each group's least loss, at the largest compute fitted and ``BEYOND`` times that, moves from the
        joint law to its own.
    """

    column: str
    source: str
    form: Form
    axis: str
    unit: str
    groups: tuple[Group, ...]
    joint: Fit
    draws: Draws | None
    sharing: Sharing | None
    pairs: tuple[Pair, ...]
    level: float
    cells: np.ndarray = field(repr=False)
    paired: np.ndarray = field(repr=False)
    moves: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    run_noise: RunNoise | None = None

    @property
    def widening(self) -> float:
        """√(m/(m - 1)), m the cells of the group with fewest: a variance by resamples of m is too small by its square
        (Efron & Tibshirani 1993, §12.5; Hesterberg 2015, §4.3, "narrowness bias")."""
        member = rows_by_group.member_of([group.observations for group in self.groups])
        fewest = min(len(np.unique(self.cells[member == k])) for k in range(len(self.groups)))
        return math.sqrt(fewest / (fewest - 1))

    def params(self, name: str) -> dict[str, float]:
        """The joint law's parameters for one group, as ``form`` has them."""
        k = [g.name for g in self.groups].index(name)
        return {p: float(v) for p, v in of_group(self.form, self.joint.params, k).items()}

    @property
    def leads_apart(self) -> bool:
        """Whether the groups' own laws are to be believed: the test rejects exponents that they share."""
        return self.sharing is not None and self.sharing.rejected

    def params_apart(self, name: str) -> dict[str, float] | None:
        """Those of the group's own law, where it has one."""
        alone = next(g.alone for g in self.groups if g.name == name)
        return None if alone is None else {p: float(v) for p, v in of_group(self.form, alone.params, 0).items()}


def compare(
    table: "pd.DataFrame",
    column: str,
    *,
    law: "str | Form | None" = None,
    num_params: str = "non_embedding",
    flops: str = "exact",
    loss: str = "huber",
    delta: float | None = None,
    tau: float = 0.5,
    noise: str = "constant",
    bootstrap: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
    holdout_flops: float | None = None,
    source: str = "table",
) -> Comparison:
    """Fits one law to groups of runs jointly and to each apart, and says how much compute each saves over each other.

    The joint law has exponents and floor in common and amplitudes for each group (Volkova et al. 2026, arXiv
    2602.07712, find that laws of optimisers fitted apart are ill-conditioned). With L_g*(C) the least loss of group g
    for C FLOPs, the multiplier of g over h at C is C'/C with L_h*(C') = L_g*(C). FLOPs are each group's own: C buys g
    C / c_g(N) tokens, with c_g (``allocation.Cost``) taken from g's rows under the convention of the fit, so a family
    that spends more on a token of the same N pays for it. For a law of one column x the multiplier is x'/x.

    Args:
      column: of the table, whose values tell the groups apart, in the order in which they come.
      law: a sum of powers of N and D, one of each, or of one column; by default Chinchilla's, or of the table's only
        column of cost.
      level: of the intervals, by a bootstrap that draws cells: rows of the groups that agree in size and horizon (or
        width and budget) are drawn together where all groups have them. ``bootstrap`` 0 takes the delta method.

    Other arguments are those of ``analysis.analyse``.

    Raises:
      ValueError: the column is not there or has one value, a group has too few rows for its amplitudes, losses cannot
        be compared, or the law cannot be fitted; says what would mend it.
    """
    check_resamples("bootstrap", bootstrap)
    table = canonical(table, source)
    column = {old: new for new, old in table.attrs[NAMES].items()}.get(column, column)
    names = rows_by_group.values_of(table, column, source)
    table, unit = rows_by_group.comparable(table, source)
    form = rows_by_group.form_of(table, law, source)
    reading: dict[str, Any] = {"num_params": num_params, "flops": flops, "holdout_flops": holdout_flops}
    rows = {
        name: rows_by_group.rows_of(table[table[column] == value], form, f"{source}, {column}={name}", reading)
        for name, value in names.items()
    }
    groups = [Group(name, o, rows_by_group.cost_of_rows(o, form)) for name, o in rows.items()]
    parts = list(rows.values())
    together = rows_by_group.together(parts, source)
    objective: dict[str, Any] = {"loss": loss, "delta": delta, "tau": tau}
    measured, told_of_noise = run_noise.asked(noise, together, [joint(form, len(groups))], objective)
    if measured is not None:
        objective["variance"] = measured.variance
    fitted = fit(together, joint(form, len(groups)), **objective)
    member = rows_by_group.member_of(parts)
    _require_amplitudes(fitted, form, groups)
    deltas = [fitted.loss.delta * unit for unit in _units(fitted, member, len(groups))]
    groups = [
        replace(g, alone=_alone(g.observations, form, objective | {"delta": delta})) for g, delta in zip(groups, deltas)
    ]
    cells, paired = rows_by_group.cells_of(parts, together)
    draws = None
    if bootstrap:
        strata = np.where(paired, 0, 1 + member)
        counts = resampling.resamples(len(together), bootstrap, seed=seed, clusters=cells, strata=strata)
        draws = resampling.bootstrap(fitted, counts=counts)
        groups = [_drawn(g, counts[:, member == k]) for k, g in enumerate(groups)]
    found = Comparison(
        column=column, source=source, form=form, axis=rows_by_group.axis_of(form), unit=unit, groups=tuple(groups),
        joint=fitted, draws=draws, sharing=_sharing(fitted, groups, member), pairs=(), level=level,
        cells=cells, paired=paired, run_noise=measured, warnings=tuple(told_of_noise),
    )  # fmt: skip
    return _answered(found)


def told(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of a pair's points in fit.json those to write out: the first, middle and last within the fitted rows, and the
    last of all, which lies ``BEYOND`` them."""
    inside = [p for p in points if not p["extrapolated"]]
    chosen = [inside[0], inside[len(inside) // 2], inside[-1]] if inside else []
    return [p for i, p in enumerate([*chosen, points[-1]]) if p not in chosen[:i]]


def prefixes(compared: Mapping[str, Any]) -> tuple[str, str]:
    """Prefixes of a point's value and interval in fit.json's multiplier, those that lead first: of laws that share
    exponents, or, where the test rejects these, of the groups' own ("apart_")."""
    rejected = (compared.get("sharing") or {}).get("rejected", False)
    return ("apart_", "") if rejected else ("", "apart_")


# The words over each, first and second.
HEADS = {("", "apart_"): ("times", "fitted apart"), ("apart_", ""): ("times, fitted apart", "shared, rejected")}


def sentences(compared: Mapping[str, Any]) -> list[str]:
    """What fit.json's multiplier says beside its numbers: whether exponents may be shared, what the forecasts move if
    they are not, and how intervals were found."""
    out, sharing = [], compared["sharing"]
    if sharing:
        q, rest = sharing["degrees_of_freedom"]
        verdict = "is rejected" if sharing["rejected"] else "is not rejected"
        out.append(
            f"One set of exponents for all groups {verdict}: F({q}, {rest}) = {sharing['statistic']:.2f}, "
            f"p {sharing['p_value']:.2g}."
        )
    if compared["moves"]:
        axis = compared["axis"]
        moved = [f"{m['group']} {100 * m['change']:+.2f} % at {m[axis]:.3g}" for m in compared["moves"]]
        out.append(f"Fitted apart, the least loss moves: {', '.join(moved)}.")
    paired = compared["num_cells_paired"]
    if compared["interval_method"] != "delta":
        how = f"{paired} cells that all groups have, drawn whole" if paired else "runs, each group's among its own"
        out.append(f"Intervals by {compared['num_bootstrap']} resamples of {how}.")
    return out


# ---- fitting --------------------------------------------------------------------------------------------------------


# The logarithms of a group's amplitudes must be known to this much (one standard error), exponents and floor given:
# beyond it any split of its loss between size and data fits, and a multiplier is what the fit's bounds make of it.
AMPLITUDES_KNOWN_TO = 0.5


def _require_amplitudes(fitted: Fit, form: Form, groups: Sequence[Group]) -> None:
    """Raises ValueError for a group whose rows do not tell its amplitudes apart, as along one line of size and data."""
    names = [name for name, _ in form.powers.terms]  # type: ignore[union-attr]  # a sum of powers
    noise = max(fitted.residual_rmse, identify.LEAST_NOISE)
    for k, group in enumerate(groups):
        rows = group.observations
        mine = of_group(form, {name: np.atleast_1d(v) for name, v in fitted.params.items()}, k)
        params = {name: float(v[0]) for name, v in mine.items()}
        columns = {c: rows.columns[c] for c in form.columns}
        level, step = np.log(form.predict(params, **columns)), 1e-4
        moved = [np.log(form.predict(params | {n: params[n] * np.exp(step)}, **columns)) - level for n in names]
        least = np.linalg.svd(np.array(moved) / step, compute_uv=False)[-1] if np.isfinite(moved).all() else 0.0
        if len(names) > 1 and noise > AMPLITUDES_KNOWN_TO * least:
            raise ValueError(
                f"{rows.source}: its {len(rows)} runs do not tell its amplitudes apart, and no multiplier is known: "
                "train one at another number of tokens per parameter, far from these"
            )


def _alone(observations: Observations, form: Form, objective: Mapping[str, Any]) -> Fit | None:
    """The law of one group's rows alone; None where they do not identify it."""
    try:
        return fit(observations, joint(form, 1), **objective)
    except ValueError:
        return None


def _units(fitted: Fit, member: np.ndarray, num_groups: int) -> list[float]:
    """The joint fit's unit of noise over that of each group's own fit: the geometric mean of ``noise_at`` its rows."""
    log = np.broadcast_to(np.log(fitted.noise_at(**fitted.observations.columns)), len(member))
    return [float(np.exp(log[member == k].mean())) for k in range(num_groups)]


def _drawn(group: Group, counts: np.ndarray) -> Group:
    """The group with its own law refitted to its part of each resample."""
    if group.alone is None:
        return group
    return replace(group, alone_draws=resampling.bootstrap(group.alone, counts=counts))


def _sharing(fitted: Fit, groups: Sequence[Group], member: np.ndarray) -> Sharing | None:
    """The test of shared exponents; None where a group has too few rows for a law of its own."""
    alone = [g.alone for g in groups if g.alone is not None]
    if len(alone) < len(groups):
        return None
    # A fit's weights have mean 1 over its own rows, as its rows' σ: the groups' are put back on the joint fit's.
    power = -1 if fitted.loss.name == "lad" else -2
    units = _units(fitted, member, len(groups))
    share = [fitted.observations.weight[member == k].mean() * unit**power for k, unit in enumerate(units)]
    apart = sum(w * f.objective for w, f in zip(share, alone))
    rest = sum(f.degrees_of_freedom for f in alone)
    saved = max(fitted.degrees_of_freedom - rest, 1)
    if rest < 1:
        return None
    scale = sum(f.degrees_of_freedom * w * deviance_scale(f) for w, f in zip(share, alone)) / rest
    statistic = max(2.0 * (fitted.objective - apart) / max(scale, 1e-300), 0.0) / saved
    return Sharing(float(statistic), float(stats.f.sf(statistic, saved, rest)), (saved, rest))


# ---- multipliers ----------------------------------------------------------------------------------------------------


def law_of(found: Comparison, params: Params, k: int, place: int) -> LawAtBest:
    """Group k's law from parameters of a joint form in which it is group ``place``."""
    mine = of_group(found.form, {name: np.atleast_1d(v) for name, v in params.items()}, place)
    return LawAtBest(found.form, mine, found.groups[k].cost)


def _answered(found: Comparison) -> Comparison:
    """The comparison with its pairs, what forecasts move, and what a reader must know, in words."""
    num = len(found.groups)
    pairs = tuple(_pair(found, g, h) for h in range(num) for g in range(h + 1, num))
    found = replace(found, pairs=pairs, moves=_moves(found))
    return replace(found, warnings=_warnings(found))


def _spent(found: Comparison) -> list[np.ndarray]:
    """What each group's fitted runs spent, on the axis of the multipliers."""
    return [group.observations.columns[found.axis] for group in found.groups]


def _pair(found: Comparison, g: int, h: int) -> Pair:
    spent = _spent(found)
    at = np.geomspace(spent[g].min(), BEYOND * max(spent[g].max(), spent[h].max()), NUM_POINTS)
    log_x = np.log(at)

    def shared(p: Params) -> np.ndarray:
        return log_multiplier(law_of(found, p, g, g), law_of(found, p, h, h), log_x)

    def same_size(p: Params) -> np.ndarray:
        return log_multiplier_at_size(law_of(found, p, g, g), law_of(found, p, h, h), log_x)

    by_joint, apart = curve(found, shared), _apart(found, g, h, log_x)
    needed = at * (apart.value if apart is not None and found.leads_apart else by_joint.value)
    within = (at <= spent[g].max() * 1.001) & (needed >= spent[h].min() / 1.001) & (needed <= spent[h].max() * 1.001)
    return Pair(
        group=found.groups[g].name,
        over=found.groups[h].name,
        at=at,
        shared=by_joint,
        apart=apart,
        same_size=None if found.groups[g].cost is None else curve(found, same_size),
        extrapolated=~within,
    )


def curve(found: Comparison, log_value: Callable[[Params], np.ndarray]) -> Curve:
    """A multiplier by the joint law, and its interval: percentiles of the resamples, or the delta method's."""
    value = log_value(found.joint.params)[0]
    if found.draws is None:
        _, lower, upper = resampling.delta_interval(found.joint, log_value, found.level)
        return Curve(np.exp(value), np.exp(np.stack([lower, upper], axis=-1)))
    return _widened(found, value, log_value(found.draws.params))


def _widened(found: Comparison, value: np.ndarray, draws: np.ndarray) -> Curve:
    """The multiplier from its logarithm (m,), with the percentiles of its draws (B, m) spread by ``widening``."""
    with np.errstate(invalid="ignore"):
        spread = value + found.widening * (draws - value)
    spread = np.where(np.isfinite(draws) & np.isfinite(value), spread, draws)
    return Curve(np.exp(value), resampling.percentiles(np.exp(spread), found.level))


def _apart(found: Comparison, g: int, h: int, log_x: np.ndarray) -> Curve | None:
    """The multiplier by the groups' own laws; None where one has none. Without resamples it has no interval."""
    one, other = (found.groups[k] for k in (g, h))
    if one.alone is None or other.alone is None:
        return None
    value = log_multiplier(law_of(found, one.alone.params, g, 0), law_of(found, other.alone.params, h, 0), log_x)[0]
    if one.alone_draws is None or other.alone_draws is None:
        return Curve(np.exp(value), np.full((len(log_x), 2), np.nan))
    laws = law_of(found, one.alone_draws.params, g, 0), law_of(found, other.alone_draws.params, h, 0)
    return _widened(found, value, log_multiplier(*laws, log_x))


def _moves(found: Comparison) -> tuple[dict[str, Any], ...]:
    """What each group's own law says of its least loss beyond the joint one, relative."""
    top = max(x.max() for x in _spent(found))
    at = np.array([top, BEYOND * top])
    out = []
    for k, group in enumerate(found.groups):
        if group.alone is None:
            continue
        shared, apart = (law.loss(np.log(at))[0] for law in (law_of(found, found.joint.params, k, k),
                                                             law_of(found, group.alone.params, k, 0)))  # fmt: skip
        out += [
            {
                "group": group.name,
                found.axis: float(x),
                "shared": float(s),
                "apart": float(a),
                "change": float(a / s - 1),
            }
            for x, s, a in zip(at, shared, apart)
        ]
    return tuple(out)


def _warnings(found: Comparison) -> tuple[str, ...]:
    rows = found.joint.observations
    said = [
        *found.warnings,
        *rows.warnings,
        *rows.left_out(),
        *(f"the joint law: not converged: {r}" for r in found.joint.reasons),
    ]
    if found.draws is not None and found.draws.converged < 1:
        said.append(f"{1 - found.draws.converged:.1%} of the joint law's resamples did not converge")
    unpaired, num = int((~found.paired).sum()), len(np.unique(found.cells[found.paired]))
    if unpaired == len(found.cells):
        said.append("no cell has runs of every group: rows are drawn one by one, each group's among its own")
    elif unpaired:
        said.append(f"{num} cells have runs of every group and are drawn whole; {unpaired} runs have no partner")
    if 0 < num < MIN_CLUSTERS and unpaired == 0:
        said.append(f"{num} cells are few to draw from: intervals are too narrow if runs of one cell share an error")
    if found.sharing is None:
        said.append("whether exponents may be shared is not tested: a group has too few runs for a law of its own")
    elif found.sharing.rejected:
        said.append(
            f"exponents shared by all groups do not fit (p {found.sharing.p_value:.2g}): the multiplier changes with "
            "compute as the laws fitted apart have it"
        )
    for group in found.groups:
        if group.cost is not None and group.cost.max_error > allocation.SAID_ERROR:
            said.append(f"{group.name}: {group.cost.describe()} misses the C of a row by {group.cost.max_error:.0%}")
    return tuple(dict.fromkeys(said))
