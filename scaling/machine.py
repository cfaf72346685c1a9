"""What this process may use of its machine: cores and memory, as its affinity and its control groups allow.

A container or a job of a cluster is often given two cores of sixty-four, and is killed where it takes more memory than
its share: ``os.cpu_count()`` and the memory in /proc/meminfo say nothing of either.
"""

import importlib
import importlib.util
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def cores() -> list[int]:
    """The cores to run on: those of the affinity mask, as many as the control group's time is enough for."""
    known = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    quota = _quota()
    if quota is None or quota >= len(known):
        return known
    num = max(1, math.ceil(quota))
    # Another job on this machine may have a quota too: not all are to crowd onto its first cores.
    first = os.getppid() % len(known)
    return sorted((known * 2)[first : first + num])


def memory_bytes() -> int | None:
    """The least of the machine's memory and what its control groups let it have; None where neither is told."""
    limits = [_number(path) for path in _files("memory", "memory.max", "memory.limit_in_bytes")]
    try:
        for line in (ROOT / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                limits.append(1024 * int(line.split()[1]))
    except OSError:
        pass
    known = [limit for limit in limits if limit is not None]
    return min(known, default=None)


def num_killed_for_memory() -> int | None:
    """How many processes the kernel has killed for want of memory: in this control group, else on this machine, since
    it began; None where that is not told."""
    for path in (*_files("memory", "memory.events", "memory.oom_control"), ROOT / "proc/vmstat"):
        try:
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        except (OSError, ValueError):
            continue
    return None


def _quota() -> float | None:
    """Cores' worth of time that the control groups grant, the least of them."""
    shares = []
    for path in _files("cpu", "cpu.max", "cpu.cfs_quota_us"):
        try:
            words = path.read_text().split()
            if path.name == "cpu.cfs_quota_us":
                words.append((path.parent / "cpu.cfs_period_us").read_text())
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):  # "max": no limit
            continue
        if quota > 0 and period > 0:
            shares.append(quota / period)
    return min(shares, default=None)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _files(controller: str, unified: str, legacy: str) -> Iterator[Path]:
    """A control's files that there are, from this process's own group up to the root: every level sets a limit.

    In a container the group's path is that of the host, of which the lower part may be all that is mounted: ancestors
    are looked for in the mounted tree, and what is not there is passed over.
    """
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    home = ROOT / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            bases, name = [home, home / "unified"], unified
        elif controller in controllers.split(","):
            bases, name = [home / controllers, home / controller], legacy
        else:
            continue
        for base in dict.fromkeys(bases):
            inside = Path(path.lstrip("/"))
            for group in (inside, *inside.parents):
                if (base / group / name).is_file():
                    yield base / group / name


# Keeps XLA's temporaries mapped between steps: 1.3-1.4× on CPU. Read by glibc when a process starts, so it can only
# be set for workers; without arena_max=1 there is no gain.
MALLOC_SETTING = (
    "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=1000000000000:glibc.malloc.top_pad=536870912"
)


def worker_environment() -> dict[str, str]:
    """This process's environment plus what workers need from their first instruction on."""
    root = str(Path(__file__).resolve().parents[1])  # so that a checkout works without installation, from any folder
    path = os.environ.get("PYTHONPATH")
    env = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}
    if platform.libc_ver()[0] == "glibc":
        env.setdefault("GLIBC_TUNABLES", MALLOC_SETTING)
    return env


def has_accelerator() -> bool:
    """Whether JAX would pick a device other than the CPU, judged without importing it."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
    gpu = any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd"))
    tpu = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return (gpu and any(map(importlib.util.find_spec, plugins))) or (
        tpu and importlib.util.find_spec("libtpu") is not None
    )


def processor() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
