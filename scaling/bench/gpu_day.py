"""Measures one accelerator in a sitting: parts in order of worth, each in a process of its own, each kept when done.

    python -m scaling.bench --gpu-day --minutes 8 --out DIR

    device     what it is, its clocks, its memory
    equality   losses of 50 steps: beside this machine's CPU in float32, fused attention beside the textbook square
    mfu        steps of 10M to 1B parameters, alone: share of the peak by two FLOP rules
    packs      steps of 1 to 64 runs of 1M, 5M, 20M parameters in one program: tokens/s over those of one
    memory     the most memory that the device saw, beside what its compiler and so the plan had said
    study      sweeps/gpu_isoflop.yaml, as much of it as there is time for

The same command goes on: a row that is in DIR is not measured again, and the sweep resumes. A row that fails holds the
reason and is tried again by the next call. FLOPs are counted by the rule that stands beside them (``accounting``); the
peak is that of ``scaling.devices`` for the dtype, and where a device has none there, shares are left out.
"""

import argparse
import dataclasses
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scaling import accounting, devices, machine, records, storage
from scaling.config import DataConfig, Horizon, OptimConfig, RunConfig
from scaling.execution import ExecutionConfig
from scaling.families.transformer import TransformerConfig

RULES = ("exact", "6ND_total")
ROWS = ("equality", "mfu", "packs", "memory")
PARTS = ("device", *ROWS, "study")
GRID = Path(__file__).resolve().parents[2] / "sweeps" / "gpu_isoflop.yaml"
# A process that is asked to stop saves its checkpoints first.
STOPPING_SECONDS = 45


# (width, layers, tokens a step): non-embedding parameters 12 · layers · width². Each fits an H100, nothing recomputed.
ALONE = {"10M": (384, 6, 65_536), "75M": (768, 11, 65_536), "300M": (1024, 24, 16_384), "1B": (2048, 20, 8_192)}
PACKED = {"1M": (128, 5, 8_192), "5M": (256, 6, 8_192), "20M": (512, 6, 8_192)}


@dataclasses.dataclass(frozen=True)
class Day:
    """What is measured; shapes as ``ALONE`` has them."""

    alone: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=lambda: ALONE)
    packed: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=lambda: PACKED)
    compared: Sequence[int] = (128, 4, 4_096)
    seq_lens: Sequence[int] = (1024, 2048)
    packed_seq_len: int = 512
    pack_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    num_steps: int = 50
    seconds: float = 2.0
    vocab_size: int = 32_000
    grid: str = str(GRID)


def run_of(day: Day, shape: Sequence[int], seq_len: int, **changed: Any) -> RunConfig:
    """A run of that shape on Python's own source; heads are of 64, from width 768 on of 128."""
    width, layers, tokens = shape
    head_dim = min(width, 64 if width < 768 else 128)
    model = TransformerConfig(
        d_model=width, num_layers=layers, num_heads=width // head_dim, num_kv_heads=width // head_dim,
        head_dim=head_dim, d_ff=4 * width, vocab_size=day.vocab_size, dtype=changed.pop("dtype", "bfloat16"),
    )  # fmt: skip
    return RunConfig(
        model, OptimConfig(1e-3, 10 * tokens), Horizon(steps=1000), batch_size=max(1, tokens // seq_len),
        data=DataConfig(source="python-stdlib", seq_len=seq_len, **changed),
    )  # fmt: skip


# ---- the parts, each in its process ---------------------------------------------------------------------------------


def measure(part: str, day: Day, out: Path, until: float) -> bool:
    """Measures a part's rows that ``out`` has not, until ``until`` (as of ``time.time()``); whether all are there."""
    if part == "device":
        return _keep(out, part, {"device": _device}, until)
    rows = {"equality": _equalities, "mfu": _alone, "packs": _packs, "memory": _memory}[part](day)
    return _keep(out, part, rows, until)


def _keep(out: Path, part: str, rows: Mapping[str, Callable[[], dict]], until: float) -> bool:
    """Does what is missing of ``rows``, and writes all after each; stops where the longest so far would not end."""
    path = out / f"{part}.json"
    found = {k: row for k, row in read(out, part).get("rows", {}).items() if "error" not in row}
    longest = 0.0
    for key, function in rows.items():
        if key in found:
            continue
        started = time.time()
        if started + longest > until:
            break
        try:
            found[key] = function()
        except Exception as e:  # a row that fails is data, and the others go on
            found[key] = {"error": f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:300]}"}
        longest = max(longest, time.time() - started)
        found[key] |= {"took_seconds": time.time() - started}
        done = set(found) == set(rows)
        records.write_json(path, {"done": done, "rows": found, "environment": records.software()})
    return set(found) == set(rows)


