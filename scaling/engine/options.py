"""The options of ``python -m scaling.sweep``: read, checked and typed here, and from then on an ``Options``."""

import argparse
import dataclasses
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling import storage
from scaling.devices import PROFILES
from scaling.engine.executors import EXECUTORS
from scaling.engine.plan import costs
from scaling.engine.plan.hardware import Hardware
from scaling.engine.slices import meshes
from scaling.engine.slurm import launch
from scaling.execution import HardwareConfig

# Option → field of HardwareConfig.
_HARDWARE_OPTIONS = {
    "hardware": "name", "devices": "devices", "price": "price_per_device_hour", "power": "power_watts", "mfu": "mfu",
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What was asked on the command line, by the names of its options; ``typed`` are the words themselves."""

    typed: tuple[str, ...]
    grid: str
    plan: bool
    results: Path | None
    workdir: Path | None
    only: list[str]
    shard: str | None
    status: bool
    progress: str
    executor: str
    workers: int | str
    of_executors: Mapping[str, list[str]]  # by name, KEY=VALUE
    detach: bool
    distributed: str
    pack: int | str
    disk_budget: float | None
    train_unkept: bool
    remove_orphans: bool
    hardware: str | None
    devices: int | None
    price: float | None
    power: float | None
    mfu: float | None
    budget_hours: float | None
    budget_dollars: float | None
    budget_kwh: float | None
    drop: bool
    strict: bool
    json: Path | None
    topology: str | None
    suggest: bool
    print_launch: str | None

    @property
    def command(self) -> str:
        """The command as it was typed."""
        return f"python -m scaling.sweep {shlex.join(self.typed)}"

    @property
    def budget(self) -> costs.Budget:
        return costs.Budget(self.budget_hours, self.budget_dollars, self.budget_kwh)

    @property
    def num_workers(self) -> int | None:
        """None for as many as the executor sees fit."""
        return None if self.workers == "auto" else self.workers  # type: ignore[return-value]  # a number, then

    def check(self) -> None:
        """Raises ValueError for options that say nothing without another."""
        if self.topology and not (self.plan or self.print_launch):
            raise ValueError(f"--topology {self.topology}: it compiles and trains nothing: add --plan")
        if self.suggest and not self.topology:
            raise ValueError("--suggest: say for which machine: add --topology, as v5e:8x8")
        for name, given in self.of_executors.items():
            if given and name != self.executor:
                raise ValueError(f"--{name}: write --executor {name} with it")
        if self.detach and not EXECUTORS[self.executor].can_detach:
            able = " or ".join(name for name, kind in EXECUTORS.items() if kind.can_detach)
            raise ValueError(f"--detach: write --executor {able} with it")


def parse(argv: Sequence[str]) -> Options:
    """Reads the command's words; ends it, as argparse does, where they are no options."""
    given = vars(parser().parse_args(argv))
    own = {name: given.pop(name) for name, kind in EXECUTORS.items() if kind.options_help}
    return Options(typed=tuple(argv), of_executors=own, **given)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m scaling.sweep",
        description="Trains every cell of a grid, fits scaling laws to the results, forecasts the cells held out and "
        "writes a report. Stop it whenever you like: the same command goes on where it was.",
        epilog="Exit codes: 0 done; 2 bad input; 3 some cells diverged or failed; 130 interrupted. Environment: "
        "SCALING_CACHE is the folder for tokenised data and this machine's timings (default .scaling/data).",
    )
    add = found.add_argument
    add("--grid", required=True, metavar="FILE", help="the grid, a YAML file such as sweeps/chinchilla.yaml")
    add("--plan", action="store_true", help="print what it would cost and stop")
    add("--results", metavar="DIR", type=_folder,
        help="records, laws and report: a path, or gs://bucket/folder (default results/<grid's name>)")  # fmt: skip
    add("--workdir", metavar="DIR", type=_folder,
        help="checkpoints and logs, likewise (default .scaling/<grid's name>); logs stay on a disk")  # fmt: skip
    add("--only", metavar="RUN_ID", nargs="+", default=[], help="train these cells alone (first digits suffice)")
    add("--shard", metavar="I/N", type=_shard, help="train every N-th cell, the I-th share of 1…N: one per machine")
    add("--status", action="store_true", help="print what is done, runs, waits or failed, and stop")
    add("--progress", choices=("auto", "rich", "plain", "json"), default="auto",
        help="while it runs: redrawn in place (rich; auto on a terminal), a line a minute (plain), or every event as a "
        "line of JSON, with all else on stderr")  # fmt: skip
    add("--executor", choices=tuple(EXECUTORS), default="local",
        help="worker processes here, all in this process, or jobs of a Slurm cluster")  # fmt: skip
    add("--workers", metavar="N", type=_workers, default="auto",
        help="worker processes (auto: one a core on CPU); with slurm, jobs at a time (auto: no limit)")  # fmt: skip
    for name, kind in EXECUTORS.items():
        if kind.options_help:
            add(f"--{name}", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help=kind.options_help)
    add("--detach", action="store_true",
        help="with slurm: submit and stop; the jobs finish the sweep: the last gives the command again when the others "
        "are over; a call in between finds them")  # fmt: skip
    add("--distributed", metavar="HOW", default="off",
        help="with --executor inline, the same command on every host: one model over the devices of all. auto (TPU, "
        "Slurm, GKE), or coordinator=HOST:PORT,processes=N,process=I (default off)")  # fmt: skip
    add("--pack", metavar="K", type=_workers, default="auto",
        help="train up to K cells of equal shape as one program (auto: as many as a device's memory holds; 1 on a CPU, "
        "where more gains nothing)")  # fmt: skip
    add("--disk-budget", metavar="GB", type=_gigabytes,
        help="of all checkpoints together (default: the grid's execution.disk_budget_gb)")  # fmt: skip
    add("--train-unkept", action="store_true", help="train again the completed runs whose final checkpoint "
        "execution.keep_final_checkpoint asks for and is not there")  # fmt: skip
    add("--remove-orphans", action="store_true", help="remove checkpoints of runs that the grid no longer has")
    _add_plan_options(found)
    meshes.add_options(found)
    launch.add_options(found)
    return found


