"""Compiles train steps for machines that are not here, ahead of time: whether they fit, and what they would move.

    with Compiler("v5e:8x8") as compiler:
        verdict = compiler.ask(run, execution)

For a TPU slice the compiler is libtpu's own (extra ``tpu``), so what it refuses for memory the slice would refuse. For
GPUs, as h100:8, it is XLA's (extra ``gpu-plan``), which refuses nothing: the peak is compared with what JAX will own.
``here`` compiles for the devices of this machine. It works in a process of its own, ``python -m
scaling.engine.slices.aot``: its environment must be set before JAX is imported, and a compiler may end its process or
fill the memory. One question at a time.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field

from scaling import config, fields, machine
from scaling.config import RunConfig
from scaling.engine.slices import gpus, kernels
from scaling.execution import ExecutionConfig

HERE = "here"
_NO_TILES = "Couldn't find output tile sizes"
BYTES = ("argument", "output", "alias", "temp", "generated_code")


@dataclass(frozen=True)
class Verdict:
    """What compiling one train step for a topology gave. Bytes and seconds are of one device, of one step."""

    reason: str | None = None  # it cannot be compiled, and why; None: it fits
    num_devices: int = 0  # of the topology; 0: there is no such
    mesh: dict[str, int] = field(default_factory=dict)
    device_kind: str = ""
    bytes: dict[str, int] = field(default_factory=dict)  # ``BYTES``, ``peak`` and ``host_temp``, as the compiler says
    collectives: dict[str, dict] = field(default_factory=dict)  # see ``collectives``
    compile_seconds: float = 0.0
    limit_bytes: int | None = None  # what JAX will own of a GPU; None where the compiler itself refuses
    limit_setting: str = ""  # by which that is so
    kernels: dict[str, int] = field(default_factory=dict)  # of a GPU; see ``kernels.of``
    checked_with: str = ""  # for a GPU, the versions of JAX and cuDNN

    @property
    def fits(self) -> bool:
        return self.reason is None

    @property
    def most_members(self) -> int | None:
        """How large a pack of this program the device's memory holds: each member keeps what one does (16 of 5M
        parameters peaked at 15.9 times one). None where it is not known."""
        peak = self.bytes.get("peak")
        return None if not (self.fits and self.limit_bytes and peak) else int(self.limit_bytes // peak)

    @property
    def moved_bytes(self) -> float:
        """Bytes that a device sends to others in a step."""
        return sum(entry["sent_bytes"] for entry in self.collectives.values())


class Compiler:
    """The process that compiles for one topology; started at once, ended by ``with``.

    Raises ValueError for a name of no topology, and when what compiles for it is not installed.
    """

    def __init__(self, topology: str):
        self.topology = topology
        env = machine.worker_environment()
        if topology != HERE:
            # The devices are a description: nobody is to look for one here.
            env |= {"JAX_PLATFORMS": "cpu"} | _environment_for(topology)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "scaling.engine.slices.aot", topology],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._log.close()

    def ask(self, run: RunConfig, execution: ExecutionConfig) -> Verdict:
        """Compiles one run's train step; a compiler that ended instead of answering is a reason too."""
        question = {"run": fields.to_dict(run), "execution": fields.to_dict(execution)}
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            return Verdict(reason=f"the compiler ended ({self._process.wait()}): {self._last_words()}")
        return Verdict(**json.loads(line))

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "without a word"


def _environment_for(topology: str) -> dict[str, str]:
    """What the process that compiles for a topology needs beside JAX on a CPU; refuses what it cannot compile for."""
    if gpus.parse(topology):
        gpus.require_wheels(topology)
        gpus.memory_fraction()
        return {}
    if not re.match(r"v\d[a-z]*:", topology):
        raise ValueError(
            f"--topology {topology}: write a TPU slice, as v5e:8x8, or GPUs of {', '.join(gpus.DESCRIPTIONS)}, as "
            "h100:8, or hosts × devices, as h100:2x8; or here"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"--topology {topology}: libtpu compiles for it and is not installed: pip install '.[tpu]'")
    # libtpu is neither to look for its own chips nor to ask Google where it runs.
    env = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "none"}
    return env | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


# ---- in the process that compiles -----------------------------------------------------------------------------------


