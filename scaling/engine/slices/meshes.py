r"""Which mesh and which recomputation: a stated cost model, and what the compiler says to it.

A step of a run on a mesh of n = run · data · fsdp · tensor devices takes, by the model,

    max(compute, weights) + activations    seconds

- compute: exact FLOPs · (1 + share computed again) / (n · peak · ``PRODUCT_EFFICIENCY``); again is 0 for remat none,
  the attention products' third for dots, a third of everything but the head for full and offload;
- weights: each device's part of (accumulation · 2 gathers + 1 reduction) of the weights over ``fsdp``, and an
  all-reduce of the gradient over ``data``, at the bandwidth of that axis; they run beside the products, so the longer
  one counts;
- activations: over ``tensor``, two all-reduces of a layer's output forward, two backward, two more where the forward
  pass is run again; products wait for them, so they are added.

An axis of a TPU slice has the chip's interconnect. Of GPUs, whose hosts are laid out tensor first, then fsdp, then
data, an axis inside a host has NVLink; one that goes beyond it has, of a ring's k devices in each host, the k adapters
of the network, NVLink at the most.

It leaves out latency, the optimiser and whatever the compiler does better or worse: it ranks, it does not promise.
"""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scaling import accounting, families, records
from scaling.config import RunConfig
from scaling.devices import PROFILES
from scaling.engine.plan import packing
from scaling.engine.plan.table import Row, step_flops
from scaling.engine.slices import aot, gpus, kernels
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.terminal import text

# Share of the peak that large products alone reach on a TPU; equal for all candidates, so it orders none of them.
PRODUCT_EFFICIENCY = 0.7
REMATS = ("none", "dots", "full")
MAX_TENSOR = 16
MAX_COMPILES = 6  # of candidates for one cell; each takes minutes


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machines that are not here")
    group.add_argument("--topology", metavar="NAME", help="with --plan: compile each distinct cell for this TPU slice, "
        "as v5e:8x8 (extra tpu), for GPUs, as h100:8, or hosts × devices h200:2x8 (extra gpu-plan), or for this "
        "machine's devices, here; needs neither data nor device")  # fmt: skip
    group.add_argument("--suggest", action="store_true",
        help="with --topology: the fastest mesh and remat that fit, by the cost model of slices/meshes.py")  # fmt: skip


