"""Named devices: what each computes, holds, draws and costs, each figure with its source.

Power is the board's or chip's limit: what a busy device draws at most, without its host and its cooling. The sheets
named as sources were read in copies, not opened at the vendors'. A figure that no vendor gives is None, and what would
follow from it is not known either.
"""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DTYPE = "bfloat16"  # of training, where advice takes a device's peak
# Tokens of a step that keep one device busy: a sequence as long as those at which the utilisations were published
# (``MFU``).
DEVICE_BATCH = 2048.0

_NVIDIA_H100 = "NVIDIA, H100 Tensor Core GPU datasheet (SXM; dense, half of the figures with sparsity)"


_NVIDIA_H200 = "NVIDIA, H200 Tensor Core GPU datasheet (SXM; dense, half of the figures with sparsity)"


_NVIDIA_B200 = "NVIDIA, DGX B200 datasheet (HGX at 1,000 W; dense, half of the figures with sparsity)"
_NVIDIA_A100 = "NVIDIA, A100 Tensor Core GPU datasheet (SXM 80 GB; dense)"


# GPUs of the hosts that their networks are counted for: HGX and DGX boards.
DEVICES_PER_HOST = 8
# An adapter of 400 Gbit/s for each GPU of a host.
_NETWORK = 50e9
_BASEPOD = (
    "NVIDIA, DGX BasePOD reference architecture, Core Components (eight single-port ConnectX-7, up to 400 Gb/s, for "
    "the eight GPUs of a DGX H100, H200 or B200)"
)
_NVLINK_4 = (
    "18 links of NVLink 4, 900 GB/s both ways (MLCommons, inference results v4.1, NVIDIA's H200-SXM-141GBx8 system; "
    "450 GB/s one way on H100: NVIDIA/nccl issue 1264)"
)
_NVLINK_5 = "NVIDIA, DGX B200 User Guide (NVSwitch: 14.4 TB/s for eight GPUs, both ways)"
# One way, and where it is from.
_NVLINK = {"h100": (450e9, _NVLINK_4), "h200": (450e9, _NVLINK_4), "b200": (900e9, _NVLINK_5)}
# 1600, 4800 and 3200 Gbps.
_INTERCONNECT = {"tpu-v5e": 200e9, "tpu-v5p": 600e9, "tpu-v6e": 400e9}
_ICI = "; all links of a chip together"
_GOOGLE = "Google Cloud, TPU documentation, page {}"


# float32 is what JAX makes of it by default: TF32 on these GPUs, one bfloat16 pass on TPUs.
_TF32 = "; float32 as TF32, JAX's default there"


_ONE_PASS = "; float32 as one bfloat16 pass, JAX's default there"


@dataclass(frozen=True)
class MfuPoint:
    """A published model FLOPs utilisation of training: total parameters, share of the device's dense peak that the
    FLOPs of rule ``exact`` reach."""

    num_params: float
    mfu: float
    source: str


def _foundry(num_params: float, width: int, layers: int, mfu: float, devices: str) -> MfuPoint:
    """A row of llm-foundry's table at 2,048 tokens, its utilisation by the count that plans take.

    They count 6 N + 12 L d T FLOPs a token, positions among N and attention unmasked; rule ``exact`` 6 (N - T d) +
    6 L d T, without the table of positions and with half of the attention. The same tokens/s, another MFU: up to 12 %.
    """
    T = 2048
    theirs = 6 * num_params + 12 * layers * width * T
    exact = 6 * (num_params - T * width) + 6 * layers * width * T
    source = f"MosaicML llm-foundry, scripts/train/benchmarking (sequence {T}, {devices}; {mfu:.1%} by its own count)"
    return MfuPoint(num_params, mfu * exact / theirs, source)


# By their publishers' own counts of FLOPs, which for MaxText's sizes differ from ``exact`` by a few per cent.
_MAXTEXT = "MaxText, configs/v5e, one v5e-256"


_LEVANTER = "Levanter, v4-128"


