"""Makes a plan the one that a call goes by: shown, told to who listens, kept with the cells and in the manifest."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from scaling import records
from scaling.engine import show
from scaling.engine.call import Call
from scaling.engine.errors import BadInputError
from scaling.engine.plan import lint
from scaling.engine.plan.plan import Plan


def adopt(plan: Plan, call: Call, find: Callable[[], list[lint.Finding]]) -> None:
    """Prints a plan and goes by it from here on; ``find`` says what is doubtful about the grid.

    Raises BadInputError for warnings under ``--strict``, or a file that cannot be written.
    """
    options, console = call.options, call.console
    call.cells.adopt(plan)
    call.manifest.dropped = plan.dropped
    show.show(console, plan, call.cells.found, options.grid)
    call.events({
        "event": "plan", "cells": len(plan.rows), "todo": [row.run_id for row in plan.todo],
        "workers": plan.bill.workers, **dataclasses.asdict(plan.bill.total),
    })  # fmt: skip
    # The grid's execution and the command's workers, as whose the timings are kept.
    workers = "" if options.num_workers is None else f" --workers {options.workers}"
    bench = f"python -m scaling.bench --grid {options.grid} --packs {{packs}}{workers}"
    show.show_packs(console, plan, call.timings, bench)
    show.show_trunks(console, plan, have_trunks=call.grid.execution.trunks)
    findings = find() if plan.todo or options.plan else []
    show.show_findings(console, findings)
    if findings and options.strict:
        many = "s" if len(findings) > 1 else ""
        raise BadInputError(f"--strict: {len(findings)} warning{many} about this grid, above")
    call.manifest.warnings = [finding.text for finding in findings]
    if options.json:
        _write(options.json, plan, findings)


def _write(path: Path, plan: Plan, findings: Sequence[lint.Finding]) -> None:
    try:
        warnings = [dataclasses.asdict(f) for f in findings]
        records.write_json(path, {**plan.bill.to_json(plan.packs), "warnings": warnings})
    except OSError as e:
        raise BadInputError(f"--json {path}: {e.strerror}: write a file that can be written") from None
