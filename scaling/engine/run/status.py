"""Prints who trains what, where and how far: the table that ``--status`` makes of the signs in the work folder.

Nothing here takes a lock or imports JAX: any machine that sees the folders can look.
"""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scaling import numbers, records, storage
from scaling.engine.folder import lock
from scaling.engine.folder.cells import is_done, statuses
from scaling.engine.folder.signs import STALE_SECONDS, read_signs
from scaling.engine.plan import trunks
from scaling.engine.plan.table import Row, predicted_wall, size_of, step_flops
from scaling.records import read_or_empty
from scaling.terminal import text
from scaling.training import checkpoint


def show(
    console: Console, rows: Sequence[Row], results: Path, workdir: Path, queued: Mapping[str, str] | None = None,
    *, have_trunks: bool = True,
) -> None:  # fmt: skip
    """Prints where a sweep is: counts and an estimate of what is left, then a line for every cell that runs, waits
    or did not complete. ``queued``: what a cluster's queue says of cells that it holds, by run_id; ``have_trunks``:
    whether cells carry each other."""
    found, complaints = statuses(results, [row.run_id for row in rows], set_aside=False)
    for line in complaints:
        console.print(line.replace(": set aside, the run is done again", ": the next call does it again"))
    signs = [sign for sign in read_signs(workdir) if "ended" not in sign]
    running = {run_id: (sign, pack) for sign in signs for pack in sign["packs"] for run_id in pack["run_ids"]}
    running = {run_id: at for run_id, at in running.items() if not is_done(found, run_id)}
    live = {run_id: at for run_id, at in running.items() if at[0]["alive"]}
    now = _now(rows, found, workdir, live, have_trunks)
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(5):
        table.add_column(no_wrap=True)
    for row in rows:
        status = found.get(row.run_id)
        if status == "completed":
            continue
        name = [row.run_id, size_of(row)]
        if row.run_id in live:
            table.add_row(*name, *_running_line(*live[row.run_id]))
        elif status is not None:
            table.add_row(*name, text((status, "red")), *_ending(results, row.run_id))
        else:
            table.add_row(*name, *_waiting_line(row.run_id, now, running, queued or {}, workdir))
    console.print(_counts(rows, found, live, _seconds_left(rows, now, found, results, live)), soft_wrap=True)
    if table.row_count:
        console.print(table)
    for line in [*_holder(results, signs), *_logs(workdir)]:
        console.print(line, soft_wrap=True)


def _counts(rows: Sequence[Row], found: Mapping[str, str], live: Mapping, left: float | None) -> Text:
    counts = {status: sum(found.get(r.run_id) == status for r in rows) for status in ("completed", "diverged")}
    counts["failed"] = sum(found.get(r.run_id) == "failed" and r.run_id not in live for r in rows)
    counts["running"] = len(live)
    counts["waiting"] = len(rows) - sum(counts.values())
    parts = [text(f"{counts[k]} {k}") for k in ("completed", "running", "waiting")]
    parts += [text((f"{counts[k]} {k}", "red")) for k in ("diverged", "failed") if counts[k]]
    ending = f"; about {numbers.duration(left)} left" if left else ""
    return text((f"{len(rows)} cells", "bold"), ": ", text(", ").join(parts), ending)


def _running_line(sign: dict, pack: dict) -> tuple[Text, str, str]:
    now = time.time()
    state = text(("running", "green"))
    if "step" in pack:
        step = f"step {pack['step']:,} of {pack['num_steps']:,}"
        loss = "" if pack["loss"] is None else f"loss {pack['loss']:.4f}  "
        said = f"{loss}{numbers.duration(now - pack['progressed'])} ago"
    else:
        step, said = "starting", f"since {numbers.duration(now - pack['since'])}"
    place = f"job {sign['job']}" if sign.get("job") else f"process {sign['pid']}, worker {pack.get('worker', 0)}"
    silence = now - sign["updated"]
    if silence > STALE_SECONDS / 2:
        said += f", no sign of life for {numbers.duration(silence)}"
    return state, step, f"{said}  {sign['host']}, {place}"


