"""YAML → a list of cells. The only module that knows YAML."""

from dataclasses import dataclass, field

from scaling.config import ExecutionConfig, FlopRule, ParamCount, RunConfig


@dataclass(frozen=True)
class FitConfig:
    """How the sweep's records are fitted: the same options as ``python -m scaling.fit``."""

    num_params: ParamCount = "non_embedding"
    flops: FlopRule = "exact"
    loss: str = "huber"
    delta: float | None = 1e-3
    bootstrap: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """One run of a grid and its place in it. ``labels`` are the grid's coordinates (budget_flops, size, axes …)."""

    run: RunConfig
    holdout: bool = False
    recipe: str | None = None
    labels: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """A grid file, expanded."""

    name: str  # the file's stem; results/<name>/
    text: str  # the file as it was, for the report
    cells: list[Cell]
    execution: ExecutionConfig
    fit: FitConfig


def load(path) -> Grid:
    raise NotImplementedError