MFU: dict[str | None, tuple[MfuPoint, ...]] = {
    "h100": (
        _foundry(760_470_528, 1536, 24, 0.349, "8 H100"),
        _foundry(1_315_950_592, 2048, 24, 0.4182, "8 H100"),
        _foundry(6_658_859_008, 4096, 32, 0.4644, "8 H100"),
        _foundry(29_975_214_080, 7168, 48, 0.4392, "32 H100"),
    ),
    "a100": (
        _foundry(125_311_488, 768, 12, 0.4479, "8 A100 of 80 GB"),
        _foundry(355_985_408, 1024, 24, 0.5162, "8 A100 of 80 GB"),
        _foundry(760_470_528, 1536, 24, 0.5685, "8 A100 of 80 GB"),
        _foundry(1_315_950_592, 2048, 24, 0.5986, "8 A100 of 80 GB"),
        _foundry(6_658_859_008, 4096, 32, 0.6423, "8 A100 of 80 GB"),
        _foundry(29_975_214_080, 7168, 48, 0.553, "8 A100 of 80 GB"),
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
    interconnect: float | None = None  # bytes/s that a device sends to others of its host, or slice, all links together
    network: float | None = None  # bytes/s that it sends beyond its host; None: slices have no such border
    price_per_device_hour: float | None = None
    mfu: tuple[MfuPoint, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)

    def flops_per_second(self, dtype: str, num_params: Any, mfu: float | None = None) -> Any:
        """What one device reaches in training: its peak times ``mfu``, or the published one for models of that size,
        a number or an array of them. None where either is not known."""
        peak = self.peak_flops.get(dtype)
        if not peak or (mfu is None and not self.mfu):
            return None
        return peak * (mfu_at(self.mfu, num_params) if mfu is None else mfu)


def _gpu(
    name: str, title: str, bf16: float, tf32: float, memory: float, bandwidth: float, watts: float, price: float,
    mfu: str | None, sheet: str, price_source: str,
) -> Profile:  # fmt: skip
    sources = {"peak_flops": sheet + _TF32, "price_per_device_hour": price_source}
    sources |= dict.fromkeys(("memory_bytes", "memory_bandwidth", "power_watts"), sheet)
    nvlink, nvlink_source = _NVLINK.get(name, (None, ""))
    if nvlink:
        sources |= {"interconnect": nvlink_source, "network": _BASEPOD}
    return Profile(
        name, title, {"bfloat16": bf16, "float32": tf32}, memory, bandwidth, watts, nvlink, nvlink and _NETWORK, price,
        MFU.get(mfu, ()), sources,
    )  # fmt: skip


def _tpu(
    name: str, title: str, bf16: float, memory: float, bandwidth: float, price: float | None, page: str,
    price_source: str,
) -> Profile:  # fmt: skip
    sheet = _GOOGLE.format(page)
    sources = {"peak_flops": sheet + _ONE_PASS, "price_per_device_hour": price_source}
    sources |= {"memory_bytes": sheet, "memory_bandwidth": sheet, "power_watts": "not published"}
    sources["interconnect"] = sheet + _ICI
    return Profile(
        name, title, {"bfloat16": bf16, "float32": bf16}, memory, bandwidth, None, _INTERCONNECT[name], None, price,
        MFU["tpu"], sources,
    )  # fmt: skip


_LAMBDA = "Lambda, on-demand price of 8 together (lambda.ai/instances, read 2026-09-20)"


_RUNPOD = "RunPod, pods on demand (runpod.io/pricing, read 2026-10-07)"


_RUNPOD_B200 = "RunPod, guide to the B200 (runpod.io/articles/guides/nvidia-b200, a copy read 2026-11-28)"
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
        _gpu("b200", "NVIDIA B200 SXM 180 GB", 2250e12, 1125e12, 180e9, 8e12, 1000, 4.99, None,
             _NVIDIA_B200, _RUNPOD_B200),
        _gpu("a100", "NVIDIA A100 SXM 80 GB", 312e12, 156e12, 80e9, 2.039e12, 400, 2.79, "a100",
             _NVIDIA_A100, _LAMBDA),
        _tpu("tpu-v5e", "Google TPU v5e", 197e12, 16e9, 819e9, 1.2, "TPU v5e", _TPU_PRICE),
        _tpu("tpu-v5p", "Google TPU v5p", 459e12, 95e9, 2.765e12, 4.2, "TPU v5p", _TPU_PRICE),
        _tpu("tpu-v6e", "Google TPU v6e", 918e12, 32e9, 1.638e12, None, "TPU v6e", "not found: give --price"),
    )
}  # fmt: skip


def mfu_of(points: tuple[MfuPoint, ...], num_params: float) -> MfuPoint | None:
    """The published utilisation for a size (``mfu_at``), with its source; None where nothing is published."""
    if not points:
        return None
    if num_params <= points[0].num_params:
        return points[0]
    for low, high in itertools.pairwise(points):
        if num_params <= high.num_params:
            source = f"between {low.source} and {high.source}"
            return MfuPoint(num_params, float(mfu_at(points, num_params)), source)
    return points[-1]


def mfu_at(points: tuple[MfuPoint, ...], num_params: np.ndarray | float) -> np.ndarray:
    """Between two published sizes linear in log N; outside them the nearest one's. Shaped like ``num_params``."""
    return np.interp(np.log(num_params), [math.log(p.num_params) for p in points], [p.mfu for p in points])
