"""The plan as a person asks for it: on which hardware, within which budget, under which warnings, and how it is shown.

What is here stands between the command's options and the pure parts: ``hardware``, ``costs``, ``lint``.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from scaling import numbers, records
from scaling.engine.folder.cells import Selection
from scaling.engine.plan import costs, lint, table, trunks
from scaling.engine.plan.costs import Bill, Budget
from scaling.engine.plan.hardware import Cost
from scaling.engine.plan.printed import plan_table
from scaling.engine.session import Session, bad_input
from scaling.records import read_or_empty
from scaling.terminal import text


def show(session: Session, selection: Selection, args: argparse.Namespace) -> Selection:
    """Prints the plan of a selection, with what is doubtful about the grid, and writes it to ``--json``.

    Returns the selection within the budget; what is left out of it leaves the session's cells too.

    Raises BadInputError for a plan over its budget, warnings under ``--strict``, or more checkpoints than the disk may
    hold.
    """
    selection = _within_budget(session, session.cells.refresh(selection), args)
    rows, todo = selection.mine, selection.todo
    bill = _bill(session, todo)
    session.console.print(plan_table(rows, session.cells.found, f"{args.grid}: the plan", bill.share))
    line = f"{len(rows)} cells, {len(todo)} to do"
    if todo:
        line += f" on {bill.workers} {'worker' if bill.workers == 1 else 'workers'}"
        line += f": {summary}" if (summary := _summary(bill)) else ""
    session.console.print(line, style="bold", soft_wrap=True)
    session.events({
        "event": "plan", "cells": len(rows), "todo": [row.run_id for row in todo], "workers": bill.workers,
        **dataclasses.asdict(bill.total),
    })  # fmt: skip
    _show_packs(session, todo, bill, args)
    _show_trunks(session, selection, bill.workers)
    with bad_input():
        findings = _warn(session, strict=args.strict) if todo or args.plan else []
        if args.json:
            _write_json(args.json, bill, session.packs(todo), findings)
    return selection


def _within_budget(session: Session, selection: Selection, args: argparse.Namespace) -> Selection:
    """Leaves out what is over the budget, what earlier calls spent included, and says so."""
    budget = Budget(args.budget_hours, args.budget_dollars, args.budget_kwh)
    if not budget or not selection.todo:
        return selection
    cells, hardware = session.cells, session.cells.hardware
    spent = session.manifest.spent_seconds() if hardware.is_here else 0.0

    def cost_of(rows: Sequence[table.Row]) -> Cost:
        # As if the others were not in the grid: a trunk that is left out carries nobody.
        seconds = _bill(session, cells.predicted(cells.shared(rows))).seconds if rows else 0.0
        return hardware.cost(None if seconds is None else seconds + spent)

    with bad_input():
        _, dropped = costs.within(budget, selection.todo, cost_of, drop=args.drop)
    if not dropped:
        return selection
    session.say(f"left out to stay within the budget: {costs.describe(dropped)}")
    session.manifest.dropped = dropped
    cells.leave_out(dropped, selection)
    return cells.refresh(selection)


def _bill(session: Session, rows: Sequence[table.Row]) -> Bill:
    """What training these rows comes to, and the conclusion where this machine is the one."""
    hardware = session.cells.hardware
    workers = session.workers or session.num_workers(len(rows))
    wall = table.predicted_wall(rows, workers)
    if wall is not None and rows and hardware.is_here:
        wall += table.CONCLUSION_SECONDS
    return Bill(rows, hardware, workers, wall)


def _show_packs(session: Session, rows: Sequence[table.Row], bill: Bill, args: argparse.Namespace) -> None:
    """Says which cells train as one program, what that takes of a device, and what it should gain."""
    packs = [pack.rows for pack in session.packs(rows) if len(pack.rows) > 1]
    if not packs:
        return
    most = max(map(len, packs))
    line = f"packs: {sum(map(len, packs))} of {len(rows)} cells in {len(packs)} of up to {most}, one program each"
    if all(row.memory_bytes is not None for pack in packs for row in pack):
        memory = max(sum(row.memory_bytes for row in pack) for pack in packs)
        line += f"; about {numbers.compact(memory)}B of memory for the largest"
    if bill.hardware.is_here:
        shapes = [(pack[0].plan.num_params["non_embedding"], len(pack)) for pack in packs]
        gains = [session.cells.timings.pack_gain(*shape, bill.workers) for shape in shapes]
        if None in gains:
            # The grid's execution and the command's workers, as whose the timings are kept.
            workers = "" if args.workers == "auto" else f" --workers {args.workers}"
            command = f"python -m scaling.bench --grid {args.grid} --packs {most}{workers}"
            line += f"; what it gains was not timed here ({command})"
        else:
            low, high = min(gains), max(gains)
            line += f"; expected gain {low:.2f}" + (f" to {high:.2f}" if high > low else "")
            line += "× the tokens/s of lone runs, as scaling.bench --packs timed it"
    session.say(line)


def _show_trunks(session: Session, selection: Selection, workers: int) -> None:
    """Says what sharing saves, and what it takes of the disk; refuses what the disk cannot hold."""
    fitted, held_out = ([row for row in selection.todo if row.cell.holdout == out] for out in (False, True))
    peak = max(session.order(*phase, workers).total for phase in ((fitted, held_out), (held_out, ())))
    if session.cells.have_trunks:
        for line in trunks.describe(selection.mine):
            session.say(line)
    if any(row.carriers for row in selection.todo):
        session.say(f"checkpoints: {numbers.compact(peak)}B on disk at once, at the least")


def _warn(session: Session, *, strict: bool) -> list[lint.Finding]:
    """Prints what is doubtful about a grid. Raises ValueError under ``strict`` if anything is."""
    cells = session.cells
    memory = cells.hardware.profile.memory_bytes
    total = None if memory is None else memory * cells.hardware.devices
    about = {data: session.describe_data(data) for data in {row.cell.run.data for row in cells.rows}}
    tokens = {
        name: {data: known[key] for data, known in about.items() if known is not None}
        for name, key in (("train_tokens", "epoch_tokens"), ("validation_tokens", "validation_tokens"))
    }
    groups = []
    for path, rows in cells.apart().items():
        fit = read_or_empty(path / "fit.json")
        groups.append((rows, lint.Expected.from_fit(fit, device_memory=total, **tokens)))
    findings = lint.check(*groups)
    for finding in findings:
        session.console.print(text(("!", "yellow"), f" {finding}"))
    if findings and strict:
        raise ValueError(f"--strict: {len(findings)} warning{'s' if len(findings) > 1 else ''} about this grid, above")
    session.manifest.warnings = [finding.text for finding in findings]
    return findings


def _summary(bill: Bill) -> str:
    """The whole in a line: time, money, energy, memory; then how far that time can be trusted."""
    total, hardware = bill.total, bill.hardware
    parts = [f"about {numbers.duration(total.seconds)}"] if total.seconds is not None else []
    if total.dollars is not None:
        parts.append(numbers.dollars(total.dollars))
    if total.kwh is not None:
        parts.append(f"{total.kwh:.3g} kWh")
    if bill.memory_bytes is not None:
        parts.append(f"{numbers.compact(bill.memory_bytes)}B of memory at most")
    if total.seconds is None and not hardware.is_here:
        parts.append(f"no time: no MFU is published for {hardware.profile.title}; give --mfu")
        return ", ".join(parts)
    if hardware.is_here or not parts:
        return ", ".join(parts)
    return ", ".join(parts) + "\n" + _on_what(bill)


def _on_what(bill: Bill) -> str:
    hardware = bill.hardware
    points = [point for row in bill.rows if (point := hardware.mfu_for(row.cell.run))]
    low, high = min(p.mfu for p in points), max(p.mfu for p in points)
    text = f"on {hardware.devices} × {hardware.profile.title} at an MFU of {low:.3g}"
    text += f" to {high:.3g}" if high > low else ""
    smallest = hardware.profile.mfu[0].num_params if hardware.profile.mfu else 0.0
    if hardware.mfu is None and any(row.plan.num_params["total"] < smallest for row in bill.rows):
        text += f" (none is published below {numbers.compact(smallest)} parameters: too short for these; give --mfu)"
    return text + "; training FLOPs alone, without evaluation and start-up"


def _write_json(path: Path, bill: Bill, packs: Sequence, findings: Sequence[lint.Finding]) -> None:
    """Raises ValueError when the file cannot be written."""
    try:
        records.write_json(path, {**bill.to_json(packs), "warnings": [dataclasses.asdict(f) for f in findings]})
    except OSError as e:
        raise ValueError(f"--json {path}: {e.strerror}: write a file that can be written") from None
