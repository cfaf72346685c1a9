"""How much better one group of runs is than another: the compute multiplier at equal loss, from laws fitted jointly.

``comparison`` asks which form fits one group of rows; here one form is fitted to several groups.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from scaling.laws.answers import allocation
from scaling.laws.answers.allocation import Cost
from scaling.laws.answers.approaches import select
from scaling.laws.fitting.estimate import Draws, Fit, fit
from scaling.laws.forms import catalogue
from scaling.laws.forms.joint import indicator, joint, of_group
from scaling.laws.forms.law import Form, Params
from scaling.laws.intervals import resampling
from scaling.laws.intervals.diagnosis import MIN_CLUSTERS
from scaling.laws.intervals.profile import deviance_scale
from scaling.laws.tables.columns import NAMES, canonical
from scaling.laws.tables.observations import Observations, from_table

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.90
SIGNIFICANCE = 0.05  # of the test of shared exponents
NUM_POINTS = 25
# Multipliers are told this far beyond the largest compute fitted, and marked there.
BEYOND = 10.0
SAME_SIZE = 0.01  # sizes and horizons that differ by less, in log, are those of one cell
NEWTON_STEPS = 30
UNITS = {"flops": "FLOPs", "num_tokens": "tokens", "num_params": "parameters"}  # of what a multiplier counts
# The law where the table has that column alone.
OF_ONE = {"flops": "kaplan_c_offset", "num_tokens": "kaplan_d_offset", "num_params": "kaplan_n_offset"}


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

    @property
    def widening(self) -> float:
        """√(m/(m - 1)), m the cells of the group with fewest: a variance by resamples of m is too small by its square
        (Efron & Tibshirani 1993, §12.5; Hesterberg 2015, §4.3, "narrowness bias")."""
        fewest = min(len(np.unique(self.cells[_member(self.groups) == k])) for k in range(len(self.groups)))
        return math.sqrt(fewest / (fewest - 1))

    def params(self, name: str) -> dict[str, float]:
        """The joint law's parameters for one group, as ``form`` has them."""
        k = [g.name for g in self.groups].index(name)
        return {p: float(v) for p, v in of_group(self.form, self.joint.params, k).items()}

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
    table = canonical(table, source)
    column = {old: new for new, old in table.attrs[NAMES].items()}.get(column, column)
    names = _values(table, column, source)
    table, unit = _comparable(table, source)
    form = _form(table, law, source)
    reading: dict[str, Any] = {"num_params": num_params, "flops": flops, "holdout_flops": holdout_flops}
    rows = {name: _rows(table[table[column] == value], form, f"{source}, {column}={name}", reading)
            for name, value in names.items()}  # fmt: skip
    groups = [Group(name, o, _cost(o, form)) for name, o in rows.items()]
    together = _together([g.observations for g in groups], source)
    objective: dict[str, Any] = {"loss": loss, "delta": delta, "tau": tau}
    fitted = fit(together, joint(form, len(groups)), **objective)
    groups = [replace(g, alone=_alone(g.observations, form, objective | {"delta": fitted.loss.delta})) for g in groups]
    member = _member(groups)
    cells, paired = _cells(groups, together)
    draws = None
    if bootstrap:
        strata = np.where(paired, 0, 1 + member)
        counts = resampling.resamples(len(together), bootstrap, seed=seed, clusters=cells, strata=strata)
        draws = resampling.bootstrap(fitted, counts=counts)
        groups = [_drawn(g, counts[:, member == k]) for k, g in enumerate(groups)]
    found = Comparison(
        column=column, source=source, form=form, axis=_axis(form), unit=unit, groups=tuple(groups), joint=fitted,
        draws=draws, sharing=_sharing(fitted, groups, member), pairs=(), level=level, cells=cells, paired=paired,
    )  # fmt: skip
    return _answered(found)