_SLICES = "write one as v5e:8x8, v5p:4x4x4, v6e:16x16"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libtpu prints; answers go the other way
    devices, problem = None, None
    try:
        devices = _devices(sys.argv[1])
    except Exception as e:  # libtpu raises several kinds for a name that it does not know
        # Names of GPUs were read before: what fails here is the plugin, of which the wheels' versions must be jaxlib's.
        instead = "install the versions of jax: pip install '.[gpu-plan]'" if gpus.parse(sys.argv[1]) else _SLICES
        problem = f"topology {sys.argv[1]!r}: {_first_line(e)}: {instead}"
    for line in sys.stdin:
        raw = json.loads(line)
        run = fields.from_dict(RunConfig, raw["run"])
        execution = fields.from_dict(ExecutionConfig, raw["execution"])
        verdict = Verdict(reason=problem) if problem else compile_step(run, execution, devices)  # type: ignore[arg-type]  # no problem: there are devices
        answers.write(json.dumps(dataclasses.asdict(verdict)) + "\n")
        answers.flush()


def _devices(topology: str) -> list:
    import jax
    from jax.experimental import topologies

    if topology == HERE:
        return jax.devices()
    if topology_of_gpus := gpus.parse(topology):
        return gpus.devices(topology_of_gpus)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compile_step(run: RunConfig, execution: ExecutionConfig, devices: list) -> Verdict:
    """Compiles the train step of a lone run over ``devices``, which need not be here."""
    import jax

    from scaling.training import programs, sharding

    started = time.perf_counter()
    mesh = None
    try:
        mesh = sharding.make_mesh(execution.mesh, devices)
        with jax.set_mesh(mesh):
            compiled = _compiled(programs.lower(config.program_key(run), execution, 1, mesh).train)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as e:
        shape = dict(mesh.shape) if mesh is not None else {}
        seconds = time.perf_counter() - started
        return Verdict(_why(e), len(devices), shape, devices[0].device_kind, compile_seconds=seconds)
    memory = compiled.memory_analysis()
    bytes_ = {name: int(getattr(memory, f"{name}_size_in_bytes")) for name in BYTES}
    bytes_ |= {"peak": int(memory.peak_memory_in_bytes), "host_temp": int(memory.host_temp_size_in_bytes)}
    limit, setting = gpus.limit_of(devices[0]) or (None, "")
    hlo: str = compiled.as_text()
    return Verdict(
        reason=_too_large(bytes_["peak"], limit, setting),
        num_devices=len(devices),
        mesh=dict(mesh.shape),
        device_kind=devices[0].device_kind,
        bytes=bytes_,
        collectives=collectives(hlo, len(devices)),
        compile_seconds=time.perf_counter() - started,
        limit_bytes=limit,
        limit_setting=setting,
        kernels=kernels.of(hlo) if limit else {},
        checked_with=gpus.checked_with() if limit else "",
    )


def _compiled(lowered):
    """The compiled program. Where XLA, which times nothing without a GPU, gives a product of odd sizes to Triton and
    finds no tiles for it, with all products by cuBLAS: on the GPU itself it would try both."""
    try:
        return lowered.compile()
    except Exception as e:
        if _NO_TILES not in str(e):
            raise
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def _too_large(peak_bytes: int, limit_bytes: int | None, setting: str) -> str | None:
    """Says what XLA for GPUs does not: that a program needs more than there will be. None where it fits."""
    if limit_bytes is None or peak_bytes <= limit_bytes:
        return None
    return (
        f"out of memory: {peak_bytes / 2**30:.2f}G wanted of {limit_bytes / 2**30:.2f}G that JAX owns of a device "
        f"({setting})"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]


def _why(error: Exception) -> str:
    """A compiler's refusal in one line; for memory, with what it says was wanted and what there is."""
    text = str(error)
    temporaries = re.search(r"HLO temporaries \(([\d.]+\w+)\) exceeds available HBM \(([\d.]+\w+)\)", text)
    if temporaries:
        return f"out of memory: {temporaries[1]} of temporaries, {temporaries[2]} a device"
    used = re.search(r"Used ([\d.]+\w+) of ([\d.]+\w+) hbm", text)
    if "RESOURCE_EXHAUSTED" in text and used:
        return f"out of memory: {used[1]} wanted of {used[2]} a device"
    return _first_line(error)


# ---- reading the compiled program -----------------------------------------------------------------------------------

_OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ({'|'.join(_OPS)})(-start)?\(")
_CALL = re.compile(r"(?:calls|body|to_apply|branch_computations|true_computation|false_computation)=\{?%?([\w.\-]+)")
_SHAPE = re.compile(r"\b(pred|bf16|[fsu]\d+|f8\w+|c64)\[([\d,]*)\]")
_WIDTH = {"pred": 1, "bf16": 2, "c64": 8}


def collectives(hlo: str, num_devices: int) -> dict[str, dict]:
    """Collective operations of a compiled program, by kind: ``count`` and ``sent_bytes`` of a device in one run of it.

    Read from the program's text. Inside a loop an operation counts as often as the loop goes round; where the text does
    not say how often, once. A collective that was split into phases counts once. Where it does not say among which
    devices, an operation is taken to be among all, and counted as ``unread``. Bytes are those of a ring over the g
    devices of a group: all-gather and reduce-scatter (g - 1) / g of the whole array, all-reduce twice that.
    """
    computations = _computations(hlo)
    found: dict[str, dict] = {}
    seen: set[tuple] = set()

    def visit(name: str, times: int, scattered: bool) -> None:
        for line in computations.get(name, ()):
            if match := _COLLECTIVE.match(line):
                instruction, shape, op, start = match.groups()
                channel = re.search(r"channel_id=(\d+)", line)
                key = (op, channel[1] if channel else instruction)
                if key in seen:
                    continue
                seen.add(key)
                op = "reduce-scatter" if scattered and op == "all-reduce" else op
                sizes = [_bytes(s) for s in _SHAPE.findall(shape)]
                if start and op == "collective-permute":  # (operand, result, two words for the hardware)
                    sizes = sizes[1:2]
                elif start and op != "all-reduce":  # (operands, results)
                    sizes = sizes[len(sizes) // 2 :]
                whole = sum(sizes)
                entry = found.setdefault(op, {"count": 0, "sent_bytes": 0.0})
                entry["count"] += times
                group = _group_size(line, num_devices)
                if group is None:
                    entry["unread"] = entry.get("unread", 0) + times
                entry["sent_bytes"] += times * _sent(op, whole, group or num_devices, scattered)
                continue
            inner = times
            if " while(" in line:
                inner *= _trip_count(line, computations)
            for callee in _CALL.findall(line):
                visit(callee, inner, scattered or "all-reduce-scatter" in callee)

    entry_name = next((name for name in computations if name.startswith("ENTRY ")), None)
    if entry_name:
        visit(entry_name, 1, False)
    return found


def _computations(hlo: str) -> dict[str, list[str]]:
    """Lines of each computation by name; the entry's name begins with "ENTRY "."""
    computations: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in hlo.splitlines():
        if match := _HEADER.match(line):
            current = computations.setdefault(f"{match[1] or ''}{match[2]}", [])
        elif line.rstrip() == "}":  # not the "}}, …" that ends a kernel's metadata
            current = None
        elif current is not None:
            current.append(line)
    return computations


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
    """How often a loop goes round: as the compiler noted it, or the constant that its counter is compared with over
    what is added to it each time (the loops of a product that gathers as it goes are unrolled, and count by twos)."""
    if known := re.search(r'known_trip_count[^}]*?"n":"(\d+)"', line):
        return int(known[1])
    called = {name: re.search(rf"{name}=%?([\w.\-]+)", line) for name in ("condition", "body")}
    condition, body = (computations.get(match[1], []) if match else [] for match in called.values())
    limit = max(_constants(condition).values(), default=1)
    return -(-limit // _counter_step(condition, body))


_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)")


def _constants(lines: list[str]) -> dict[str, int]:
    return {match[1]: int(match[2]) for match in map(_CONSTANT.search, lines) if match}


def _counter_step(condition: list[str], body: list[str]) -> int:
    """What a loop adds to the element of its state that its condition compares; 1 where the text does not show it."""
    compared = re.search(r"ROOT .* compare\(%?([\w.\-]+),", "\n".join(condition))
    index = compared and re.search(rf"%?{re.escape(compared[1])} = .*index=(\d+)", "\n".join(condition))
    result = re.search(r"ROOT .* tuple\((.*?)\)", "\n".join(body))
    if not index or not result:
        return 1
    name = re.findall(r"%([\w.\-]+)", result[1])[int(index[1])]
    added = re.search(rf"%{re.escape(name)} = .* add\(%?([\w.\-]+), %?([\w.\-]+)\)", "\n".join(body))
    constants = _constants(body)
    return next((constants[operand] for operand in added.groups() if constants.get(operand)), 1) if added else 1


def _bytes(shape: tuple[str, str]) -> int:
    kind, dims = shape
    width = _WIDTH.get(kind) or (1 if kind.startswith("f8") else int(kind[1:]) // 8)
    return width * math.prod(int(d) for d in dims.split(",") if d)


def _group_size(line: str, num_devices: int) -> int | None:
    """Devices that a collective is among; None where they are written in a way that is not known here."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(match[1])
    if match := re.search(
        r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line
    ):  # the order of devices may stand between
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2]))
    return None if re.search(r"replica_groups=(?!\{\})", line) else num_devices


def _sent(op: str, result_bytes: int, group: int, scattered: bool) -> float:
    share = (group - 1) / group
    if op == "all-reduce":
        return 2 * share * result_bytes
    if op == "reduce-scatter" and not scattered:  # its result is one device's part
        return (group - 1) * result_bytes
    return share * result_bytes if op != "collective-permute" else result_bytes


if __name__ == "__main__":
    main()
