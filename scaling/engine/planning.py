"""The plan as a person asks for it: on which hardware, within which budget, under which warnings, and how it is shown.

What is here stands between the command's options and the pure parts: ``hardware``, ``costs``, ``lint``.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from scaling import records
from scaling.config import PROFILE_NAMES, DataConfig, HardwareConfig
from scaling.engine import costs, lint, plan, progress
from scaling.engine.costs import Bill, Budget
from scaling.engine.hardware import Hardware

# Option → field of HardwareConfig.
_HARDWARE_OPTIONS = {
    "hardware": "name", "devices": "devices", "price": "price_per_device_hour", "power": "power_watts", "mfu": "mfu",
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the plan: hardware, budgets, warnings, a file."""
    group = parser.add_argument_group(
        "the plan", f"What a budget leaves out with --drop: {costs.DROP_RULE}. Earlier calls count towards a budget."
    )
    add = group.add_argument
    add("--hardware", choices=PROFILE_NAMES, help="count time, money and energy on this, in place of the grid's; with "
        "--plan for one that is not here")  # fmt: skip
    add("--devices", metavar="N", type=_positive_int, help="how many of them (default 1)")
    add("--price", metavar="X", type=_positive, help="dollars per device-hour (default: the profile's)")
    add("--power", metavar="W", type=_positive, help="watts per device (default: the profile's)")
    add("--mfu", metavar="F", type=_positive, help="share of the peak that training reaches (default: published ones)")
    for name, unit in (("hours", "hours of wall time"), ("dollars", "dollars"), ("kwh", "kilowatt-hours")):
        add(f"--budget-{name}", metavar="X", type=_positive, help=f"refuse what takes more {unit}")
    add("--drop", action="store_true", help="leave out what is over the budget, in place of refusing")
    add("--strict", action="store_true", help="the grid's warnings are errors")
    add("--json", metavar="FILE", type=Path, help="write the plan there in full")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _positive_int(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number ≥ 1")
    return int(text)


def hardware_of(args: argparse.Namespace, grid_config: HardwareConfig, *, has_accelerator: bool) -> Hardware:
    """The grid's hardware with the command's options over it; options about one device are the named profile's own.

    Raises ValueError where they contradict each other, or ask to train on what is not here.
    """
    given = {
        field: value for option, field in _HARDWARE_OPTIONS.items() if (value := getattr(args, option)) is not None
    }
    base = HardwareConfig() if "name" in given else grid_config  # another profile: nothing of the grid's holds for it
    try:
        hardware = Hardware.of(dataclasses.replace(base, **given), has_accelerator=has_accelerator)
    except ValueError as e:
        raise ValueError(f"--{e}") from None
    if not (hardware.is_here or args.plan or args.status or args.executor == "slurm"):
        name = hardware.profile.name
        raise ValueError(
            f"hardware {name}: not what this machine has: add --plan for what it would cost there, or --hardware cpu "
            "to train here"
            if name != "cpu"
            else "hardware cpu: JAX takes the accelerator of this machine: set JAX_PLATFORMS=cpu, or leave it out"
        )
    return hardware


def budget_of(args: argparse.Namespace) -> Budget:
    return Budget(args.budget_hours, args.budget_dollars, args.budget_kwh)


def about_data(cells: Iterable[DataConfig], describe: Callable[[DataConfig], dict | None]) -> dict:
    """Tokens by split of the data that is prepared, as ``lint.Expected`` takes them."""
    known = {data: about for data in cells if (about := describe(data)) is not None}
    return {
        f"{s}_tokens": {data: about[f"{s}_tokens"] for data, about in known.items()} for s in ("train", "validation")
    }


def warn(
    console: Console, rows: Sequence[plan.Row], hardware: Hardware, fit: dict, data: dict, *, strict: bool
) -> list[lint.Finding]:
    """Prints what is doubtful about a grid. Raises ValueError under ``strict`` if anything is."""
    memory = hardware.profile.memory_bytes
    total = None if memory is None else memory * hardware.devices
    findings = lint.check(rows, lint.Expected.from_fit(fit, device_memory=total, **data))
    for finding in findings:
        console.print(f"[yellow]![/] {escape(str(finding))}", soft_wrap=True)
    if findings and strict:
        raise ValueError(f"--strict: {len(findings)} warning{'s' if len(findings) > 1 else ''} about this grid, above")
    return findings


def stay_within(
    console: Console,
    budget: Budget,
    rows: Sequence[plan.Row],
    bill_of: Callable[[Sequence[plan.Row]], Bill],
    hardware: Hardware,
    spent_seconds: float,
    *,
    drop: bool,
) -> list[plan.Row]:
    """The rows that are left out to stay within the budget, said on the console; none without one.

    Raises ValueError, in one line, when the plan is over it and nothing may be left out.
    """
    if not budget or not rows:
        return []

    def cost_of(some: Sequence[plan.Row]):
        seconds = bill_of(some).seconds if some else 0.0
        return hardware.cost(None if seconds is None else seconds + spent_seconds)

    _, dropped = costs.within(budget, rows, cost_of, drop=drop)
    if dropped:
        console.print(f"left out to stay within the budget: {costs.describe(dropped)}", markup=False, soft_wrap=True)
    return dropped


def summary(bill: Bill) -> str:
    """The whole in a line: time, money, energy, memory; then how far that time can be trusted."""
    total, hardware = bill.total, bill.hardware
    parts = [f"about {progress.duration(total.seconds)}"] if total.seconds is not None else []
    if total.dollars is not None:
        parts.append(progress.dollars(total.dollars))
    if total.kwh is not None:
        parts.append(f"{total.kwh:.3g} kWh")
    if bill.memory_bytes is not None:
        parts.append(f"{progress.compact(bill.memory_bytes)}B of memory at most")
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
        text += f" (none is published below {progress.compact(smallest)} parameters: too short for these; give --mfu)"
    return text + "; training FLOPs alone, without evaluation and start-up"


def write_json(path: Path, bill: Bill, packs: Sequence, findings: Sequence[lint.Finding]) -> None:
    """Raises ValueError when the file cannot be written."""
    try:
        records.write_json(path, {**bill.to_json(packs), "warnings": [dataclasses.asdict(f) for f in findings]})
    except OSError as e:
        raise ValueError(f"--json {path}: {e.strerror}: write a file that can be written") from None


def show_against_actual(console: Console, manifest: dict, runs: Sequence[records.RunRecord]) -> None:
    """One line: what the plan said and what came of it."""
    rows = {row["key"]: row for row in records.plan_against_actual(manifest, runs)}
    parts = []
    if (wall := rows.get("wall")) and wall["ratio"]:
        took, said = progress.duration(wall["actual"]), progress.duration(wall["planned"])
        parts.append(f"{took} for {said} planned ({wall['ratio'] - 1:+.0%})")
    if cells := rows.get("cells"):
        parts.append(f"a cell {cells['ratio']:.2f} of its plan ({cells['low']:.2f} to {cells['high']:.2f})")
    if idle := rows.get("idle"):
        parts.append(f"{idle['actual']:.1%} of training not in steps")
    if money := rows.get("dollars"):
        parts.append(f"{progress.dollars(money['actual'])} for {progress.dollars(money['planned'])} planned")
    if energy := rows.get("measured_kwh") or rows.get("kwh"):
        parts.append(f"{energy['actual']:.3g} kWh")
    if parts:
        console.print(f"plan against actual: {'; '.join(parts)}", soft_wrap=True)
