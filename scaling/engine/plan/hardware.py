r"""Named hardware: what a device computes, holds, draws and costs, each figure with its source; and a run's cost there.

Where a machine has been timed (``timings.Timing``) its own seconds stand. Elsewhere

    seconds = FLOPs / (devices · peak · mfu)

with FLOPs by the rule ``exact``, ``peak`` of the run's dtype, and ``mfu`` a published one for models of that size
(``mfu_of``), or the person's own: the training alone, without evaluation, compilation or start-up.

    device-hours = wall hours · devices,   money = device-hours · price,   energy = device-hours · power

Power is the board's or chip's limit: what a busy device draws at most, without its host and its cooling. The
sheets named as sources were read in copies, not opened at the vendors'. A figure that no vendor gives is None, and what
would follow from it is not known either.
"""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

from scaling import accounting
from scaling.config import RunConfig
from scaling.execution import HardwareConfig

_NVIDIA_H100 = "NVIDIA, H100 Tensor Core GPU datasheet (SXM; dense, half of the figures with sparsity)"
_NVIDIA_H200 = "NVIDIA, H200 Tensor Core GPU datasheet (SXM; dense, half of the figures with sparsity)"
_NVIDIA_A100 = "NVIDIA, A100 Tensor Core GPU datasheet (SXM 80 GB; dense)"
_GOOGLE = "Google Cloud, TPU documentation, page {}"

# float32 is what JAX makes of it by default: TF32 on these GPUs, one bfloat16 pass on TPUs.
_TF32 = "; float32 as TF32, JAX's default there"
_ONE_PASS = "; float32 as one bfloat16 pass, JAX's default there"


@dataclass(frozen=True)
class MfuPoint:
    """A published model FLOPs utilisation of training: total parameters, share of the device's dense peak."""

    num_params: float
    mfu: float
    source: str


_FOUNDRY = "MosaicML llm-foundry, scripts/train/benchmarking (sequence 2048, {})"
_MAXTEXT = "MaxText, configs/v5e, one v5e-256"
_LEVANTER = "Levanter, v4-128"

MFU = {
    "h100": tuple(
        MfuPoint(n, mfu, _FOUNDRY.format("8 to 32 H100"))
        for n, mfu in ((7.6e8, 0.349), (1.316e9, 0.418), (6.66e9, 0.464), (3.0e10, 0.439))
    ),
    "a100": tuple(
        MfuPoint(n, mfu, _FOUNDRY.format("8 A100"))
        for n, mfu in ((1.25e8, 0.428), (3.56e8, 0.492), (7.6e8, 0.529), (1.316e9, 0.562), (6.66e9, 0.509))
    ),
    "tpu": (
        MfuPoint(7.5e7, 0.104, _LEVANTER),
        MfuPoint(3.0e8, 0.212, _LEVANTER),
        MfuPoint(1.6e10, 0.611, _MAXTEXT),
        MfuPoint(3.2e10, 0.669, _MAXTEXT),
        MfuPoint(6.4e10, 0.599, _MAXTEXT),
        MfuPoint(1.28e11, 0.561, _MAXTEXT),
    ),
}


@dataclass(frozen=True)
class Profile:
    """One device. ``sources`` says of each figure where it is from; prices are on demand, in US dollars, and move."""

    name: str
    title: str
    peak_flops: dict[str, float] = field(default_factory=dict)  # FLOP/s by compute dtype
    memory_bytes: float | None = None
    memory_bandwidth: float | None = None  # bytes/s
    power_watts: float | None = None
    price_per_device_hour: float | None = None
    mfu: tuple[MfuPoint, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)


def _gpu(name, title, bf16, tf32, memory, bandwidth, watts, price, mfu, sheet, price_source) -> Profile:
    sources = {"peak_flops": sheet + _TF32, "price_per_device_hour": price_source}
    sources |= dict.fromkeys(("memory_bytes", "memory_bandwidth", "power_watts"), sheet)
    return Profile(name, title, {"bfloat16": bf16, "float32": tf32}, memory, bandwidth, watts, price, MFU[mfu], sources)


def _tpu(name, title, bf16, memory, bandwidth, price, page, price_source) -> Profile:
    sheet = _GOOGLE.format(page)
    sources = {"peak_flops": sheet + _ONE_PASS, "price_per_device_hour": price_source}
    sources |= {"memory_bytes": sheet, "memory_bandwidth": sheet, "power_watts": "not published"}
    return Profile(
        name, title, {"bfloat16": bf16, "float32": bf16}, memory, bandwidth, None, price, MFU["tpu"], sources
    )


_LAMBDA = "Lambda, on-demand price of 8 together (lambda.ai/instances, read 2026-09-20)"
_RUNPOD = "RunPod, pods on demand (runpod.io/pricing, read 2026-10-07)"
_TPU_PRICE = "Google Cloud's price as quoted in How to Scale Your Model, part 8 (2025-02-03)"