def read(out: Path, part: str) -> dict[str, Any]:
    return records.read_json(out / f"{part}.json")


def _device() -> dict:
    import jax

    device, profile = jax.devices()[0], _profile()
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
        asked = done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""  # a line a device
    except (OSError, subprocess.TimeoutExpired):
        asked = ""
    return {
        "kind": device.device_kind, "platform": device.platform, "num_devices": jax.device_count(),
        "profile": profile.name if profile else None,
        "bytes_limit": (device.memory_stats() or {}).get("bytes_limit"),
        "nvidia_smi": dict(zip(query.split(","), asked.split(", "))) if asked else None,
        "processor": machine.processor(), "cores": len(machine.cores()),
    }  # fmt: skip


def _profile() -> devices.Profile | None:
    """The figures of this machine's device; None where its name is of none, or of another board than they are of."""
    import jax

    kind = jax.devices()[0].device_kind.lower()
    if re.search("pcie|nvl|gh200|gb200", kind):  # the figures are of SXM boards
        return None
    return next((p for name, p in devices.PROFILES.items() if name != "cpu" and name in kind), None)


def _equalities(day: Day) -> dict[str, Callable[[], dict]]:
    """Pairs of ways to compute the same losses; the largest difference, at the first step and in all."""
    import jax

    float32 = run_of(day, day.compared, 256, dtype="float32")
    half, masked = (run_of(day, day.compared, 256, mask_documents=m) for m in (False, True))
    here, cpu = jax.devices()[:1], jax.devices("cpu")[:1]

    def losses(run: RunConfig, attention: str, on: list, precision: str | None = None) -> list[float]:
        with jax.default_matmul_precision(precision):
            return _losses(run, ExecutionConfig(attention=attention, accumulation_steps=1), on, day.num_steps)  # type: ignore[arg-type]

    def pair(what: str, left: Callable[[], list[float]], right: Callable[[], list[float]]) -> Callable[[], dict]:
        def compared() -> dict:
            a, b = left(), right()
            differences = [abs(x - y) for x, y in zip(a, b)]
            if not all(map(math.isfinite, differences)):
                raise ValueError(f"losses are not finite: {a[-1]} and {b[-1]} at the last step")
            return {
                "what": what,
                "steps": len(a),
                "first": differences[0],
                "most": max(differences),
                "last_losses": (a[-1], b[-1]),
            }

        return compared

    def on_cpu() -> list[float]:
        return losses(float32, "einsum", cpu)

    found = {
        "float32": pair(
            "float32 products of full precision, here and on the CPU",
            lambda: losses(float32, "einsum", here, "highest"), on_cpu,
        ),
        "float32_default": pair(
            "float32 products by default, here and on the CPU", lambda: losses(float32, "auto", here), on_cpu,
        ),
        "documents": pair(
            "bfloat16, documents masked: in blocks, and by the whole square",
            lambda: losses(masked, "block_causal", here), lambda: losses(masked, "einsum", here),
        ),
    }  # fmt: skip
    if here[0].platform == "gpu":
        found["cudnn"] = pair(
            "bfloat16: cuDNN's attention, and the whole square",
            lambda: losses(half, "cudnn", here), lambda: losses(half, "einsum", here),
        )  # fmt: skip
    return found


def _losses(run: RunConfig, execution: ExecutionConfig, on: list, num_steps: int) -> list[float]:
    """The training losses of a run's first steps on these devices."""
    import jax

    from scaling import data
    from scaling.grid import Cell
    from scaling.training import sharding
    from scaling.training.member import Member
    from scaling.training.pack import Pack

    cache_dir = storage.cache_dir()
    data.prepare(run.data, cache_dir)
    corpus: Any = data.open(run.data, cache_dir)
    mesh = sharding.make_mesh(execution.mesh, on)
    with jax.set_mesh(mesh):
        pack = Pack([Member(Cell(run), accounting.plan(run))], corpus, execution, mesh)
        pack.initialise()
        found = []
        with pack.batches(num_steps) as batches:
            for _ in range(num_steps):
                pack.state, metrics = pack.programs.train(pack.state, pack.batch(batches))
                found.append(float(metrics["loss"][0]))
    return found


