"""Where and how runs are executed, which no run_id sees: mesh, memory, checkpoints, hardware of a plan."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from scaling.devices import PROFILES
from scaling.fields import Strict, require, require_positive


@dataclass(frozen=True)
class MeshConfig(Strict):
    """Sizes of the mesh axes. One of ``data`` and ``fsdp`` may be -1: whatever devices the others leave."""

    run: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in ("run", "tensor"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "an integer ≥ 1")
        for name in ("data", "fsdp"):
            value = getattr(self, name)
            require(value == -1 or value >= 1, name, value, "an integer ≥ 1, or -1 for all that are left")
        require(self.data != -1 or self.fsdp != -1, "fsdp", self.fsdp, "data beside it: only one of them can be -1")


@dataclass(frozen=True)
class ExecutionConfig(Strict):
    """How runs are executed: changes speed and memory, and results only by rounding. Not part of ``run_id``."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    scan_layers: bool | None = None  # null: unrolled on CPU up to 12 layers, scanned elsewhere
    # What of a layer is computed again in the backward pass: nothing; all but its matrix products; all of it; all of
    # it, its input waiting in the host's memory (GPU and TPU).
    remat: Literal["none", "dots", "full", "offload"] = "none"
    # Tokens of a device whose logits are there at once, in float32; the backward pass computes them again. null: all
    # of them while that is at most 128 MiB.
    loss_chunk_tokens: int | None = None
    # A batch in as many parts, one after another, its gradient the mean of theirs. null: whole; where one CPU device
    # does it all, in parts of a thousand tokens or a little more, which its caches hold better.
    accumulation_steps: int | None = None
    attention: Literal["auto", "einsum", "block_causal", "cudnn", "splash"] = "auto"
    trunks: bool = True  # runs that differ in horizon alone share their steps up to the first cooldown
    checkpoint_seconds: float = 30.0
    disk_budget_gb: float = 20.0  # checkpoints of this sweep, all runs together
    keep_final_checkpoint: bool = False  # else a run's checkpoints are deleted once its record is written
    eval_batch_size: int = 16  # sequences; whole groups where a loss is of several, one at the least
    tensorboard: bool = False  # step logs under the work folder
    wandb: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "checkpoint_seconds", "disk_budget_gb", "eval_batch_size")
        for name in ("loss_chunk_tokens", "accumulation_steps"):
            if getattr(self, name) is not None:
                require_positive(self, name)

    @property
    def asked_parts(self) -> int:
        """Parts of a batch that the grid asks for; 1 where it leaves them open, as everywhere but on one CPU device."""
        return self.accumulation_steps or 1


def program_execution(execution: ExecutionConfig) -> ExecutionConfig:
    """``execution`` with everything that the compiled programs do not depend on, what the host alone reads, set to its
    default."""
    plain = ExecutionConfig()
    names = ("trunks", "checkpoint_seconds", "disk_budget_gb", "keep_final_checkpoint", "tensorboard", "wandb")
    return dataclasses.replace(execution, **{name: getattr(plain, name) for name in names})


@dataclass(frozen=True)
class HardwareConfig(Strict):
    """What a plan counts time, money and energy on. Not part of ``run_id``. What is null is the profile's of that name
    (``scaling.devices``; no name: this machine's)."""

    name: str | None = None
    devices: int | None = None
    price_per_device_hour: float | None = None  # US dollars
    power_watts: float | None = None  # of one device
    mfu: float | None = None  # share of the peak that training reaches

    def __post_init__(self) -> None:
        require(self.name is None or self.name in PROFILES, "name", self.name, f"one of {', '.join(PROFILES)}")
        for name in ("devices", "price_per_device_hour", "power_watts", "mfu"):
            if getattr(self, name) is not None:
                require_positive(self, name)
        require(self.mfu is None or self.mfu <= 1, "mfu", self.mfu, "a share of the peak in (0, 1], as 0.4")
