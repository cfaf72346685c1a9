r"""What runs cost on named devices (``scaling.devices``), in time, money and energy.

Where a machine has been timed (``timings.Timing``) its own seconds stand. Elsewhere

    seconds = FLOPs / (devices · peak · mfu)

with FLOPs by the rule ``exact``, ``peak`` of the run's dtype, and ``mfu`` a published one for models of that size
(``mfu_of``), or the person's own: the training alone, without evaluation, compilation or start-up.

    device-hours = wall hours · devices,   money = device-hours · price,   energy = device-hours · power
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling import accounting
from scaling.config import RunConfig
from scaling.devices import PROFILES, MfuPoint, Profile, mfu_of
from scaling.execution import HardwareConfig


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
        num_params = accounting.param_counts(run.model)["total"]
        rate = self.profile.flops_per_second(run.model.dtype, num_params, self.mfu)
        return flops / (self.devices * rate) if rate else None

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

    def to_json(self) -> dict[str, Any]:
        names = ("name", "title", "memory_bytes", "memory_bandwidth", "power_watts", "price_per_device_hour", "sources")
        return {**{name: getattr(self.profile, name) for name in names}, "devices": self.devices, "mfu": self.mfu}


class EnergyMeter:
    """Joules that the processors' own counters (RAPL) say were drawn since it was made; None where they cannot be read.

    Packages only: not memory, not the board. Linux gives the counters to root alone by default.
    """

    def __init__(self, root: Path = Path("/sys/class/powercap")) -> None:
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
