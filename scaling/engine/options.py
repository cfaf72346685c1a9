"""The plan's options of the command: hardware, budgets, warnings, a file."""

import argparse
import dataclasses
import math
from pathlib import Path

from scaling.devices import PROFILES
from scaling.engine.executors import EXECUTORS
from scaling.engine.plan import costs
from scaling.engine.plan.hardware import Hardware
from scaling.execution import HardwareConfig

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
    add("--hardware", choices=tuple(PROFILES), help="count time, money and energy on this, in place of the grid's; "
        "with --plan for one that is not here")  # fmt: skip
    add("--devices", metavar="N", type=whole_number, help="how many of them (default 1)")
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


def whole_number(text: str) -> int:
    """The type of an option that counts."""
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
    if not (hardware.is_here or args.plan or args.status or not EXECUTORS[args.executor].trains_here):
        name = hardware.profile.name
        raise ValueError(
            f"hardware {name}: not what this machine has: add --plan for what it would cost there, or --hardware cpu "
            "to train here"
            if name != "cpu"
            else "hardware cpu: JAX takes the accelerator of this machine: set JAX_PLATFORMS=cpu, or leave it out"
        )
    return hardware
