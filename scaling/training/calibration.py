"""Times and measures one shape on this machine."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from scaling import accounting, data
from scaling.config import RunConfig
from scaling.execution import ExecutionConfig
from scaling.grid import Cell
from scaling.training import memory, sharding
from scaling.training.member import Member
from scaling.training.pack import Pack
from scaling.training.programs import use_compilation_cache


def calibrate(
    run: RunConfig,
    execution: ExecutionConfig,
    cache_dir: Path,
    seconds: float = 1.0,
    num_members: int = 1,
    since: float | None = None,
) -> dict[str, Any]:
    """Times this run's compiled step and evaluation here, on its own data, for about ``seconds`` each, or those of a
    pack of ``num_members`` runs that differ in their seeds.

    Returns seconds: ``compile_seconds``, ``first_step_seconds`` from ``since`` (as of ``time.time()``; by default from
    here) to the end of the first step, ``step_seconds`` (the median, batch included), ``curve_eval_seconds`` for a
    point of the curve, ``eval_seconds`` for the final loss; and ``memory_bytes``, a device's, where known.
    """
    since = time.time() if since is None else since
    use_compilation_cache(cache_dir)
    corpus = data.open(run.data, cache_dir)
    mesh = sharding.make_mesh(execution.mesh)
    with jax.set_mesh(mesh):
        runs = [dataclasses.replace(run, seed=run.seed + k) for k in range(num_members)]
        pack = Pack([Member(Cell(r), accounting.plan(r)) for r in runs], corpus, execution, mesh)
        pack.initialise()

        with pack.batches() as batches:

            def one_step():
                pack.state, metrics = pack.programs.train(pack.state, pack.batch(batches))
                jax.block_until_ready(metrics)

            one_step()
            first_step_seconds = time.time() - since
            step_seconds = _median_seconds(one_step, seconds)
        curve_eval_seconds = _median_seconds(lambda: pack.curve_eval(pack.state["params"]), seconds / 2)
    whole = len(corpus.validation_counts(run.eval.final_tokens)) / len(pack.curve_eval.tokens_W)
    return {
        "compile_seconds": pack.clock.seconds["compile"],
        "first_step_seconds": first_step_seconds,
        "step_seconds": step_seconds,
        "curve_eval_seconds": curve_eval_seconds,
        "eval_seconds": curve_eval_seconds * whole,
        "memory_bytes": (memory.of_programs(pack.programs) or {}).get("total_bytes"),
    }


def measure_memory(
    run: RunConfig, execution: ExecutionConfig, cache_dir: Path, num_members: int
) -> dict[str, int] | None:
    """What ``num_members`` runs of this one's shape need in one program, as ``memory.of_run`` has it."""
    use_compilation_cache(cache_dir)
    return memory.of_run(run, execution, num_members)


def pack_size(run: RunConfig, execution: ExecutionConfig, cache_dir: Path, most: int) -> int:
    """How many runs of this one's shape, at most ``most``, fit one program here; see ``memory.largest_pack``."""
    use_compilation_cache(cache_dir)
    return memory.largest_pack(run, execution, most)[0]


def _median_seconds(function: Callable[[], Any], seconds: float) -> float:
    """Median time of a call, after one to warm up, over about ``seconds`` and at least three, or one that takes thrice
    as long: a large pack's evaluation may take half a minute."""
    function()
    times: list[float] = []
    while not times or sum(times) < seconds or (len(times) < 3 and sum(times) < 3 * seconds):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return float(np.median(times))
