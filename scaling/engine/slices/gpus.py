"""GPUs that are not here: their names, what XLA is told of them, and the memory that JAX takes of one.

``h100:8`` is one host of 8, ``h200:2x8`` two hosts of 8. XLA compiles for a description, without a GPU or a driver; the
wheels that do it (extra ``gpu-plan``) are best installed in an environment of their own: beside the CPU's JAX they make
every process that does not set JAX_PLATFORMS log a failure to load cuDNN.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from scaling.devices import DEVICES_PER_HOST

# JAX's own default and the settings that change it (docs.jax.dev, GPU memory allocation; jaxlib/xla_client.py).
MEMORY_FRACTION = 0.75
FRACTION_SETTINGS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclass(frozen=True)
class Description:
    """What XLA's compiler asks of a GPU; from XLA's own files, xla/backends/gpu/target_config/specs/NAME.txtpb in
    openxla/xla (h100_sxm, h200, b200)."""

    title: str
    num_cores: int  # streaming multiprocessors
    clock_ghz: float
    memory_bytes: int
    bytes_per_second: int
    cache_bytes: int  # L2
    capability: tuple[int, int]

    def text(self) -> str:
        """Writes it as a GpuTargetConfigProto. A field that jaxlib does not know is an error: only those of 0.10."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: {self.num_cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {self.bytes_per_second}
  l2_cache_size: {self.cache_bytes}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: ACCELERATED_FEATURES }}
  driver_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.title}"
"""


DESCRIPTIONS = {
    "h100": Description("NVIDIA H100 80GB HBM3", 132, 1.98, 84_942_979_072, 3_352_320_000_000, 52_428_800, (9, 0)),
    "h200": Description("NVIDIA H200 141GB HBM3e", 132, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800, (9, 0)),
    "b200": Description("NVIDIA B200", 148, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864, (10, 0)),
}


@dataclass(frozen=True)
class Topology:
    """Hosts of equal GPUs."""

    name: str  # of ``DESCRIPTIONS`` and ``devices.PROFILES``
    hosts: int
    per_host: int

    @property
    def description(self) -> Description:
        return DESCRIPTIONS[self.name]


def parse(topology: str) -> Topology | None:
    """Reads ``h100:8`` or ``h200:2x8``; None where the name is of no GPU here.

    Raises ValueError for a shape that is none, and for more GPUs in a host than such hosts have.
    """
    name, _, shape = topology.partition(":")
    if name not in DESCRIPTIONS:
        return None
    match = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape)
    if not match:
        raise ValueError(f"--topology {topology}: write {name}:8, or hosts × devices as {name}:2x8")
    hosts, per_host = int(match[1] or 1), int(match[2])
    if per_host > DEVICES_PER_HOST:
        full, rest = divmod(hosts * per_host, DEVICES_PER_HOST)
        instead = f"{name}:{full + bool(rest)}x{DEVICES_PER_HOST}"
        raise ValueError(f"--topology {topology}: a host has {DEVICES_PER_HOST} {name} at most: write {instead}")
    return Topology(name, hosts, per_host)


def require_wheels(topology: str) -> None:
    """Raises ValueError, saying what to install, where XLA's compiler for GPUs or NVIDIA's assembler is missing."""
    install = "python3 -m venv .gpu && .gpu/bin/pip install '.[gpu-plan]', and .gpu/bin/python for this command"
    if importlib.util.find_spec("jax_cuda13_plugin") is None or importlib.util.find_spec("jax_plugins") is None:
        raise ValueError(
            f"--topology {topology}: jax-cuda13-plugin compiles for it and is not installed: write {install}"
        )
    if not _has_assembler():
        raise ValueError(f"--topology {topology}: ptxas is not here (wheel nvidia-cuda-nvcc): write {install}")


def _has_assembler() -> bool:
    try:
        importlib.metadata.version("nvidia-cuda-nvcc")
    except importlib.metadata.PackageNotFoundError:
        return shutil.which("ptxas") is not None or Path("/usr/local/cuda/bin/ptxas").exists()
    return True


def memory_fraction() -> tuple[float, str]:
    """The share of a GPU's memory that JAX will own, and the setting that says so.

    Raises ValueError for a setting that is no share.
    """
    for name in FRACTION_SETTINGS:
        if given := os.environ.get(name, ""):
            try:
                share = float(given)
            except ValueError:
                share = 0.0
            if not 0 < share <= 1:
                raise ValueError(f"{name} is {given!r}: write a share of the device's memory in (0, 1], as .9")
            return share, f"{name}={given}"
    return MEMORY_FRACTION, f"JAX's default; {FRACTION_SETTINGS[0]} changes it"


def owned_bytes(name: str) -> int:
    """Bytes of one ``name`` that JAX will own."""
    return int(memory_fraction()[0] * DESCRIPTIONS[name].memory_bytes)


# ---- in the process that compiles -----------------------------------------------------------------------------------


def devices(topology: Topology) -> list:
    """Returns compile-only devices, a host's own beside each other, and lets fused attention be traced for them."""
    from jax.experimental import topologies

    _let_cudnn_be_traced(topology.description)
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x{topology.hosts}x{topology.per_host}",
        target_config=topology.description.text(),
    )  # fmt: skip
    return described.devices


def limit_of(device) -> tuple[int, str] | None:
    """Bytes of a GPU that JAX owns, or will, and by which setting; None for one that does not say, and no GPU.

    XLA compiles for a GPU what does not fit it: whoever asks must compare.
    """
    if device.platform != "gpu":
        return None
    described = [name for name, known in DESCRIPTIONS.items() if known.title == device.device_kind]
    try:
        stats = device.memory_stats() or {}
    except Exception:  # a compile-only device has none to give, and says so by an error of JAX's
        return (owned_bytes(described[0]), memory_fraction()[1]) if described else None
    return (stats["bytes_limit"], "as it reports") if "bytes_limit" in stats else None


def checked_with() -> str:
    """Names the versions that a program was compiled with."""
    import jax

    try:
        version, is_here = _cudnn()
    except ImportError:  # a GPU of another plugin's
        return f"JAX {jax.__version__}"
    said = f"{version // 10_000}.{version // 100 % 100}.{version % 100}"
    return f"JAX {jax.__version__}, cuDNN {said}{'' if is_here else ' (that it was built with: it is not installed)'}"


def _cudnn() -> tuple[int, bool]:
    """The version of cuDNN, and whether it is installed; else that which JAX was built with."""
    from jax_cuda13_plugin import _versions

    try:
        return _versions.cudnn_get_version(), True
    except RuntimeError:
        return _versions.cudnn_build_version(), False


def _let_cudnn_be_traced(description: Description) -> None:
    """Answers, where JAX asks the machine it runs on, with the version of cuDNN that JAX was built with and the GPU's
    own compute capability: without cuDNN tracing fails, and of the CPU's backend it takes heads wider than 128 for too
    wide. These are private names of JAX 0.10 and 0.11; where they are not, tracing says what is missing."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    def version() -> int:
        return _cudnn()[0]

    def has(capability: str) -> bool:
        return description.capability >= tuple(int(part) for part in capability.split("."))

    def equals(capability: str) -> bool:
        return description.capability == tuple(int(part) for part in capability.split("."))

    fused.check_cudnn_version = version
    fused.check_compute_capability = has
    fused.is_cuda_compute_capability_equal = equals
