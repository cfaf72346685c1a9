"""The rounds of a grid's ``design``: which of its cells were bought, and, when these are in, which are bought next.

A choice is in sweep.json before anything of it trains, with its reasons, and is never made again: a call that finds it
goes on with it. What is not bought is a candidate (``Cells.candidates``): it has no part in plan, laws and report.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.config import num_params_of
from scaling.engine.call import Call
from scaling.engine.candidates import Candidates
from scaling.engine.errors import BadInputError, bad_input
from scaling.engine.plan.plan import Means
from scaling.engine.plan.table import Row, size_of, step_flops
from scaling.grid import DesignConfig, FitConfig
from scaling.grid.cell import coordinate
from scaling.numbers import compact
from scaling.records import read_or_empty

if TYPE_CHECKING:
    from scaling.laws.answers.design.orders import Columns, Spread
    from scaling.laws.answers.rounds import Chooser, Cost, Decision


class Rounds:
    """The rounds of one call. Of a grid without a design there are none: every cell is bought from the start.

    ``analyse``: the laws of what is in (``Conclusion.analysis``). Raises BadInputError for a design that cannot be, or
    options that contradict it.
    """

    def __init__(self, call: Call, means: Callable[[], Means], analyse: Callable[[], Any]):
        self._call, self._config = call, call.grid.design
        self._candidates = Candidates(call, means)
        self._rounds: list[dict[str, Any]] = []
        self._stopped: dict[str, Any] | None = None
        if self._config is None:
            return
        self._laws = _Laws(self._config, call.grid.fit, analyse)
        with bad_input():
            _require(call, self._config)
            before = read_or_empty(call.manifest.path).get("design") or {}
            self._rounds = list(before.get("rounds") or [])
            if before.get("stopped") and all(before.get(k) == v for k, v in _asked(self._config).items()):
                self._stopped = before["stopped"]
            bought = [run_id for one in self._rounds for run_id in one["cells"]]
            call.cells.offer(bought if self._rounds else _first_of(call, self._config))
        call.manifest.candidates = lambda: call.cells.candidates
        self._tell_manifest()

    def _tell_manifest(self) -> None:
        asked = _asked(self._config)  # type: ignore[arg-type]  # there is a design
        self._call.manifest.design = {**asked, "rounds": self._rounds, "stopped": self._stopped}

    @property
    def are_over(self) -> bool:
        """Whether no more is bought; so it is from the start where there is no design."""
        return self._config is None or self._stopped is not None

    @property
    def batch(self) -> int:
        """Cells that a later round may have at the most."""
        return 0 if self.are_over else self._config.batch  # type: ignore[union-attr]  # there is a design

    @property
    def _spent(self) -> float:
        return sum(one["cost_flops"] for one in self._rounds)

    def of_them(self, mine: Collection[str]) -> Collection[str]:
        """The cells (run_ids) that a plan is of: ``mine``; of a design those still to train, if there are any."""
        if self._config is None:
            return mine
        rows = self._call.cells.rows
        return [row.run_id for row in rows if not self._call.cells.is_done(row)] or [row.run_id for row in rows]

    def steps(self) -> dict[str, int] | None:
        """Of each cell that is to train, the step that it is at; None where no design asks for it."""
        return None if self._config is None else self._candidates.steps(self._call.cells.rows)

    def begin(self) -> None:
        """Takes the first cells for the first round, once it is known which cells are in: those that have a record
        already, of a call before the grid had a design, are among them.

        Raises BadInputError where the budget is less than these cost.
        """
        if self._config is None or self._rounds:
            return
        cells = self._call.cells
        there = [row.run_id for row in cells.candidates if cells.is_done(row)]
        cells.buy(there)
        rows = [row for row in cells.rows if not row.cell.holdout]
        cost, limit = self._candidates.cost(rows), self._config.budget_flops
        if limit is not None and cost > limit:
            raise BadInputError(
                f"{self._call.options.grid}: design.budget_flops: {limit:g}: the {len(rows)} cells to begin with take "
                f"{cost:.3g}; write more, or design.seed_cells"
            )
        how = "design.seed_cells" if self._config.seed_cells else "the cheapest that identify the law"
        reasons = [how, *([f"{len(there)} more had a record already"] if there else [])]
        self._rounds = [_round([row.run_id for row in rows], cost, 0.0, reasons)]
        self._tell_manifest()

    def advance(self) -> bool:
        """Decides what follows when all that was bought is in, and writes that down; whether there is more to train."""
        call = self._call
        fitted = [row for row in call.cells.rows if not row.cell.holdout]
        if self._config is None or not all(map(call.cells.is_done, fitted)):
            return False
        if self._stopped is None:
            self._decide()
        if self._stopped is not None and "orders" not in self._stopped:
            self._stopped["orders"] = self._orders(fitted)
            self._tell_manifest()
            call.write_manifest(None)
        return self._stopped is None

    def _decide(self) -> None:
        call, said = self._call, self._decision()
        known = {"interval": _finite(*said.interval), "width": _finite(said.width)[0]}
        if said.stop is not None:
            self._stopped = {"reason": said.stop, "spent_flops": self._spent, **known, "reasons": list(said.reasons)}
        else:
            rows = [call.cells.candidates[i] for i in said.chosen]
            chosen, why = [row.run_id for row in rows], [*_why(rows, said), *said.reasons]
            known["width_expected"] = _finite(said.width_expected)[0]
            self._rounds.append(_round(chosen, said.cost, self._spent, why, **known))
            call.cells.buy(chosen)
        self._tell_manifest()
        call.write_manifest(None)
        self.tidy()
        call.say(self.describe())
        call.events({"event": "round", **(self._stopped or self._rounds[-1])})

    def _orders(self, fitted: Sequence[Row]) -> dict[str, Any] | None:
        """What other orders of the cells would have left of the interval (``design.orders``), each priced as if none
        had been trained; None where there is no ratio of widths, or no such law."""
        from scaling.laws.answers.design import orders
        from scaling.laws.payload import finite

        width = (self._stopped or {}).get("width")
        if width is None:
            return None
        every = [*fitted, *self._call.cells.candidates]
        number = {row.run_id: i for i, row in enumerate(every)}
        bought = [number[run_id] for one in self._rounds for run_id in one["cells"] if run_id in number]
        first = sum(run_id in number for run_id in self._rounds[0]["cells"])
        columns, price = _columns(every, self._call.grid.fit), self._candidates.from_nothing(every)
        blind = [i for i in bought if self._call.cells.found.get(every[i].run_id) != "completed"]
        try:
            spread, shared = self._laws.spread(every, columns, blind)
            member = _groups(every, self._call.grid.fit) if self._config.compare else None  # type: ignore[union-attr]
            return finite(orders.compare(spread, columns, price, bought, first, width, shared, member))
        except ValueError:  # no law, which ``_decision`` has said
            return None

    def _decision(self) -> "Decision":
        from scaling.laws.answers import rounds

        config, candidates = self._config, list(self._call.cells.candidates)
        assert config is not None
        goal = rounds.Goal(config.interval, config.budget_flops, config.batch, config.exponent)
        columns, cost = _columns(candidates, self._call.grid.fit), self._candidates.prices(candidates)
        try:
            choose, dof = self._laws.chooser(candidates, columns, cost)
            return rounds.decide(choose, goal, self._spent, len(candidates), dof)
        except ValueError as e:
            if getattr(e, "is_for_good", False):
                return rounds.over(str(e))
            return rounds.cheapest(cost, goal, self._spent, len(candidates), why=str(e))

    def carried(self, rows: Sequence[Row], held_out: Sequence[Row], workers: int) -> list[Row]:
        """Candidates that are left a checkpoint while ``rows`` train, as rows of a later call."""
        return [] if self.are_over else self._candidates.carried(rows, held_out, workers, self.batch)

    def tidy(self) -> None:
        """Removes what was kept for candidates, where the rounds are over."""
        if self._config is not None and self.are_over:
            self._candidates.forget()

    # ---- words ------------------------------------------------------------------------------------------------------

    def about(self, *, is_plan: bool) -> list[str]:
        """What is said of the design before a plan; of one that is not carried out also what it may come to."""
        if self._config is None:
            return []
        cells = self._call.cells
        bought = [row for row in cells.rows if not row.cell.holdout]
        # What the bought cells have had of their cost is in no price any more.
        rest = self._candidates.cost([*bought, *cells.candidates]) - self._candidates.cost(bought)
        ceiling = [_ceiling(self._config, self._spent + rest)] if is_plan and not self.are_over else []
        return [self.describe(), *ceiling]

    def describe(self) -> str:
        """The design in a line: where it is, what it has spent, until when it goes on; empty without one."""
        if self._config is None:
            return ""
        cells = self._call.cells
        if self._stopped is not None:
            how_many = f"{len(self._rounds) - 1} rounds after the first cells"
            return f"design: over after {how_many}, {self._spent:.3g} FLOPs: {self._stopped['reason']}"
        first = [row for row in cells.rows if not row.cell.holdout]
        where = f"{len(first)} cells to begin with, {self._spent or self._candidates.cost(first):.3g} FLOPs"
        if len(self._rounds) > 1:
            where = _where(len(self._rounds) - 1, self._rounds[-1], self._spent)
        following = f"then up to {self._config.batch} of {len(cells.candidates)} candidates a round"
        return f"design: {where}; {following}, until {_until(self._config)}"


@dataclass(frozen=True)
class _Laws:
    """What the laws of the cells that are in say of a design: of one law, or of two groups by the law that they share.

    ``analyse`` gives the laws of all that is in (``Conclusion.analysis``), and raises ValueError without any.
    """

    config: DesignConfig
    fit: FitConfig
    analyse: Callable[[], Any]

    def chooser(self, candidates: Sequence[Row], columns: "Columns", cost: "Cost") -> "tuple[Chooser, int]":
        """Who chooses among candidates, and the degrees of freedom of the fit by which that is. Raises ValueError."""
        from scaling.laws.answers import rounds
        from scaling.laws.answers.design import Target

        config, found = self.config, self.analyse()
        target = Target.of(config.target)
        if config.compare:
            member = _groups(candidates, self.fit)
            choose = rounds.by_proposal_of_groups(found, columns, cost, target, config.compare, member)
            return choose, found.joint.degrees_of_freedom
        if found.surface is None:
            raise ValueError("no law of N and D can be fitted to the cells that are in")
        return rounds.by_proposal(found, columns, cost, target), found.fits[found.surface].degrees_of_freedom

    def spread(self, rows: Sequence[Row], columns: "Columns", blind: Collection[int]) -> "tuple[Spread, float]":
        """How wide the target is after some of ``rows``, the ``blind`` telling nothing, and what of its interval's
        width none of them takes away. Raises ValueError."""
        from scaling.laws.answers.design import Target, orders
        from scaling.laws.answers.design.of_groups import numbers_by_name, spread_of_groups
        from scaling.laws.answers.rounds import LEVEL

        config, found = self.config, self.analyse()
        target = Target.of(config.target)
        if config.compare:
            member = numbers_by_name(found, _groups(rows, self.fit))
            return spread_of_groups(found, config.compare, target, columns, member, blind), 0.0
        return orders.spread_of_target(found, target, columns, blind), target.shared_width(found, LEVEL)


def _groups(rows: Sequence[Row], fit: FitConfig) -> list[str]:
    """The group of each row, of those that the grid compares."""
    return [str(coordinate(row.cell, fit.compare, "fit.compare")) for row in rows]


# ---- what was asked -------------------------------------------------------------------------------------------------


def _asked(config: DesignConfig) -> dict[str, Any]:
    """What a design was to reach: rounds that ended are taken up again where that is another."""
    from scaling.laws.answers.rounds import LEVEL

    asked = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("seed_cells", "compare")}
    return asked | ({"compare": list(config.compare)} if config.compare else {}) | {"level": LEVEL}


def _require(call: Call, config: DesignConfig) -> None:
    """Raises ValueError, in one line, for what rounds cannot go with."""
    from scaling.laws.answers.allocation import Cost
    from scaling.laws.answers.design import Target

    options, path = call.options, call.options.grid
    for name, given in (("--shard", options.shard), ("--only", options.only), ("--drop", options.drop)):
        if given:
            raise ValueError(f"{name}: the rounds of {path} choose among all cells, in one call: leave it out")
    try:
        target = Target.of(config.target)
    except ValueError as e:
        raise ValueError(f"{path}: {str(e).replace('--target is ', 'design.target: ', 1)}") from None
    if (target.name == "multiplier") != bool(config.compare):
        said = "are two groups'; write multiplier@C" if config.compare else "is of two groups; write design.compare"
        raise ValueError(f"{path}: design.target: {target}{', and design.compare' * bool(config.compare)} {said}")
    law = _law(call.grid.fit, path, config)
    if not config.compare and target.quantity(law, Cost()) is None:
        raise ValueError(f"{path}: design.target: {config.target}: {law.name} has none; write another law under fit")


def _law(fit: FitConfig, path: str, config: DesignConfig) -> Any:
    """The law of N and D that a grid's fit names first, of groups the one that they are compared by. Raises
    ValueError."""
    from scaling.laws.analysis import DEFAULT_LAWS
    from scaling.laws.answers import allocation
    from scaling.laws.forms import catalogue

    if config.compare:
        form = catalogue.get((fit.laws or DEFAULT_LAWS)[0])
        has_powers = (
            form.powers is not None and allocation.exponents(form, dict.fromkeys(form.parameters, 1.0)) is not None
        )
        if set(form.columns) != {"num_params", "num_tokens"} or not has_powers:
            raise ValueError(
                f"{path}: fit.laws: groups are compared by the first, {form.name}, which is no sum of a power of N and "
                "one of D; write chinchilla first"
            )
        return form
    for name in fit.laws or DEFAULT_LAWS:
        if ":" in name:
            raise ValueError(
                f"{path}: fit.laws: {name}: a design goes by a law of the catalogue; write chinchilla first"
            )
        form = catalogue.get(name)
        if set(form.columns) == {"num_params", "num_tokens"}:
            return form
    raise ValueError(f"{path}: fit.laws has no law of N and D, which a design goes by; write chinchilla among them")


def _first_of(call: Call, config: DesignConfig) -> list[str]:
    """The cells (run_ids) that a design begins with: those that the grid names, else the cheapest that identify the
    law. Raises ValueError."""
    from scaling.laws.answers import rounds

    if config.seed_cells:
        return list(config.seed_cells)
    path, fit = call.options.grid, call.grid.fit
    every = [row for row in call.cells.rows if not row.cell.holdout]
    names = _groups(every, fit) if config.compare else [""] * len(every)
    first = []
    for name in dict.fromkeys(names):  # a group's own law is what says whether groups share exponents
        rows = [row for row, mine in zip(every, names) if mine == name]
        cost = np.array([step_flops(row.cell.run) * row.plan.num_steps for row in rows])
        chosen = rounds.begin(
            _columns(rows, fit), cost, _law(fit, path, config), f"{path}: design{name and f', {name}'}"
        )
        first += [rows[i].run_id for i in chosen]
    return first


def _columns(rows: Sequence[Row], fit: FitConfig) -> dict[str, np.ndarray]:
    """Where rows are, counted by the fit's conventions."""
    return {
        "num_params": np.array([num_params_of(row.plan.num_params, fit.num_params) for row in rows], dtype=float),
        "num_tokens": np.array([row.plan.num_tokens for row in rows], dtype=float),
        "flops": np.array([row.plan.flops[fit.flops] for row in rows], dtype=float),
    }


