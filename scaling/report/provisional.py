"""The page of a sweep that still runs: what is in, what is missing, and laws of those runs alone, marked as such."""

import dataclasses
from pathlib import Path

from scaling import records, storage
from scaling.laws.answers import of_runs
from scaling.report import page

LAWS = ("chinchilla",)


def build(results_dir: Path) -> Path:
    """Writes report.html of what is in by now, without figures, which take longer than all else; returns its path.

    The law is fitted without draws, so it has no intervals; laws of groups apart wait for the end of the sweep. Raises
    ValueError where there is no record yet or a file cannot be read.
    """
    folder = storage.folder(results_dir)
    runs = records.load_records(folder)
    if not runs:
        raise ValueError(f"{folder}/runs: no records: run the sweep first")
    manifest = records.manifest(folder)
    fit = of_runs.complete({} if manifest.get("groups") else _laws(runs, str(folder)), runs)
    known = page.Results(folder, runs, fit, manifest, records.read_json(folder / "forecast.json"), is_provisional=True)
    return page.write(known, folder / "report.html", saved=())


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
