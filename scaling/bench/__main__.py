"""Runs a measurement and prints it: tokens/s and FLOP/s by model size with all workers busy, or what an option names.

    python -m scaling.bench                               three sizes at sequence 256
    python -m scaling.bench --family recurrent            of another family, and its layers beside another library's
    python -m scaling.bench --grid sweeps/chinchilla.yaml the shapes of a grid
    python -m scaling.bench --packs 2 4 8                 what packs of so many runs gain
    python -m scaling.bench --family recurrent --widths 64 --packs 2 4 8
    python -m scaling.bench --startup                     how long until a process trains

    python -m scaling.bench --gpu-day --minutes 8 --out D  an accelerator in one sitting, resumed by the same command
    python -m scaling.bench --data                        tokenising, batches and synthetic sources, one core
    python -m scaling.bench --laws                        the fits
    python -m scaling.bench --coverage 400                what intervals hold, by kind of noise and design
    python -m scaling.bench --design-curve 20             FLOPs that an exponent takes: designed, by budgets, at random
    python -m scaling.bench --design                      what targets are predicted from runs chosen one by one

Every worker times the same compiled step at the same time, as in a sweep: the sum is what the machine does. Ratios
between runs of this command on one machine mean something; single figures drift with its other load.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from scaling import machine, records, storage, terminal
from scaling.bench import families, steps
from scaling.engine.plan import timings
from scaling.engine.run.tasks import ExecutorError
from scaling.engine.run.workers import auto_workers
from scaling.execution import ExecutionConfig
from scaling.machine import processor


def _of(part: str) -> Any:
    """A module of this folder, loaded when it is asked for: an accelerator's machine may lack what fits need."""
    return importlib.import_module(f"scaling.bench.{part}")


# Options that ask for a measurement of their own: what each does with its value, and its exit code, None for 0.
PARTS: dict[str, Callable[[Console, argparse.Namespace], Any]] = {
    "coverage": lambda console, args: _of("coverage").show(console, args.coverage, args.out),
    "gpu_day": lambda console, args: _of("gpu_day").sitting(console, args.minutes, args.out),
    "design_curve": lambda console, args: _of("designed").show(console, args.design_curve, args.out),
    "laws": lambda console, args: _of("laws").show(console),
    "design": lambda console, args: _of("design").show(console, args.out),
    "data": lambda console, args: _of("data").show(console, args.out),
}


@terminal.outliving_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = _parser().parse_args(argv)
    console = terminal.console(sys.stdout)
    given = [name for name in PARTS if getattr(args, name) is not None and getattr(args, name) is not False]  # 0 is
    asked = PARTS[given[0]] if given else _steps
    try:
        return asked(console, args) or 0
    except (ValueError, ExecutorError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def _steps(console: Console, args: argparse.Namespace) -> None:
    """Times steps: of all workers at once, in packs, or from a process's start."""
    if args.grid and args.family:
        raise ValueError("--grid and --family both say what is timed: write one of them")
    if args.packs and min(args.packs) < 1:
        raise ValueError(f"--packs is {min(args.packs)}: write sizes of 1 or more")
    family, cache_dir = args.family or "transformer", storage.cache_dir()
    workers = args.workers or auto_workers(len(machine.cores()))
    runs, execution = steps.grid_runs(args.grid) if args.grid else (families.FAMILIES[family].runs, ExecutionConfig())
    runs = steps.of_widths(runs, args.widths) if args.widths else runs
    cache = timings.TimingCache(cache_dir, args.workers or "auto", execution)
    options = {"workers": workers, "cache_dir": cache_dir, "seconds": args.seconds}
    payload: dict[str, Any] = {"processor": processor(), "workers": workers, "environment": records.software()}
    if args.packs:
        sizes = sorted({1, *args.packs})
        rows = steps.measure_packs(
            runs, execution, sizes, tell=lambda row: console.print(steps.pack_line(row)), **options
        )
        steps.show_packs(console, rows)
        cache.save_packs(rows)
    elif args.startup:
        rows = steps.measure_startup(runs, execution, workers=workers)
        steps.show_startup(console, rows, workers)
    else:
        rows = steps.measure(runs, execution, **options)
        steps.show(console, rows, workers)
        if args.grid:
            steps.keep_for_plans(runs, rows, cache)
        if args.family and families.FAMILIES[family].other:
            chosen = [c for c in families.FAMILIES[family].compared if args.widths is None or c.d_model in args.widths]
            payload["compared"] = families.compare(family, seconds=args.seconds, compared=chosen)
            families.show_compared(console, payload["compared"], family)
    if args.out:
        records.write_json(args.out, payload | {"rows": rows})
        console.print(f"written: {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scaling.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--grid", metavar="FILE", help="time this grid's shapes, for its plan (default: three sizes)")
    parser.add_argument(
        "--family", choices=tuple(families.FAMILIES),
        help="time this family's sizes (default: transformer), and its layers beside another library's",
    )  # fmt: skip
    parser.add_argument("--laws", action="store_true", help="time the fits of scaling.laws instead")
    parser.add_argument(
        "--coverage", type=int, metavar="DRAWS",
        help="print how often nominal 90 %% intervals hold the truth, of so many draws a kind of noise and design",
    )  # fmt: skip
    parser.add_argument(
        "--design-curve", type=int, metavar="ORDERS",
        help="print the FLOPs that a known exponent takes of published tables ($SCALING_PUBLISHED) and the default "
        "sweep: designed, budget by budget, and by so many random orders",
    )  # fmt: skip
    parser.add_argument(
        "--design", action="store_true",
        help="print how well targets are predicted from runs chosen one by one, on the tables of $SCALING_PUBLISHED",
    )  # fmt: skip
    parser.add_argument(
        "--data",
        action="store_true",
        help="time tokenising, cutting batches and generating synthetic sources, on one core, instead",
    )
    parser.add_argument(
        "--packs",
        type=int,
        nargs="+",
        metavar="K",
        help="time packs of these sizes, 1 first, in one process and in all",
    )
    parser.add_argument("--widths", type=int, nargs="+", metavar="W", help="time only the shapes that are so wide")
    parser.add_argument(
        "--startup", action="store_true", help="time the way from a process's start to its first step, instead"
    )
    parser.add_argument(
        "--gpu-day", action="store_true",
        help="measure an accelerator, in order of worth, into the folder --out; the same command goes on",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M", help="of --gpu-day (8)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes at once (default: one a core on CPU)")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="S", help="about how long to time each (2)")
    parser.add_argument("--out", type=Path, metavar="FILE",
        help="also write the rows and the environment as JSON; of --gpu-day, the folder")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