def _folder(text: str) -> Path:
    try:
        return storage.folder(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _workers(text: str) -> int | str:
    return text if text == "auto" else whole_number(text)


def _gigabytes(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of gigabytes above 0")
    return float(text)


def _shard(text: str) -> str:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 ≤ I ≤ N, e.g. 1/4")
    return text


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
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


def hardware_of(args: Options, grid_config: HardwareConfig, *, has_accelerator: bool) -> Hardware:
    """The grid's hardware with the command's options over it; options about one device are the named profile's own.

    Raises ValueError where they contradict each other, or ask to train on what is not here.
    """
    hardware = hardware_named(vars(args), grid_config, has_accelerator=has_accelerator)
    if not (hardware.is_here or args.plan or args.status or not EXECUTORS[args.executor].trains_here):
        name = hardware.profile.name
        raise ValueError(
            f"hardware {name}: not what this machine has: add --plan for what it would cost there, or --hardware cpu "
            "to train here"
            if name != "cpu"
            else "hardware cpu: JAX takes the accelerator of this machine: set JAX_PLATFORMS=cpu, or leave it out"
        )
    return hardware


def hardware_named(options: Mapping[str, Any], grid_config: HardwareConfig, *, has_accelerator: bool) -> Hardware:
    """The grid's hardware with options over it: hardware, devices, price, power and mfu, where they are given.

    Raises ValueError where they contradict each other.
    """
    given = {field: v for option, field in _HARDWARE_OPTIONS.items() if (v := options.get(option)) is not None}
    base = HardwareConfig() if "name" in given else grid_config  # another profile: nothing of the grid's holds for it
    try:
        return Hardware.of(dataclasses.replace(base, **given), has_accelerator=has_accelerator)
    except ValueError as e:
        raise ValueError(f"--{e}") from None
