"""The command that designs: a fitted law, what is to be known better and what runs cost → the next runs.

    python -m scaling.design GRID.yaml --target a --budget 8e13 --batch 4
    python -m scaling.design SOURCE --sizes 1e6 1e7 1e8 --tokens 1e8 1e9 --target loss@1e21 --interval .05
    python -m scaling.design GRID.yaml --target multiplier@1e14 --compare transformer lstm --batch 4

Of a grid the candidates are its cells without a record, at the plan's prices; of another SOURCE (what
``python -m scaling.fit`` reads) sizes × tokens or budgets; of a multiplier those of both groups. From Python the same
is ``design(fit, target="a", …)`` of the package: the module itself can be called.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling import fit as fitting
from scaling import grid, records, storage, terminal
from scaling.advise import (
    Called,
    Machine,
    add_fit,
    add_hardware,
    amount,
    check_numbers,
    column_of,
    of_source,
    pair_of,
    resamples_of,
    seconds,
    write_json,
)  # fmt: skip
from scaling.config import num_params_of
from scaling.laws.analysis import Analysis, analyse
from scaling.laws.answers.allocation import Cost, cost_of
from scaling.laws.answers.design import Candidates, Proposal, Target, propose, propose_of_groups
from scaling.laws.answers.design.mending import identifying
from scaling.laws.answers.design.of_groups import numbers_of, require_sizes
from scaling.laws.answers.design.proposal import EXPONENT, check_asked
from scaling.laws.answers.multiplier import Comparison, compare
from scaling.laws.fitting.identify import NotIdentified
from scaling.laws.forms import catalogue
from scaling.laws.tables.observations import from_table
from scaling.report import printed

if TYPE_CHECKING:
    from scaling.engine.plan.prices import Prices

UNITS = ("FLOPs", "hours", "dollars")
LAWS = ("chinchilla",)


def design(
    fit: Any, *, target: str = "a", sizes: Sequence[float] = (), tokens: Sequence[float] = (),
    budgets: Sequence[float] = (), candidates: Candidates | None = None, **options: Any,
) -> Proposal:  # fmt: skip
    """Proposes the runs that narrow a target of a fitted law most for their cost (``design.propose``).

    Args:
      fit: of a study (``study.Study.fit``), or an ``analysis.Analysis``.
      target: a, allocation@C, loss@C, loss@N,D or E; what two groups are worth to each other is
        ``design.propose_of_groups``.
      sizes: of the candidates, × ``tokens`` or × compute ``budgets``; or the ``candidates`` themselves.
      options: batch, exponent, budget (in the candidates' unit, FLOPs of sizes), level, asked (a width).

    Raises:
      ValueError: no candidates, no such target, or a law that has none; says what to write.
    """
    found: Analysis = getattr(fit, "analysis", fit)
    if candidates is None:
        candidates = of_sizes(found.cost, sizes, tokens, budgets)
    return propose(found, candidates, Target.of(target), **options)


def of_sizes(
    cost: Cost, sizes: Sequence[float], tokens: Sequence[float], budgets: Sequence[float],
    unit: str = "FLOPs", machine: Machine | None = None, devices: float = 1.0, called: str = "",
) -> Candidates:  # fmt: skip
    """Sizes × tokens, or sizes × FLOP budgets under the rows' own ``cost`` of a token, as candidates ``called`` so.

    Their cost is in FLOPs, or in hours of ``devices`` of ``machine`` or dollars there. Raises ValueError.
    """
    if not len(sizes) or bool(len(tokens)) == bool(len(budgets)):
        raise ValueError("candidates of a table are --sizes with --tokens or with --budgets: write two of them")
    n, other = (x.ravel() for x in np.meshgrid(np.unique(sizes), np.unique(tokens or budgets), indexing="ij"))
    if not (np.isfinite(n) & (n > 0) & np.isfinite(other) & (other > 0)).all():
        raise ValueError("--sizes, --tokens and --budgets are positive numbers: write 1e6, 13M, 2T")
    a_token = cost.flops_per_token(n)
    d = other if len(tokens) else other / a_token
    return Candidates(
        {"num_params": n, "num_tokens": d, "flops": d * a_token},
        tuple(f"{called}{size:.4g} on {data:.4g}" for size, data in zip(n, d)),
        _alone(_priced(n, d * a_token, unit, machine, devices)), unit,
    )  # fmt: skip


def _alone(costs: np.ndarray) -> Any:
    return lambda chosen: float(costs[list(chosen)].sum())


def _priced(n: np.ndarray, flops: np.ndarray, unit: str, machine: Machine | None, devices: float) -> np.ndarray:
    if unit == "FLOPs":
        return flops
    if machine is None:
        raise ValueError(f"{unit} are counted on hardware: add --hardware")
    device_seconds = flops / machine.rate(n)
    return device_seconds / devices / 3600 if unit == "hours" else device_seconds * machine.paid()


# ---- a grid ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """What a design takes of a grid: its laws' rows and options, and the cells without a record, by number; where
    groups are told apart, ``by`` what, and the name of each candidate's (``group``)."""

    table: Any
    curves: Any
    options: dict[str, Any]
    candidates: Candidates
    notes: tuple[str, ...] = ()
    by: str = ""
    group: tuple[str, ...] = ()


def of_grid(
    path: str, results: Path | None, workdir: Path | None, unit: str, hardware: dict[str, Any], *,
    groups: bool = False, by: str | None = None,
) -> Cells:  # fmt: skip
    """The records of a grid, and its fitted cells that have none as candidates at the plan's prices.

    Steps that a checkpoint in ``workdir`` has are not paid again. ``groups``: a target of several is asked, which the
    coordinate ``by`` tells apart, or the grid's own. Raises ValueError.
    """
    from scaling import data
    from scaling.engine.folder import cells as folder

    known = grid.load(path, data.epochs_of(storage.cache_dir()))
    by = by or (known.fit.told_by[0] if known.fit.told_by else "")
    if known.groups and not groups:
        raise ValueError(
            f"{path}: its laws are apart by {by}: write a grid of one group, or --target multiplier@C, which is of two"
        )
    if groups and not by:
        raise ValueError(f"{path}: it tells no groups apart: add --by, the coordinate whose values they are")
    cells = folder.Cells(known, results or Path("results") / known.name)
    complaints = cells.look(set_aside=False)
    runs = cells.recorded()
    if not any(run.status == "completed" for run in runs):
        raise ValueError(
            f"{cells.results}: no cell of {path} is completed, and a design narrows what a fit knows: train some of "
            "them first, python -m scaling.sweep --only"
        )
    open_ = [row for row in cells.rows if not (row.cell.holdout or cells.is_done(row))]
    rows = [row for row in open_ if row.cell.run.start is None]
    notes = list(complaints)
    if len(rows) < len(open_):
        notes.append(f"{len(open_) - len(rows)} cells start from another's weights: no candidates, they are of no law")
    counts = known.fit
    columns = {
        "num_params": np.array([num_params_of(row.plan.num_params, counts.num_params) for row in rows], dtype=float),
        "num_tokens": np.array([row.plan.num_tokens for row in rows], dtype=float),
        "flops": np.array([row.plan.flops[counts.flops] for row in rows], dtype=float),
    }
    labels = tuple(f"{row.run_id} {_named(row.cell.labels)}".rstrip() for row in rows)
    cost = _prices(known, rows, cells.rows, workdir or Path(".scaling") / known.name, unit, hardware)
    laws = _of_both(counts.laws) if not groups else counts.laws[:1] if counts.laws else ()  # as the sweep compares
    options = {**counts.options, "laws": laws, "source": str(cells.results)}
    table = records.table(runs)
    group: tuple[str, ...] = ()
    if groups:
        found = [grid.cell.coordinate(row.cell, by, f"{path}: --by") for row in rows]
        if None in found:
            raise ValueError(f"{path}: --by is {by}, which is a section or not of every cell: write one value of each")
        table = records.with_coordinate(table, runs, by)
        group = tuple(map(str, found))
    candidates = Candidates(columns, labels, cost, unit)
    return Cells(table, records.curves(runs), options, candidates, tuple(notes), by, group)


def _of_both(laws: Sequence[str] | None) -> tuple[str, ...]:
    """Those of ``laws`` that are of two columns, N and D, whose target a design narrows."""
    return tuple(name for name in laws or LAWS if len(catalogue.get(name).columns) == 2) or LAWS


def _named(labels: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in labels.items()
    )


def _prices(
    known: grid.Grid, rows: Sequence[Any], every: Sequence[Any], workdir: Path, unit: str, hardware: dict[str, Any]
) -> "Prices":
    from scaling import machine
    from scaling.engine.options import hardware_named
    from scaling.engine.plan.plan import Means
    from scaling.engine.plan.prices import Prices
    from scaling.engine.plan.timings import TimingCache
    from scaling.engine.run.workers import auto_workers

    on = hardware_named(hardware, known.hardware, has_accelerator=machine.has_accelerator())
    means = Means(
        hardware=on, known=TimingCache(storage.cache_dir(), "auto", known.execution).load(),
        trunks=known.execution.trunks, workers=auto_workers if on.is_here else lambda num_packs: 1, pack_sizes=1,
        disk_bytes=math.inf, kept_bytes=lambda training: 0,
    )  # fmt: skip
    steps = {}
    if workdir.exists():
        from scaling.training import checkpoint

        steps = {row.run_id: checkpoint.newest_step(workdir, row.run_id) for row in rows}
    return Prices(rows, means, unit, steps, every)


# ---- the command ----------------------------------------------------------------------------------------------------


@terminal.outliving_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return fitting.on_source(_run, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scaling.design", description="The next runs: those that narrow an interval most for their cost."
    )
    parser.add_argument("source", metavar="SOURCE|GRID", help="a grid with records, or as of python -m scaling.fit")
    add = parser.add_argument
    add("--target", required=True, help="a (β/(α+β)), allocation@C, loss@C, loss@N,D, E, or of two groups multiplier@C")
    add("--compare", nargs=2, metavar=("GROUP", "OVER"), help="of a multiplier: at C FLOPs of GROUP")
    add("--by", metavar="COLUMN", help="whose values these are (default: as the grid, or the folder's fit, has it)")
    add("--budget", type=spending, metavar="X", help="the most that the runs may cost: 1e15 (FLOPs), 12h or 500usd")
    add("--cost", choices=UNITS, help="what costs are counted in (default: as the budget, else FLOPs)")
    add("--batch", type=int, default=1, metavar="K", help="how many runs, each given those before it (default: 1)")
    add(
        "--interval",
        type=float,
        metavar="W",
        help="a width to reach: of an allocation that of log N, of a multiplier of its log",
    )
    add("--level", type=float, default=0.9, help="of the interval (default: .9)")
    add("--exponent", type=float, default=EXPONENT, help=f"κ of gain / cost^κ (default: {EXPONENT})")
    add("--sizes", type=amount, nargs="+", default=[], metavar="N", help="candidates of a table: these sizes …")
    add("--tokens", type=amount, nargs="+", default=[], metavar="D", help="… on each of these tokens")
    add("--budgets", type=amount, nargs="+", default=[], metavar="C", help="… or at each of these FLOPs")
    add("--results", metavar="DIR", help="of a grid (default: results/<grid's name>)")
    add("--workdir", metavar="DIR", help="where its checkpoints are (default: .scaling/<grid's name>)")
    add_hardware(parser)
    add_fit(parser)
    return parser


def spending(text: str) -> tuple[float, str]:
    """A budget and its unit: 1e15 or 2T are FLOPs, 12h and 3d hours, 500usd dollars."""
    money = re.fullmatch(r"(.+?)\s*(usd|dollars|\$)", text, re.IGNORECASE)
    if money is not None:
        return amount(money[1]), "dollars"
    if re.fullmatch(r"[\d.eE+]+\s*[smhdw]", text):
        return seconds(text) / 3600, "hours"
    return amount(text), "FLOPs"


def _run(arguments: argparse.Namespace) -> None:
    target, (budget, unit) = Target.of(arguments.target), arguments.budget or (None, arguments.cost or "FLOPs")
    if arguments.cost not in (None, unit):
        raise ValueError(f"--cost is {arguments.cost} and --budget is in {unit}: write one unit")
    if not 0 < arguments.level < 1:
        raise ValueError(f"--level is {arguments.level}: write a share, as .9")
    asked: dict[str, Any] = {"batch": arguments.batch, "exponent": arguments.exponent}
    asked |= {"budget": budget, "asked": arguments.interval}
    check_asked(**asked)
    of_groups = target.name == "multiplier"
    if not of_groups and (arguments.compare or arguments.by):
        raise ValueError(f"--compare and --by are of --target multiplier@C, and it is {target}: leave them out")
    if of_groups and not arguments.compare:
        raise ValueError(f"--target is {target}: add --compare GROUP OVER, the two groups that it is of")
    if of_groups:
        if arguments.law and len(arguments.law) > 1:
            raise ValueError(f"--law is {' '.join(arguments.law)}: groups are compared by one law: write one")
        pair, column = pair_of(arguments.compare, arguments.by)
        compared, candidates, member, notes = _of_groups(arguments, unit, pair, column)
        source = compared.source
        proposal = propose_of_groups(compared, pair, candidates, member, target, **asked)
    else:
        found, candidates, notes = _of(arguments, unit)
        source = found.observations.source
        proposal = propose(found, candidates, target, level=arguments.level, **asked)
    printed.show_proposal(terminal.console(sys.stdout, width=160, fold=False), proposal, candidates, source)
    for note in notes:
        print(f"note {note}")
    if arguments.json:
        chosen = [*proposal.steps, *([proposal.next] if proposal.next else [])]
        rows = {s.candidate: {"label": candidates.labels[s.candidate],
                **{c: x[s.candidate] for c, x in candidates.columns.items()}} for s in chosen}  # fmt: skip
        write_json(arguments.json, {**proposal.to_json(), "candidates": rows})


def _is_grid(arguments: argparse.Namespace) -> bool:
    return Path(arguments.source).suffix in (".yaml", ".yml")


def _hardware(arguments: argparse.Namespace) -> dict[str, Any]:
    """What FLOPs are counted on, and whether SOURCE goes with the options of the other kind. Raises ValueError."""
    on = {name: getattr(arguments, name) for name in ("hardware", "devices", "price", "mfu")}
    check_numbers({name: v for name, v in on.items() if v is not None})
    if not _is_grid(arguments):
        if arguments.results or arguments.workdir:
            raise ValueError("--results and --workdir are a grid's: write the grid as SOURCE, or leave them out")
        return on
    if arguments.sizes or arguments.tokens or arguments.budgets:
        raise ValueError(f"{arguments.source}: its cells are the candidates: leave out --sizes, --tokens, --budgets")
    if on["devices"] is not None:
        if on["devices"] != int(on["devices"]):
            raise ValueError(f"--devices is {on['devices']:g}: write a whole number")
        on["devices"] = int(on["devices"])
    return on


def _cells(arguments: argparse.Namespace, unit: str, **groups: Any) -> tuple[Cells, dict[str, Any]]:
    """A grid's cells, and the options of their fit."""
    on = _hardware(arguments)
    results, workdir = (None if x is None else storage.folder(x) for x in (arguments.results, arguments.workdir))
    of = of_grid(arguments.source, results, workdir, unit, on, **groups)
    laws = {"laws": tuple(arguments.law)} if arguments.law else {}
    return of, {**of.options, **laws, **resamples_of(arguments)}


def _sized(arguments: argparse.Namespace, unit: str) -> Callable[..., Candidates]:
    """``of_sizes`` with all but the cost of a token given."""
    on = _hardware(arguments)
    machine = None if on["hardware"] is None else Machine(on["hardware"], on["price"], on["mfu"])
    given = (arguments.sizes, arguments.tokens, arguments.budgets, unit, machine, on["devices"] or 1.0)
    return lambda cost, called="": of_sizes(cost, *given, called=called)


def _of(arguments: argparse.Namespace, unit: str) -> tuple[Analysis, Candidates, tuple[str, ...]]:
    """The fit, the candidates, and what to say of them."""
    if _is_grid(arguments):
        of, options = _cells(arguments, unit)
        return _fitted(of.table, of.curves, of.candidates, options), of.candidates, of.notes
    sized = _sized(arguments, unit)
    source, options = of_source(arguments)
    table, curves, _ = fitting.read(source)
    options["laws"] = arguments.law or _of_both(options.get("laws"))
    found = _fitted(table, curves, sized, options)
    return found, sized(found.cost), ()


def _of_groups(
    arguments: argparse.Namespace, unit: str, pair: tuple[str, str], column: str | None
) -> tuple[Comparison, Candidates, np.ndarray, tuple[str, ...]]:
    """The groups compared, the candidates, the group of each by its number, and what to say of them.

    ``pair`` and ``column`` are those of ``advise.pair_of``; a grid or a folder says the column where they do not.
    """
    if _is_grid(arguments):
        of, options = _cells(arguments, unit, groups=True, by=column)
        there = set(of.table[of.table["status"] == "completed"][of.by].astype(str))
        apart = [name for name in dict.fromkeys(of.group) if name not in there]
        for name in set(pair) & set(apart):
            raise ValueError(f"{arguments.source}: no run of {name} is completed: train some first, "
                             "python -m scaling.sweep --only")  # fmt: skip
        compared = compare(of.table, of.by, level=arguments.level, **fitting.compared_as(options))
        numbers = {group.name: k for k, group in enumerate(compared.groups)}
        known = [i for i, name in enumerate(of.group) if name in numbers]
        member = np.array([numbers[of.group[i]] for i in known], dtype=int)
        notes = [
            f"{of.group.count(name)} cells of {name} are no candidates: no run of it is completed" for name in apart
        ]
        return compared, of.candidates.take(known), member, (*of.notes, *notes)
    sized = _sized(arguments, unit)
    source, options = of_source(arguments)
    column = column or column_of(source, pair)
    table = fitting.read(source, column)[0]
    compared = compare(table, column, level=arguments.level, **fitting.compared_as(options))
    numbered = numbers_of(compared, pair)
    require_sizes(compared)
    parts = [sized(compared.groups[k].cost, f"{compared.groups[k].name}: ") for k in numbered]
    member = np.repeat(numbered, [len(part) for part in parts])
    columns = {c: np.concatenate([part.columns[c] for part in parts]) for c in parts[0].columns}
    costs = np.array([part.cost([i]) for part in parts for i in range(len(part))])
    labels = tuple(label for part in parts for label in part.labels)
    return compared, Candidates(columns, labels, _alone(costs), unit), member, ()


def _fitted(table: Any, curves: Any, candidates: Any, options: dict[str, Any]) -> Analysis:
    """The analysis. Raises ValueError, where these rows determine no law with the candidate that would mend it."""
    try:
        return analyse(table, curves, **options)
    except NotIdentified as e:
        raise ValueError(f"{e}{_mending(table, candidates, options)}") from None


def _mending(table: Any, candidates: Any, options: dict[str, Any]) -> str:
    """In words, the one candidate that would let the rows determine the law; empty where the rows cannot be read, or
    the law is of more than candidates say."""
    reading = {k: options[k] for k in ("num_params", "flops", "source") if k in options}
    form = catalogue.get(options["laws"][0])
    if set(form.columns) - {"num_params", "num_tokens", "flops"}:
        return ""
    try:
        rows = from_table(table, **reading, columns=form.columns)
    except ValueError:
        return ""
    if callable(candidates):
        candidates = candidates(cost_of(*(rows.columns[c] for c in ("num_params", "num_tokens", "flops"))))
    mends = identifying(rows, candidates.columns, form) if len(candidates) else None
    if mends is None:
        return f"; no one of {len(candidates)} candidates mends it"
    i, number = mends
    cost = candidates.cost([i])
    return (
        f"; of {len(candidates)} candidates {candidates.labels[i]} mends it best, for {cost:.3g} {candidates.unit} "
        f"(condition number {number:.3g})"
    )


sys.modules[__name__].__class__ = Called

if __name__ == "__main__":
    sys.exit(main())
