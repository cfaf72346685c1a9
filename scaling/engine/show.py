"""Prints a plan: its table, what it comes to, packs, trunks, what is doubtful about the grid. Changes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from scaling import numbers
from scaling.engine.plan import lint, trunks
from scaling.engine.plan.costs import Bill, describe
from scaling.engine.plan.plan import Plan
from scaling.engine.plan.printed import plan_table
from scaling.engine.plan.timings import TimingCache
from scaling.terminal import text


def show(console: Console, plan: Plan, found: Mapping[str, str], title: str) -> None:
    """Prints a plan's cells, ``found`` among them those that are in, and what the others take."""
    if plan.dropped:
        console.print(f"left out to stay within the budget: {describe(plan.dropped)}", soft_wrap=True)
    bill = plan.bill
    console.print(plan_table(plan.rows, found, f"{title}: the plan", bill.share))
    line = f"{len(plan.rows)} cells, {len(plan.todo)} to do"
    if plan.todo:
        line += f" on {bill.workers} {'worker' if bill.workers == 1 else 'workers'}"
        line += f": {summary}" if (summary := _summary(bill)) else ""
    console.print(line, style="bold", soft_wrap=True)


def show_packs(console: Console, plan: Plan, timings: TimingCache, bench: str) -> None:
    """Says which cells train as one program, what that takes of a device, and what it should gain.

    ``bench``: the command that times packs as this sweep would run them, but for their size.
    """
    packs = [pack.rows for pack in plan.packs if len(pack.rows) > 1]
    if not packs:
        return
    most = max(map(len, packs))
    line = f"packs: {sum(map(len, packs))} of {len(plan.todo)} cells in {len(packs)} of up to {most}, one program each"
    if all(row.memory_bytes is not None for pack in packs for row in pack):
        memory = max(sum(row.memory_bytes for row in pack) for pack in packs)  # type: ignore[misc]  # all are known
        line += f"; about {numbers.compact(memory)}B of memory for the largest"
    if plan.bill.hardware.is_here:
        shapes = [(p[0].cell.run.model.family, p[0].plan.num_params["non_embedding"], len(p)) for p in packs]
        gains: list[Any] = [timings.pack_gain(*shape, plan.bill.workers) for shape in shapes]
        if None in gains:
            line += f"; what it gains was not timed here ({bench.format(packs=most)})"
        else:
            low, high = min(gains), max(gains)
            line += f"; expected gain {low:.2f}" + (f" to {high:.2f}" if high > low else "")
            line += "× the tokens/s of lone runs, as scaling.bench --packs timed it"
    console.print(line, soft_wrap=True)


def show_trunks(console: Console, plan: Plan, *, have_trunks: bool) -> None:
    """Says what sharing saves, and what it takes of the disk."""
    if have_trunks:
        for line in trunks.describe(plan.rows):
            console.print(line, soft_wrap=True)
    if any(row.needs for row in plan.todo):
        peak = numbers.compact(plan.checkpoint_bytes)
        console.print(f"checkpoints: {peak}B on disk at once, at the least", soft_wrap=True)


def show_findings(console: Console, findings: Sequence[lint.Finding]) -> None:
    for finding in findings:
        console.print(text(("!", "yellow"), f" {finding}"))


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