def told(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of a pair's points in fit.json those to write out: the first, middle and last within the fitted rows, and the
    last of all, which lies ``BEYOND`` them."""
    inside = [p for p in points if not p["extrapolated"]]
    chosen = [inside[0], inside[len(inside) // 2], inside[-1]] if inside else []
    return [p for i, p in enumerate([*chosen, points[-1]]) if p not in chosen[:i]]


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


# ---- reading --------------------------------------------------------------------------------------------------------


def _values(table: "pd.DataFrame", column: str, source: str) -> dict[str, Any]:
    """The values of the compared column by their names, in order. Raises ValueError unless there are two or more."""
    if column not in table:
        raise ValueError(f"{source}: compare is {column!r}, which is no column (there is {', '.join(map(str, table))})")
    missing = table[column].isna()
    if missing.any():
        raise ValueError(f"{source}: row {int(np.argmax(missing)) + 1} has no {column}: write one, or take the row out")
    values = {str(value): value for value in table[column].unique()}
    if len(values) < 2:
        raise ValueError(
            f"{source}: {column} is {next(iter(values))} in every row: nothing to compare; write a column that tells "
            "the runs apart"
        )
    return values


def _comparable(table: "pd.DataFrame", source: str) -> tuple["pd.DataFrame", str]:
    """The table with the loss that its groups have in common as ``loss``, and its unit.

    Raises ValueError where they have none: of other objectives, on other text, or per token of other tokenizers without
    bits per byte.
    """
    done = table[table["status"] == "completed"] if "status" in table else table

    def kinds(name: str) -> list[str]:
        return [str(v)[:40] for v in done[name].dropna().unique()] if name in done else []

    if len(found := kinds("objective")) > 1:
        raise ValueError(
            f"{source}: losses of {' and '.join(found)} do not measure the same thing: compare runs of one objective, "
            "or write as loss what means the same of all, such as a task's error rate"
        )
    if len(kinds("started")) > 1:
        raise ValueError(
            f"{source}: some runs start from another's weights, whose compute is not in theirs: compare runs that all "
            "start so, or none"
        )
    if len(texts := kinds("data_source") or kinds("data")) > 1:
        raise ValueError(f"{source}: losses on {' and '.join(texts)} are of other text: compare runs validated on one")
    tokenizers = kinds("tokenizer")
    if len(tokenizers) < 2:
        if len(states := kinds("data")) > 1:
            raise ValueError(
                f"{source}: losses on {len(states)} states of {texts[0]} ({' and '.join(x[:12] for x in states)}): "
                "compare runs validated on one"
            )
        return table, "nats per token"
    bits = next((c for c in ("bits_per_byte", "bpb") if c in done), None)
    if bits is None or not (done[bits] > 0).all():
        raise ValueError(
            f"{source}: losses per token of {' and '.join(tokenizers)} do not compare, their tokens are of other "
            "lengths: compare bits per byte, in a column bits_per_byte"
        )
    return table.assign(loss=table[bits]), "bits per byte"


def _form(table: "pd.DataFrame", law: "str | Form | None", source: str) -> Form:
    """The law that is asked for, or the usual one of the table's columns. Raises ValueError for one that cannot be."""
    sized = any(str(c).startswith("num_params") for c in table)
    if law is None:
        law = "chinchilla" if sized else OF_ONE["flops" if "flops" in table else "num_tokens"]
    form = catalogue.get(law)
    ones = {name: np.ones(1) for name in form.parameters}
    of_both = set(form.columns) == {"num_params", "num_tokens"} and form.powers is not None
    of_one = len(form.columns) == 1 and form.columns[0] in OF_ONE and form.powers is not None
    if not (of_one or (of_both and allocation.exponents(form, ones) is not None)):
        raise ValueError(
            f"{source}: no multiplier by {form.name}, which is not a power of N and one of D, or one alone: write "
            f"--law chinchilla, chinchilla_tied or {', '.join(OF_ONE.values())}"
        )
    return form


def _axis(form: Form) -> str:
    return form.columns[0] if len(form.columns) == 1 else "flops"


def _rows(part: "pd.DataFrame", form: Form, source: str, reading: Mapping[str, Any]) -> Observations:
    """The rows of one group that are fitted. Raises ValueError where they are too few for its amplitudes."""
    found = from_table(part, **reading, source=source, columns=form.columns, sized=len(form.columns) > 1)
    if {"num_params", "num_tokens"} <= set(found.columns):
        found = found.take(select(found, form)[0])
    needed = len(form.powers.terms) + 1  # type: ignore[union-attr]  # a sum of powers
    if len(found) < needed:
        what = "amplitude" if needed == 2 else f"{needed - 1} amplitudes"
        raise ValueError(f"{source}: {len(found)} fitted runs, too few for its {what}: {needed} or more are needed")
    return found


def _cost(observations: Observations, form: Form) -> Cost | None:
    """What a token costs in this group; None of a law of one column. Raises ValueError for FLOPs that are none."""
    if len(form.columns) == 1:
        return None
    columns = observations.columns
    cost = allocation.cost_of(columns["num_params"], columns["num_tokens"], columns["flops"])
    if cost.problem:
        raise ValueError(f"{observations.source}: no compute multiplier: {cost.problem}")
    return cost


def _together(parts: Sequence[Observations], source: str) -> Observations:
    """All groups' rows, with the columns that say whose each is."""
    shared = [c for c in parts[0].columns if all(c in o.columns for o in parts)]
    columns = {c: np.concatenate([o.columns[c] for o in parts]) for c in shared}
    member = np.repeat(np.arange(len(parts)), [len(o) for o in parts])
    columns |= {indicator(k): np.where(member == k, np.e, 1.0) for k in range(1, len(parts))}
    rows = {name: np.concatenate([getattr(o, name) for o in parts]) for name in ("loss", "weight", "run", "budget")}
    return Observations(
        columns=columns,
        **rows,
        source=source,
        convention=parts[0].convention,
        excluded=[row for o in parts for row in o.excluded],
        warnings=tuple(dict.fromkeys(w for o in parts for w in o.warnings)),
        run_column=parts[0].run_column,
    )


def _member(groups: Sequence[Group]) -> np.ndarray:
    """Which group each row of ``_together`` is of, (n,)."""
    return np.repeat(np.arange(len(groups)), [len(g.observations) for g in groups])


def _cells(groups: Sequence[Group], together: Observations) -> tuple[np.ndarray, np.ndarray]:
    """The cell of each row (n,), by number, and whether all groups have it, (n,). A row without partners is a cell of
    its own.

    Rows are of one cell where they agree in size and horizon, or, of records whose groups count other sizes at one
    width, in width and budget. Seeds of one cell are drawn together.
    """
    member, n = _member(groups), len(together)
    cells, most = np.arange(n), np.zeros(n, dtype=bool)
    budget = together.budget if np.isfinite(together.budget).all() else None
    size = [together.columns[c] for c in ("num_params", "num_tokens") if c in together.columns]
    keys = [size or [together.columns["flops"]]]
    if "d_model" in together.columns:
        horizon = budget if budget is not None else together.columns["num_tokens"]
        keys.append([together.columns["d_model"], horizon])
    for key in keys:
        place = np.unique([_numbered(x) for x in key], axis=1, return_inverse=True)[1].ravel()
        seen = np.zeros((place.max() + 1, len(groups)), dtype=bool)
        seen[place, member] = True
        paired = np.asarray(seen.all(axis=1))[place]
        if paired.sum() > most.sum():
            cells, most = np.where(paired, place, place.max() + 1 + np.arange(n)), paired
    return cells, most


def _numbered(x: np.ndarray) -> np.ndarray:
    """Numbers values so that those nearer than ``SAME_SIZE`` to the next are one."""
    order = np.argsort(x, kind="stable")
    out = np.empty(len(x), dtype=int)
    out[order] = np.cumsum(np.diff(np.log(x[order]), prepend=np.log(x[order[0]])) > SAME_SIZE)
    return out


# ---- fitting --------------------------------------------------------------------------------------------------------


def _alone(observations: Observations, form: Form, objective: Mapping[str, Any]) -> Fit | None:
    """The law of one group's rows alone; None where they do not identify it."""
    try:
        return fit(observations, joint(form, 1), **objective)
    except ValueError:
        return None


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
    # A fit's weights have mean 1 over its own rows: the groups' are put back on the joint fit's.
    share = [fitted.observations.weight[member == k].mean() for k in range(len(groups))]
    apart = sum(w * f.objective for w, f in zip(share, alone))
    rest = sum(f.degrees_of_freedom for f in alone)
    saved = max(fitted.degrees_of_freedom - rest, 1)
    if rest < 1:
        return None
    scale = sum(f.degrees_of_freedom * w * deviance_scale(f) for w, f in zip(share, alone)) / rest
    statistic = max(2.0 * (fitted.objective - apart) / max(scale, 1e-300), 0.0) / saved
    return Sharing(float(statistic), float(stats.f.sf(statistic, saved, rest)), (saved, rest))


# ---- multipliers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Law:
    """A law of one group with parameters (B,): the least loss for what is paid, and its inverse."""

    form: Form
    params: Params  # of ``form``, each (B,)
    cost: Cost | None

    @property
    def floor(self) -> np.ndarray:
        """E, (B, 1); 0 of a law without one."""
        offset = self.form.powers.offset  # type: ignore[union-attr]  # a sum of powers
        some = next(iter(self.params.values()))
        return (np.zeros_like(some) if offset is None else self.params[offset])[:, None]

    def terms(self) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(log amplitude (B, 1), {column: exponent (B, 1)}) of each power."""
        return allocation.powers(self.form, {k: v[:, None] for k, v in self.params.items()})  # type: ignore[return-value]  # it has

    def best_size(self, log_x: np.ndarray) -> np.ndarray:
        """log N* for what is paid, (B, m)."""
        return np.log(allocation.optimal_num_params(self.form, self.params, np.exp(log_x), self.cost))  # type: ignore[arg-type]  # of N and D

    def excess(self, log_x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log (L* - E) and its slope in log x, (B, m) each, for log x paid. At the optimum's own size the slope is
        that of tokens alone."""
        terms = self.terms()
        if self.cost is None:
            ((log_a, exponents),) = terms
            alpha = next(iter(exponents.values()))
            return log_a - alpha * log_x, np.broadcast_to(-alpha, np.broadcast_shapes(alpha.shape, log_x.shape))
        log_n = self.best_size(log_x)
        columns = {"num_params": log_n, "num_tokens": log_x - self.cost.log_flops_per_token(log_n)}
        logs = {next(iter(e)): log_a - next(iter(e.values())) * columns[next(iter(e))] for log_a, e in terms}
        beta = next(e["num_tokens"] for _, e in terms if "num_tokens" in e)
        total = np.logaddexp(logs["num_params"], logs["num_tokens"])
        return total, -beta * np.exp(logs["num_tokens"] - total)

    def loss(self, log_x: np.ndarray) -> np.ndarray:
        return self.floor + np.exp(self.excess(log_x)[0])

    def log_paid(self, loss: np.ndarray, start: np.ndarray) -> np.ndarray:
        """log x at which the least loss is ``loss``, (B, m), by Newton's steps on log (L* - E), which is all but a
        straight line in log x; inf where the law's floor lies above it."""
        with np.errstate(all="ignore"):
            target = np.log(loss - self.floor)
            x = np.broadcast_to(start, loss.shape).astype(np.float64)
            for _ in range(NEWTON_STEPS):
                value, slope = self.excess(x)
                step = (target - value) / slope
                x = x + step
                if not (np.abs(step) > 1e-12 * np.maximum(np.abs(x), 1.0)).any():
                    break
        return np.where(loss > self.floor, x, np.inf)

    def log_paid_at_size(self, loss: np.ndarray, log_n: np.ndarray) -> np.ndarray:
        """log C at which a model of this size has the loss; inf where no tokens bring it there."""
        (of_n, of_d) = (next(t for t in self.terms() if c in t[1]) for c in ("num_params", "num_tokens"))
        with np.errstate(all="ignore"):
            rest = loss - self.floor - np.exp(of_n[0] - of_n[1]["num_params"] * log_n)
            log_d = (of_d[0] - np.log(rest)) / of_d[1]["num_tokens"]
        return np.where(rest > 0, log_d + self.cost.log_flops_per_token(log_n), np.inf)  # type: ignore[union-attr]  # of N and D


def log_multiplier(group: _Law, over: _Law, log_x: np.ndarray) -> np.ndarray:
    """log of what ``over`` pays for the loss that ``group`` has for x, over x, (B, m)."""
    return over.log_paid(group.loss(log_x), log_x) - log_x


def _at_same_size(group: _Law, over: _Law, log_x: np.ndarray) -> np.ndarray:
    """The same where ``over`` trains a model of the size that is best for ``group``, (B, m)."""
    return over.log_paid_at_size(group.loss(log_x), group.best_size(log_x)) - log_x


def _law(found: Comparison, params: Params, k: int, place: int) -> _Law:
    """Group k's law from parameters of a joint form in which it is group ``place``."""
    mine = of_group(found.form, {name: np.atleast_1d(v) for name, v in params.items()}, place)
    return _Law(found.form, mine, found.groups[k].cost)


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
        return log_multiplier(_law(found, p, g, g), _law(found, p, h, h), log_x)

    def same_size(p: Params) -> np.ndarray:
        return _at_same_size(_law(found, p, g, g), _law(found, p, h, h), log_x)

    curve = _curve(found, shared)
    needed = at * curve.value
    outside = (at > spent[g].max() * 1.001) | (needed < spent[h].min() / 1.001) | (needed > spent[h].max() * 1.001)
    return Pair(
        group=found.groups[g].name,
        over=found.groups[h].name,
        at=at,
        shared=curve,
        apart=_apart(found, g, h, log_x),
        same_size=None if found.groups[g].cost is None else _curve(found, same_size),
        extrapolated=outside,
    )


def _curve(found: Comparison, log_value: Callable[[Params], np.ndarray]) -> Curve:
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
    value = log_multiplier(_law(found, one.alone.params, g, 0), _law(found, other.alone.params, h, 0), log_x)[0]
    if one.alone_draws is None or other.alone_draws is None:
        return Curve(np.exp(value), np.full((len(log_x), 2), np.nan))
    laws = _law(found, one.alone_draws.params, g, 0), _law(found, other.alone_draws.params, h, 0)
    return _widened(found, value, log_multiplier(*laws, log_x))


def _moves(found: Comparison) -> tuple[dict[str, Any], ...]:
    """What each group's own law says of its least loss beyond the joint one, relative."""
    top = max(x.max() for x in _spent(found))
    at = np.array([top, BEYOND * top])
    out = []
    for k, group in enumerate(found.groups):
        if group.alone is None:
            continue
        shared, apart = (law.loss(np.log(at))[0] for law in (_law(found, found.joint.params, k, k),
                                                             _law(found, group.alone.params, k, 0)))  # fmt: skip
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
    said = [*rows.warnings, *rows.left_out(), *(f"the joint law: not converged: {r}" for r in found.joint.reasons)]
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