def _waiting_line(
    run_id: str, now: Mapping[str, Row], running: Mapping, queued: Mapping[str, str], workdir: Path
) -> tuple[str | Text, str, str]:
    saved = checkpoint.newest_step(workdir, run_id)
    at = f"saved at step {saved:,}" if saved else ""
    if run_id in running:  # its writer is gone
        sign, _ = running[run_id]
        silence = numbers.duration(time.time() - sign["updated"])
        said = f"no sign from {sign['host']} for {silence}: the next call goes on with it"
        return text(("stale", "yellow")), at, said
    words = [queued[run_id]] if run_id in queued else []
    row = now[run_id]
    need = row.need_among(now)
    if need is not None:
        words.append(f"{'branches off' if row.trunks else 'starts from'} {need.run_id} at step {need.step:,}")
    return "waiting", at, ", ".join(words)


def _ending(results: Path, run_id: str) -> tuple[str, str]:
    record = records.read(records.path_of(results, run_id))
    if record.status == "diverged":
        return f"at step {record.diverged_at_step:,}", ""
    return "", record.environment.get("failure", "")


def _holder(results: Path, signs: Iterable[dict]) -> list[str]:
    holder = lock.holder(results)
    if holder:
        return [f"held by process {holder.get('pid')} on {holder.get('host')}, since {holder.get('started')}"]
    return [] if any(sign["alive"] for sign in signs) else ["no sweep is at work on it"]


def _logs(workdir: Path) -> list[str]:
    if storage.is_remote(workdir):  # logs grow: they are on the disk of whoever trains
        return []
    return [f"logs: {path}" for path in (workdir / "logs", workdir / "slurm" / "jobs") if path.is_dir()]


def _now(rows: Sequence[Row], found: Mapping, workdir: Path, live: Mapping, have_trunks: bool) -> dict[str, Row]:
    """What is not done of the rows, by run_id: from which step on each trains by itself, and who carries it there."""
    left = [row for row in rows if not is_done(found, row.run_id)]
    steps = {row.run_id: checkpoint.newest_step(workdir, row.run_id) for row in left}
    for run_id in steps.keys() & live.keys():
        steps[run_id] = max(steps[run_id], live[run_id][1].get("step", 0))
    if have_trunks:
        return {row.run_id: row for row in trunks.share(left, steps)}
    return {row.run_id: dataclasses.replace(row, first_step=steps[row.run_id]) for row in left}


def _seconds_left(
    rows: Sequence[Row], now: Mapping[str, Row], found: Mapping, results: Path, live: Mapping
) -> float | None:
    """A schedule of what is left on as many workers as now run, at the pace seen so far; None if nothing was seen.

    A step weighs what was predicted of it, or its FLOPs where not all cells have a prediction. A branch is its own
    steps, and waits for its trunk to get to it.
    """
    weights = _weights(rows, results)
    weight = seconds = 0.0
    for row in rows:
        if found.get(row.run_id) == "completed":
            timing = records.read(records.path_of(results, row.run_id)).timing
            weight += weights[row.run_id] * (row.plan.num_steps - (timing.get("branch_step") or 0))
            seconds += timing.get("seconds") or 0.0
    packs = {pack["key"]: pack for _, pack in live.values()}
    for pack in packs.values():
        if pack.get("step", 0) > pack.get("first_step", 0):
            weight += (pack["step"] - pack["first_step"]) * sum(weights[run_id] for run_id in pack["run_ids"])
            seconds += pack["progressed"] - pack["since"]
    if not packs or not weight or not seconds:
        return None
    pace = seconds / weight
    left = [dataclasses.replace(row, seconds=pace * weights[row.run_id] * row.own_steps) for row in now.values()]
    return predicted_wall(left, len(packs), live)


def _weights(rows: Sequence[Row], results: Path) -> dict[str, float]:
    """By run_id, what one of its own steps weighs."""
    mine = {row.run_id for row in rows}
    listed = read_or_empty(results / "sweep.json").get("cells", [])
    cells = {cell["run_id"]: cell for cell in listed if cell["run_id"] in mine}
    if all(cells.get(row.run_id, {}).get("predicted_seconds") for row in rows):
        return {
            run_id: cell["predicted_seconds"] / max(1, cell["num_steps"] - cell.get("branch_step", 0))
            for run_id, cell in cells.items()
        }
    return {row.run_id: step_flops(row.cell.run) for row in rows}
