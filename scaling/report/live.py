"""What the page's own scripts read: runs under every count, laws by convention, what answers questions, machines."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling import devices, records, storage
from scaling.config import num_params_of
from scaling.report.figures import drawing

COUNTS = ("non_embedding", "total", "active")
DIGITS = 6


def of(fit: Mapping, runs: Sequence[records.RunRecord], folder: Path, page: Path, unit: str) -> dict[str, Any]:
    """Returns it as plain numbers, for JSON in the page.

    Args:
      fit: fit.json, completed.
      folder: the results folder, or that of a group in one.
      page: the HTML file, from which records are linked; None of them where no path leads from one to the other.
    """
    return {
        "ask": fit.get("ask") or None,
        "machines": machines(),
        "unit": unit,
        "convention": dict(drawing.convention(fit)),
        "laws": _laws(fit, folder),
        "runs": _runs([run for run in runs if run.status == "completed"]),
        "records": _records_from(page, folder),
    }


def machines() -> list[dict[str, Any]]:
    """The devices a deadline may be asked on: those with a published peak and utilisation (``scaling.devices``)."""
    known = [p for p in devices.PROFILES.values() if p.peak_flops and p.mfu]
    return [
        {"name": p.name, "title": p.title, "peak_flops": p.peak_flops[devices.DTYPE], "batch": devices.DEVICE_BATCH,
         "price": p.price_per_device_hour, "mfu": [[point.num_params, point.mfu] for point in p.mfu]}
        for p in known
    ]  # fmt: skip


def _runs(runs: Sequence[records.RunRecord]) -> dict[str, Any]:
    """Columns, a place for each run."""
    rules = [rule for rule in (runs[0].flops if runs else ()) if all(rule in run.flops for run in runs)]
    counts = [c for c in COUNTS if c != "active" or any("active" in run.num_params for run in runs)]
    return {
        "id": [run.run_id for run in runs],
        "cell": [_cell(run.sweep.get("labels") or {}) for run in runs],
        "held_out": [int(bool(run.sweep.get("holdout"))) for run in runs],
        "budget": [(run.sweep.get("labels") or {}).get("budget_flops") for run in runs],
        "counts": {c: [num_params_of(run.num_params, c) for run in runs] for c in counts},
        "flops": {rule: _short(run.flops[rule] for run in runs) for rule in rules},
        "num_tokens": [run.num_tokens for run in runs],
        "loss": _short(run.loss for run in runs),
        "error": _short(run.standard_error for run in runs),
        "rate": _short(run.config["optim"]["peak_lr"] for run in runs),
        "batch": [run.batch_tokens for run in runs],
    }


def _cell(labels: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, (int, float)) else str(value)
        for name, value in sorted(labels.items())
        if name != "budget_flops"
    )


def _laws(fit: Mapping, folder: Path) -> list[dict[str, Any]]:
    """The law of two powers by each convention under which these runs were fitted: in fit.json, in fit/fit.json, which
    ``python -m scaling.fit`` writes beside it, and of both the values under other conventions."""
    found = []
    for name, known in (("fit.json", fit), ("fit/fit.json", records.read_json(folder / "fit" / "fit.json"))):
        if known.get("ask"):
            found.append({**known["convention"], **known["ask"], "source": name})
        others = [*(known.get("recounted") or ()), *(known.get("conventions") or ())]
        found += [{**row, **row["ask"], "source": f"{name}, values alone"} for row in others if row.get("ask")]
    keys = ("num_params", "flops", "best", "cost", "source")
    return [{key: law[key] for key in keys} | {"name": law["law"]} for law in found]


def _records_from(page: Path, folder: Path) -> str | None:
    home = folder if (folder / "runs").is_dir() else folder.parent
    if storage.is_remote(home) or storage.is_remote(page):
        return None
    return Path(os.path.relpath(home / "runs", page.parent)).as_posix() + "/"


def _short(values: Iterable[float | None]) -> list[float | None]:
    return [None if v is None else float(f"{v:.{DIGITS}g}") for v in values]
