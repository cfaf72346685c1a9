"""Device memory of a pack's train step, from the compiled program: before it runs, and what the device then reports."""

from pathlib import Path

import jax

from scaling.config import RunConfig, program_key
from scaling.execution import ExecutionConfig
from scaling.training import sharding
from scaling.training.programs import Programs, for_pack

BYTES = ("argument", "output", "alias", "temp", "generated_code")


def of_programs(programs: Programs) -> dict[str, int] | None:
    """Bytes that each device needs while these programs run, from the compiler's own buffer assignment.

    ``total = argument + output - alias + temp + generated_code`` of the train step: the state and the batch, what comes
    out beside them (the state is donated, so it is counted once), XLA's temporaries, the code. An evaluation runs
    between steps, on the same state: ``total`` is the larger of the two. None where the backend does not say.
    """
    train, evaluate = programs.train.memory_analysis(), programs.evaluate.memory_analysis()
    if train is None or evaluate is None:
        return None
    parts = {f"{name}_bytes": int(getattr(train, f"{name}_size_in_bytes")) for name in BYTES}
    # The evaluation's arguments are the parameters, which the state holds, and the windows.
    held = train.argument_size_in_bytes
    evaluating = held + evaluate.output_size_in_bytes + evaluate.temp_size_in_bytes
    training = held + train.output_size_in_bytes - train.alias_size_in_bytes + train.temp_size_in_bytes
    return {**parts, "total_bytes": int(max(training, evaluating) + train.generated_code_size_in_bytes)}


def of_run(run: RunConfig, execution: ExecutionConfig, num_members: int = 1) -> dict[str, int] | None:
    """``of_programs`` for packs of ``num_members`` runs of this one's shape; compiles, and runs nothing.

    Raises ValueError when the mesh does not divide an axis.
    """
    mesh = sharding.make_mesh(execution.mesh)
    with jax.set_mesh(mesh):
        return of_programs(for_pack(program_key(run), execution, num_members, mesh))


# Of a device's memory, for a pack: the rest is left to evaluation batches, fragments, and what else is on the device.
PACK_SHARE = 0.85


def largest_pack(run: RunConfig, execution: ExecutionConfig, most: int) -> tuple[int, int | None]:
    """Members, at most ``most``, of the largest pack of this run's shape that fits the device, and its bytes.

    Compiles packs of one and two, goes by the line through them, and compiles the pack it comes to, a smaller one if
    that does not fit. (1, None) where the device does not say what it has.
    """
    run_axis = execution.mesh.run
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    needs = of_run(run, execution, run_axis) if limit else None
    if not needs:
        return 1, None
    one, members = needs["total_bytes"], run_axis
    most = most // run_axis * run_axis
    if most > run_axis:
        slope = max(1, of_run(run, execution, 2 * run_axis)["total_bytes"] - one)
        members = int(1 + (PACK_SHARE * limit - one) // slope) * run_axis
    members = max(run_axis, min(members, most))
    while (needs := of_run(run, execution, members)["total_bytes"]) > PACK_SHARE * limit and members > run_axis:
        members = max(run_axis, int(0.9 * members) // run_axis * run_axis)
    return members, needs


def peak() -> dict[str, int | None]:
    """The most memory so far: of the fullest device (None where it keeps no count, as on CPU) and of this process."""
    return {"device_peak_bytes": _device_peak(), "process_peak_bytes": _process_peak()}


def _device_peak() -> int | None:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks, default=None)


def _process_peak() -> int | None:
    """Peak resident set, from /proc: getrusage's is the parent's until a child has outgrown it."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
