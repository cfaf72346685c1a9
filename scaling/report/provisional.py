"""The page of a sweep that still runs: what is in, what is missing, and laws of those runs alone, marked as such."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scaling import records, storage
from scaling.laws.answers import of_runs
from scaling.report import page

LAWS = ("chinchilla",)


def build(results_dir: Path) -> Path:
    """Writes report.html of what is in by now, without figures, which take longer than all else; returns its path.

    Laws are fitted without draws, so that their intervals are the profile's; those of groups apart stand side by side.
    Raises ValueError where there is no record yet or a file cannot be read.
    """
    folder = storage.folder(results_dir)
    runs = records.load_records(folder)
    if not runs:
        raise ValueError(f"{folder}/runs: no records: run the sweep first")
    manifest = records.manifest(folder)
    groups = tuple(_groups(folder, runs, manifest))
    fit = of_runs.complete({} if groups else _laws(runs, str(folder)), runs)
    forecast = records.read_json(folder / "forecast.json")
    known = page.Results(folder, runs, fit, manifest, forecast, groups=groups, is_provisional=True)
    return page.write(known, folder / "report.html", saved=())


def _groups(folder: Path, runs: list[records.RunRecord], manifest: Mapping[str, Any]) -> Iterator[page.Results]:
    """Each group that has a record, as its own folder will have it, with a law of what is in."""
    for name, ids in (manifest.get("groups") or {}).items():
        mine = set(ids)
        if part := [run for run in runs if run.run_id in mine]:
            cells = [cell for cell in manifest.get("cells") or [] if cell["run_id"] in mine]
            fit = of_runs.complete(_laws(part, str(folder / name)), part)
            yield page.Results(folder / name, part, fit, {"name": name, "cells": cells}, {})


def _laws(runs: list[records.RunRecord], source: str) -> dict:
    from scaling.laws.analysis import analyse

    try:
        return analyse(records.table(runs), laws=LAWS, bootstrap=0, combined=False, source=source).to_json()
    except ValueError as e:
        return {"schema": 1, "error": str(e)}


def is_running(results: page.Results) -> bool:
    """Whether cells of the grid that need a record have none yet, or the rounds of its design go on."""
    design = results.manifest.get("design")
    if design and not design.get("stopped"):
        return True
    done = {run.run_id for run in results.runs}
    cells = results.manifest.get("cells") or []
    return any(c["run_id"] not in done and c.get("status") not in page.NOT_RUN for c in cells)


def renew(results_dir: Path) -> Path:
    """Writes the page of a results folder as things stand: provisional while cells are missing, else the whole one."""
    if is_running(dataclasses.replace(page.read(results_dir), groups=())):
        return build(results_dir)
    return page.build(results_dir)