PROFILES: dict[str, Profile] = {
    p.name: p
    for p in (
        # Its speed is measured; what it draws and costs only its owner knows.
        Profile("cpu", "this machine's processors", sources={"price_per_device_hour": "not known: give --price"}),
        _gpu("h100", "NVIDIA H100 SXM 80 GB", 989.4e12, 494.7e12, 80e9, 3.35e12, 700, 3.99, "h100",
             _NVIDIA_H100, _LAMBDA),
        _gpu("h200", "NVIDIA H200 SXM 141 GB", 989.4e12, 494.7e12, 141e9, 4.8e12, 700, 4.59, "h100",
             _NVIDIA_H200, _RUNPOD),
        _gpu("a100", "NVIDIA A100 SXM 80 GB", 312e12, 156e12, 80e9, 2.039e12, 400, 2.79, "a100",
             _NVIDIA_A100, _LAMBDA),
        _tpu("tpu-v5e", "Google TPU v5e", 197e12, 16e9, 819e9, 1.2, "TPU v5e", _TPU_PRICE),
        _tpu("tpu-v5p", "Google TPU v5p", 459e12, 95e9, 2.765e12, 4.2, "TPU v5p", _TPU_PRICE),
        _tpu("tpu-v6e", "Google TPU v6e", 918e12, 32e9, 1.638e12, None, "TPU v6e", "not found: give --price"),
    )
}  # fmt: skip


def mfu_of(points: tuple[MfuPoint, ...], num_params: float) -> MfuPoint | None:
    """Between two published sizes linear in log N; outside them the nearest one's. None where nothing is published."""
    if not points:
        return None
    if num_params <= points[0].num_params:
        return points[0]
    for low, high in itertools.pairwise(points):
        if num_params <= high.num_params:
            share = math.log(num_params / low.num_params) / math.log(high.num_params / low.num_params)
            return MfuPoint(
                num_params, low.mfu + share * (high.mfu - low.mfu), f"between {low.source} and {high.source}"
            )
    return points[-1]


@dataclass(frozen=True)
class Cost:
    """What some wall time comes to; None: not known."""

    seconds: float | None
    device_hours: float | None
    dollars: float | None
    kwh: float | None


@dataclass(frozen=True)
class Hardware:
    """A profile as a grid and the command line have it: ``devices`` of them, all busy with this sweep alone."""

    profile: Profile
    devices: int = 1
    mfu: float | None = None  # the person's own, of every size
    is_here: bool = True  # the machine that the command runs on: its own timings stand

    @classmethod
    def of(cls, config: HardwareConfig, *, has_accelerator: bool) -> "Hardware":
        """The profile that ``config`` names (none: this machine's), with its own figures in place."""
        profile = PROFILES[config.name or "cpu"]
        if config.name is None and has_accelerator:
            profile = Profile("here", "this machine's accelerators", sources=PROFILES["cpu"].sources)
        changed = {
            name: value
            for name in ("price_per_device_hour", "power_watts")
            if (value := getattr(config, name)) is not None
        }
        if changed:
            sources = profile.sources | dict.fromkeys(changed, "given")
            profile = Profile(**{**vars(profile), **changed, "sources": sources})
        is_here = config.name is None or (config.name != "cpu") == has_accelerator
        return cls(profile, config.devices or 1, config.mfu, is_here)

    def seconds(self, run: RunConfig, flops: float) -> float | None:
        """Time of ``flops`` exact training FLOPs of this run on all devices; None without peak or MFU."""
        peak, mfu = self.profile.peak_flops.get(run.model.dtype), self.mfu_for(run)
        return flops / (self.devices * peak * mfu.mfu) if peak and mfu else None

    def mfu_for(self, run: RunConfig) -> MfuPoint | None:
        num_params = accounting.param_counts(run.model)["total"]
        if self.mfu is not None:
            return MfuPoint(num_params, self.mfu, "given")
        return mfu_of(self.profile.mfu, num_params)

    def cost(self, wall_seconds: float | None) -> Cost:
        """Of holding all devices for ``wall_seconds``."""
        if wall_seconds is None:
            return Cost(None, None, None, None)
        hours = wall_seconds * self.devices / 3600
        price, watts = self.profile.price_per_device_hour, self.profile.power_watts
        dollars = None if price is None else hours * price
        return Cost(wall_seconds, hours, dollars, None if watts is None else hours * watts / 1000)

    def to_json(self) -> dict:
        names = ("name", "title", "memory_bytes", "memory_bandwidth", "power_watts", "price_per_device_hour", "sources")
        return {**{name: getattr(self.profile, name) for name in names}, "devices": self.devices, "mfu": self.mfu}


class EnergyMeter:
    """Joules that the processors' own counters (RAPL) say were drawn since it was made; None where they cannot be read.

    Packages only: not memory, not the board. Linux gives the counters to root alone by default.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")):
        self._packages = [p for p in sorted(root.glob("intel-rapl:*")) if p.name.count(":") == 1]
        self._started = [_read_int(p / "energy_uj") for p in self._packages]

    def kwh(self) -> float | None:
        """Since the meter was made. A counter that wrapped (every few hours at full load) is unwrapped once."""
        total = 0
        for package, started in zip(self._packages, self._started):
            now = _read_int(package / "energy_uj")
            if started is None or now is None:
                return None
            total += (
                now - started if now >= started else now - started + (_read_int(package / "max_energy_range_uj") or 0)
            )
        return total / 3.6e12 if self._packages else None


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