def _timed(run: RunConfig, seconds: float, num_members: int = 1) -> dict:
    """A row of a step's time: tokens/s, FLOP/s and share of the peak by each rule."""
    import jax

    from scaling import data
    from scaling.training import calibration

    cache_dir = storage.cache_dir()
    data.prepare(run.data, cache_dir)
    timed = calibration.calibrate(run, ExecutionConfig(), cache_dir, seconds, num_members)
    tokens_per_s = num_members * run.batch_tokens / timed["step_seconds"]
    profile, counted, num_devices = _profile(), accounting.flops_of(run), jax.device_count()
    known = profile.peak_flops.get(run.model.dtype) if profile else None
    peak = num_devices * known if known else None  # a run is over all of them
    return {
        "num_params": accounting.param_counts(run.model)["non_embedding"], "num_members": num_members,
        "seq_len": run.data.seq_len, "batch_size": run.batch_size, "dtype": run.model.dtype,
        "tokens_per_s": tokens_per_s, "flops_per_s": {rule: tokens_per_s * counted[rule] for rule in RULES},
        "num_devices": num_devices, "peak_flops": peak,
        "mfu": {rule: tokens_per_s * counted[rule] / peak for rule in RULES} if peak else None,
        **{k: timed[k] for k in ("compile_seconds", "step_seconds", "memory_bytes")},
    }  # fmt: skip


def _alone(day: Day) -> dict[str, Callable[[], dict]]:
    return {
        f"{name}, {seq_len}": lambda shape=shape, seq_len=seq_len: _timed(run_of(day, shape, seq_len), day.seconds)  # type: ignore[misc]
        for name, shape in day.alone.items()
        for seq_len in day.seq_lens
    }


def _packs(day: Day) -> dict[str, Callable[[], dict]]:
    """By size and members; the small packs of all sizes first, whose gain is asked for most."""

    def row(shape: Sequence[int], members: int) -> dict:
        run = run_of(day, shape, day.packed_seq_len)
        too_large = _too_large(run, members)
        return {"refused": too_large} if too_large else _timed(run, day.seconds / 2, members)

    return {
        f"{name} × {members}": lambda shape=shape, members=members: row(shape, members)  # type: ignore[misc]
        for members in day.pack_sizes
        for name, shape in day.packed.items()
    }


def _too_large(run: RunConfig, members: int) -> str | None:
    """Says why the device cannot hold a pack: to try would end the process, or take what it measures next."""
    import jax

    from scaling.training import calibration

    limit: int | None = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return None
    needed = (calibration.measure_memory(run, ExecutionConfig(), storage.cache_dir(), members) or {}).get("total_bytes")
    if needed is None or needed <= limit:
        return None
    return f"{needed / 2**30:.1f} GiB wanted of {limit / 2**30:.1f}"


def _memory(day: Day) -> dict[str, Callable[[], dict]]:
    """From small to large, in one process: its peak so far is a row's own where it rose."""
    from scaling.training import memory

    def row(shape: Sequence[int]) -> dict:
        before: int = memory.peak()["device_peak_bytes"] or 0
        planned = _timed(run_of(day, shape, day.seq_lens[-1]), 0.0)["memory_bytes"]
        after: int = memory.peak()["device_peak_bytes"] or 0
        own = after if after > before else None
        return {"planned_bytes": planned, "peak_bytes": own, "ratio": own / planned if own and planned else None}

    return {name: lambda shape=shape: row(shape) for name, shape in day.alone.items()}  # type: ignore[misc]


# ---- the sitting ----------------------------------------------------------------------------------------------------


def sit(console: Console, out: Path, minutes: float, day: Day) -> int:
    """Measures what is left of the day within ``minutes``; returns 0 when all is done, 3 when something is left.

    Raises ValueError where ``out`` holds another day's parts, or the study's grid is not there.
    """
    if not Path(day.grid).is_file():
        raise ValueError(f"{day.grid} is not there: run this from a clone of the project")
    until = time.time() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    told = records.read_json(out / "day.json")
    now = _plain(day)
    if told and told != now:
        raise ValueError(f"{out}/day.json is of other shapes: write another --out")
    records.write_json(out / "day.json", now)
    left = []
    for part in PARTS:
        if _is_done(read(out, part)):
            continue
        if time.time() > until:
            left.append(part)
            continue
        console.print(f"{part} …")
        code = _in_process(part, out, until, day)
        if code or not (part == "study" or _is_done(read(out, part))):
            left.append(part)
        if code:
            console.print(f"  {part} ended with {code}: {out}/{part}.log")
        if part == "study":
            records.write_json(out / "study.json", {"done": code == 0, "exit_code": code, "results": "study"})
    show(console, out)
    if left:
        console.print(f"left: {', '.join(left)}; the same command goes on")
    return 3 if left else 0