# ---- the cost model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chip:
    """What the model needs of a device."""

    peak_flops: float  # in the run's dtype
    interconnect: float  # bytes/s
    memory_bytes: float
    network: float | None = None  # bytes/s beyond its host; None: there is no such border
    per_host: int = 1

    @classmethod
    def of(cls, topology: str, dtype: str) -> "Chip | None":
        """The chip of a TPU slice, or of hosts of GPUs; None for one whose figures are not known."""
        if hosts := gpus.parse(topology):
            profile, owned = PROFILES[hosts.name], gpus.owned_bytes(hosts.name)
            return cls(profile.peak_flops[dtype], profile.interconnect, owned, profile.network, hosts.per_host)  # type: ignore[arg-type]  # known
        name = f"tpu-{topology.partition(':')[0]}"
        if name not in PROFILES:
            return None
        profile = PROFILES[name]
        return cls(profile.peak_flops[dtype], profile.interconnect, profile.memory_bytes)  # type: ignore[arg-type]  # TPUs' are known

    def bandwidth(self, size: int, stride: int) -> float:
        """Bytes/s of a device in rings of ``size``, whose neighbours are ``stride`` devices apart."""
        if self.network is None or size * stride <= self.per_host:
            return self.interconnect
        return min(self.interconnect, max(1, self.per_host // stride) * self.network)


def step_seconds(run: RunConfig, mesh: MeshConfig, remat: str, chip: Chip, accumulation_steps: int = 1) -> float:
    """Seconds of one step by the model above; every size of ``mesh`` is given."""
    model, tokens = run.model, run.batch_tokens
    counts = accounting.trained(model, run.objective)
    exact = accounting.flops_of(run)["exact"]
    inner_weights, head_weights = counts.worked(run.lengths)
    head = 6.0 * head_weights
    attention = exact - head - 6.0 * inner_weights
    again = {"none": 0.0, "dots": attention / 3}.get(remat, (exact - head) / 3)
    devices = mesh.data * mesh.fsdp * mesh.tensor
    compute = (exact + again) * tokens / (devices * chip.peak_flops * PRODUCT_EFFICIENCY)
    width = 2 if model.dtype == "bfloat16" else 4
    part = width * counts.held / mesh.tensor
    gathered = (2 * accumulation_steps + 1) * part * (mesh.fsdp - 1) / mesh.fsdp
    reduced = 2 * part / mesh.fsdp * (mesh.data - 1) / mesh.data
    weights = gathered / chip.bandwidth(mesh.fsdp, mesh.tensor)
    weights += reduced / chip.bandwidth(mesh.data, mesh.tensor * mesh.fsdp)
    layer_output = width * tokens / (mesh.data * mesh.fsdp) * model.d_model
    reduces = 6 if remat in ("full", "offload") else 4
    activations = reduces * model.num_layers * 2 * (mesh.tensor - 1) / mesh.tensor * layer_output
    return max(compute, weights) + activations / chip.bandwidth(mesh.tensor, 1)


def least_bytes(run: RunConfig, mesh: MeshConfig, remat: str, accumulation_steps: int = 1) -> float:
    """Bytes a device cannot do without: its part of the state and the gradient, and what the layers keep for the
    backward pass (fused attention, logits in chunks)."""
    model = run.model
    resolved = accounting.plan(run)
    state = (resolved.state_bytes + 4 * accounting.trained(model, run.objective).held) / (mesh.fsdp * mesh.tensor)
    width = 2 if model.dtype == "bfloat16" else 4
    tokens = run.batch_tokens / (mesh.data * mesh.fsdp * accumulation_steps)
    kept = {"full": 0.0, "offload": 0.0}.get(remat, families.of(model).kept_values(model) / mesh.tensor)
    return state + width * tokens * model.num_layers * (model.d_model + kept)


def candidates(run: RunConfig, execution: ExecutionConfig, num_devices: int, chip: Chip) -> list[ExecutionConfig]:
    """Every mesh and remat that divides what it must and could fit, the fastest by the model first; of equals the one
    with less recomputation, then less sharding."""
    model, steps = run.model, execution.asked_parts
    found = []
    divisors = [d for d in range(1, num_devices + 1) if num_devices % d == 0]
    for tensor, fsdp in itertools.product(divisors, divisors):
        data = num_devices // (tensor * fsdp)
        if tensor > MAX_TENSOR or tensor * fsdp * data != num_devices or run.batch_size % (data * fsdp * steps):
            continue
        mesh_sizes = {"fsdp": fsdp, "tensor": tensor}
        if any(size % mesh_sizes[axis] for _, size, axis in families.of(model).divided(model)):
            continue
        mesh = MeshConfig(run=1, data=data, fsdp=fsdp, tensor=tensor)
        for i, remat in enumerate(REMATS):
            if least_bytes(run, mesh, remat, steps) < chip.memory_bytes:
                key = (step_seconds(run, mesh, remat, chip, steps), i, tensor, fsdp)
                found.append((key, dataclasses.replace(execution, mesh=mesh, remat=remat)))  # type: ignore[arg-type]  # one of REMATS
    return [execution for _, execution in sorted(found, key=lambda item: item[0])]


# ---- the command's part ---------------------------------------------------------------------------------------------


def distinct(rows: Sequence[Row]) -> list[Row]:
    """One row of each that compiles to a program of its own: rates, horizons and seeds are arguments of it."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(packing.shape_of(row.cell.run), row)
    return list(first.values())


def show(
    console: Console,
    rows: Sequence[Row],
    execution: ExecutionConfig,
    topology: str,
    *,
    suggest: bool,
    out: Path | None = None,
) -> bool:
    """Compiles each distinct cell, and with ``suggest`` further meshes, and prints what came of it, into ``out`` too,
    after each; whether all fit.

    Raises ValueError without what compiles, or to suggest for a chip whose figures are not known.
    """
    table = Table(title=f"one device of {topology}, GiB; sent: to other devices in a step, as the program says")
    columns = ("cell", "tokens a step", "mesh r,d,f,t", "remat", "fits", "arguments", "temporaries", "peak", "sent")
    for column in (*columns, "model s/step", "compile s"):
        table.add_column(column, justify="left" if column in ("cell", "remat", "fits") else "right")
    reasons, all_fit, told = [], True, []
    with aot.Compiler(topology) as compiler:
        for row in distinct(rows):
            run = row.cell.run
            chip = Chip.of(topology, run.model.dtype)
            console.print(f"compiling {row.run_id} for {topology} …")
            asked, verdict = execution, compiler.ask(run, execution)
            if suggest:
                _add(table, row, asked, verdict, chip)
                asked, verdict = _best(console, compiler, run, execution, verdict, chip, topology)
            _add(table, row, asked, verdict, chip, marked=suggest)
            all_fit = all_fit and verdict.fits
            told.append(_told(row, asked, verdict, chip))
            if out is not None:
                records.write_json(out, {"topology": topology, "programs": told, "environment": records.software()})
            if not verdict.fits:
                reasons.append(f"{row.run_id} does not fit {topology}: {verdict.reason}")
            elif verdict.limit_bytes is not None:
                peak, owned = (f"{size / 2**30:.2f}" for size in (verdict.bytes["peak"], verdict.limit_bytes))
                of_device = f"of {owned} GiB that JAX owns of a device ({verdict.limit_setting})"
                packs = f"; packs of up to {verdict.most_members} of it do" if verdict.most_members > 1 else ""  # type: ignore[operator]  # known
                reasons.append(f"{row.run_id} fits {topology}: {peak} {of_device}{packs}")
            if said := kernels.said(verdict.kernels):
                reasons.append(f"{row.run_id}: {said}; seen with {verdict.checked_with}")
            for op, entry in sorted(verdict.collectives.items()):
                doubt = f", {entry['unread']} taken to be among all devices" if entry.get("unread") else ""
                reasons.append(
                    f"{row.run_id}: {entry['count']} {op}, {entry['sent_bytes'] / 2**30:.2f} GiB a step{doubt}"
                )
    console.print(table)
    for reason in reasons:
        console.print(reason, soft_wrap=True)
    return all_fit


def _model_seconds(run: RunConfig, execution: ExecutionConfig, verdict: aot.Verdict, chip: Chip | None) -> float | None:
    """What a step should take by the stated model; None of a chip whose figures are not known, or no mesh."""
    if chip is None or not verdict.mesh:
        return None
    return step_seconds(run, MeshConfig(**verdict.mesh), execution.remat, chip, execution.asked_parts)


def _told(row: Row, execution: ExecutionConfig, verdict: aot.Verdict, chip: Chip | None) -> dict[str, Any]:
    """What is known of a program, as JSON: FLOPs of a step by the rule exact, since a GPU's compiler counts none."""
    run = row.cell.run
    return {
        "run_id": row.run_id,
        "num_params": accounting.param_counts(run.model)["total"],
        "batch_size": run.batch_size,
        "window": run.lengths.window,
        "remat": execution.remat,
        "step_flops": {"exact": step_flops(run)},
        "model_seconds": _model_seconds(run, execution, verdict, chip),
        "fits": verdict.fits,
        "sent_bytes": verdict.moved_bytes,
        "most_members": verdict.most_members,
        **dataclasses.asdict(verdict),
    }


def _best(console, compiler, run, execution, first: aot.Verdict, chip: Chip | None, topology: str):
    """The first candidate that compiles, and the verdict on it; the grid's own layout where none does.

    One that needs about what was refused for memory, with the same recomputation, is not tried: a slice has many
    meshes that differ in a few per cent of their memory, and each would cost a compilation."""
    if chip is None:
        raise ValueError(
            f"--suggest: the figures of {topology}'s chip are not known: write v5e, v5p, v6e, h100, h200 or b200"
        )
    refused: dict[str, float] = {}  # by remat, the least that was refused
    num_tried = 0
    for candidate in candidates(run, execution, first.num_devices, chip) if first.num_devices else ():
        mesh, remat = candidate.mesh, candidate.remat
        least = least_bytes(run, mesh, remat, execution.asked_parts)
        if least > 0.9 * refused.get(remat, math.inf):
            continue
        if num_tried == MAX_COMPILES:
            break
        num_tried += 1
        console.print(f"  trying data {mesh.data}, fsdp {mesh.fsdp}, tensor {mesh.tensor}, remat {candidate.remat} …")
        verdict = compiler.ask(run, candidate)
        if verdict.fits:
            return candidate, verdict
        console.print(f"    {verdict.reason}")
        if "out of memory" in verdict.reason:
            refused[remat] = least
    return execution, first


def _add(table: Table, row: Row, execution: ExecutionConfig, verdict: aot.Verdict, chip, marked=False) -> None:
    run, gib = row.cell.run, {name: f"{size / 2**30:.2f}" for name, size in verdict.bytes.items()}
    mesh = verdict.mesh or dataclasses.asdict(execution.mesh)
    seconds = _model_seconds(run, execution, verdict, chip)
    table.add_row(
        f"{row.run_id}{' *' if marked else ''}",
        f"{run.batch_size} × {run.lengths.window}",
        ",".join(str(mesh[axis]) for axis in ("run", "data", "fsdp", "tensor")),
        execution.remat,
        "yes" if verdict.fits else text(("no", "red")),
        *(gib.get(name, "–") for name in ("argument", "temp", "peak")),
        f"{verdict.moved_bytes / 2**30:.2f}" if verdict.fits else "–",
        "–" if seconds is None else f"{seconds:.2f}",
        f"{verdict.compile_seconds:.0f}",
    )