# ---- one round ------------------------------------------------------------------------------------------------------


def _round(cells: Sequence[str], cost: float, spent: float, reasons: Sequence[str], **known: Any) -> dict[str, Any]:
    """A round as sweep.json has it; ``spent``: before it; ``known``: what its choice went by."""
    known = {"interval": [None, None], "width": None, "width_expected": None, **known}
    return {"cells": list(cells), **known, "cost_flops": cost, "spent_flops": spent, "reasons": list(reasons)}


def _why(rows: Sequence[Row], said: "Decision") -> list[str]:
    """What each cell of a round is to do, and what it costs."""
    return [
        f"{size_of(row)} on {compact(row.plan.num_tokens)} tokens: {gain:.0%} of the variance for {cost:.3g} FLOPs"
        for row, gain, cost in zip(rows, said.gains, said.costs)
    ]


def _finite(*values: float | None) -> list[float | None]:
    return [float(v) if v is not None and np.isfinite(v) else None for v in values]


def _where(number: int, last: Mapping[str, Any], spent: float) -> str:
    """A round in words: what it buys, and what that is to do."""
    width = "has no limit" if last["width"] is None else f"is {last['width']:.3g} wide"
    expected = "" if last["width_expected"] is None else f", {last['width_expected']:.3g} expected after it"
    bought = f"{len(last['cells'])} cells for {last['cost_flops']:.3g} FLOPs, {spent:.3g} in all"
    return f"round {number}: {bought}; the interval {width}{expected}"


def _ceiling(config: DesignConfig, whole: float) -> str:
    """What a design may come to at the most; ``whole``: with every candidate."""
    if config.budget_flops is None:
        return f"design: at the most {whole:.3g} FLOPs, all candidates: there is no design.budget_flops"
    what = f"all candidates would take {whole:.3g}, held-out cells come beside"
    return f"design: at the most {min(config.budget_flops, whole):.3g} FLOPs; {what}"


def _until(config: DesignConfig) -> str:
    ends = [f"the 90 % interval of {config.target} is at most {config.interval:g} wide"] if config.interval else []
    ends += [f"{config.budget_flops:.3g} FLOPs are spent"] if config.budget_flops else []
    return " or ".join(ends)