def _plain(day: Day) -> dict[str, Any]:
    plain = dataclasses.asdict(day)
    lists: Callable[[Any], Any] = lambda x: list(x) if isinstance(x, tuple) else x  # noqa: E731
    return {k: {n: lists(v) for n, v in x.items()} if isinstance(x, dict) else lists(x) for k, x in plain.items()}


def _is_done(payload: Mapping[str, Any]) -> bool:
    """Whether a part has all of its rows, none of which failed."""
    return bool(payload.get("done")) and not any("error" in row for row in payload.get("rows", {}).values())


def _in_process(part: str, out: Path, until: float, day: Day) -> int:
    """Runs a part; asks it to stop when the time is over, and ends it if it does not."""
    command = [sys.executable, "-m", "scaling.bench.gpu_day", part, str(out), str(until)]
    if part == "study":
        command = [sys.executable, "-m", "scaling.sweep", "--grid", day.grid, "--progress", "plain"]
        command += ["--results", str(out / "study"), "--workdir", str(out / "work")]
    with (out / f"{part}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=machine.worker_environment())
        try:
            return process.wait(max(1.0, until - time.time()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT if part == "study" else signal.SIGTERM)
        try:
            return process.wait(STOPPING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def show(console: Console, out: Path) -> None:
    """Prints what there is of every part, each share beside its FLOP rule."""
    for key, row in read(out, "device").get("rows", {}).items():
        console.print(f"{key}: {row.get('error') or row['kind']}, {row.get('nvidia_smi') or row.get('processor')}")
    for key, row in read(out, "equality").get("rows", {}).items():
        if "error" in row:
            console.print(f"{key}: {row['error']}")
        else:
            console.print(
                f"{row['what']}: {row['first']:.1e} apart at the first step, {row['most']:.1e} in {row['steps']}"
            )
    for part, title in (("mfu", "alone"), ("packs", "packs")):
        rows = read(out, part).get("rows", {})
        if rows:
            console.print(
                _table(title, rows, {k.partition(" × ")[0]: r for k, r in rows.items() if k.endswith(" × 1")})
            )
    for key, row in read(out, "memory").get("rows", {}).items():
        if "error" in row:
            console.print(f"memory of {key}: {row['error']}")
        elif row.get("ratio"):
            gib = [row[name] / 2**30 for name in ("peak_bytes", "planned_bytes")]
            console.print(f"memory of {key}: {gib[0]:.2f} GiB at the peak, {gib[1]:.2f} planned, {row['ratio']:.2f}×")


def _table(title: str, rows: Mapping[str, dict], ones: Mapping[str, dict]) -> Table:
    headings = ("", "tokens/s", "step ms", *(f"MFU by {rule}" for rule in RULES), "over one", "compile s", "GiB")
    table = Table(*headings, title=title, title_justify="left")
    for key, row in rows.items():
        if told := row.get("error") or row.get("refused"):
            table.add_row(key, told)
            continue
        shares = [f"{100 * row['mfu'][rule]:.1f} %" if row["mfu"] else "–" for rule in RULES]
        one = ones.get(key.partition(" × ")[0], {}).get("tokens_per_s")
        table.add_row(
            key, f"{row['tokens_per_s']:,.0f}", f"{1e3 * row['step_seconds']:.1f}", *shares,
            f"{row['tokens_per_s'] / one:.2f}×" if one else "–", f"{row['compile_seconds']:.1f}",
            f"{row['memory_bytes'] / 2**30:.2f}" if row["memory_bytes"] else "–",
        )  # fmt: skip
    return table


def sitting(console: Console, minutes: float, out: Path | None) -> int:
    """One sitting of the command. Raises ValueError without a folder to go on in, or time."""
    if out is None or (out.exists() and not out.is_dir()):
        raise ValueError("--gpu-day: say into which folder: write --out DIR")
    if not minutes > 0:
        raise ValueError(f"--minutes is {minutes}: write a number above 0, as 8")
    return sit(console, out, minutes, Day())


def main(argv: Iterable[str] | None = None) -> int:
    """A part's own process: PART DIR UNTIL."""
    parser = argparse.ArgumentParser(prog="python -m scaling.bench.gpu_day")
    parser.add_argument("part", choices=("device", *ROWS))
    parser.add_argument("out", type=Path)
    parser.add_argument("until", type=float)
    args = parser.parse_args(list(argv) if argv is not None else None)
    measure(args.part, Day(**records.read_json(args.out / "day.json")), args.out, args.until)
    return 0


if __name__ == "__main__":
    sys.exit(main())
