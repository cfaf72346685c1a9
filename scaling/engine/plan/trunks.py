"""Which cells of a grid share a trajectory, up to where, and what that saves.

Under a schedule that is flat until it cools down, runs that differ in horizon and cooldown alone are one run until the
first of them cools down. Of such a family the run that is flat longest, the trunk, is trained once and carries the
others as riders, each to where one of the two cools down; from there a rider goes on by itself, like a run that was
interrupted there. With cooldown share c and horizons D this costs

    (1 - c) D_max + c ΣD    instead of    ΣD.

Held-out cells train after their forecast, so a fitted trunk is never longer for their sake; but it carries them too,
and among themselves they are a family again.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scaling import accounting
from scaling.config import DivergenceConfig, Horizon, RunConfig
from scaling.engine.plan.table import Need, Row, step_flops
from scaling.fields import canonical_json


def flat_steps(row: Row) -> int:
    return accounting.flat_steps(row.cell.run, row.plan)


def _neutral(run: RunConfig, **changes: Any) -> RunConfig:
    schedule = dataclasses.replace(run.optim.schedule, cooldown_fraction=0.0, final_lr_fraction=0.0)
    return dataclasses.replace(
        run,
        optim=dataclasses.replace(run.optim, warmup_tokens=0, schedule=schedule, **changes),
        horizon=Horizon(steps=1),
        eval=dataclasses.replace(run.eval, num_points=0),
        divergence=DivergenceConfig(),
    )


def _family_key(row: Row) -> str:
    """Equal for runs whose states are equal while both are flat."""
    if flat_steps(row) < 1:
        return row.run_id
    return f"{row.plan.warmup_steps} {canonical_json(_neutral(row.cell.run))}"


def families(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows, in lists of those that share a trajectory; most are often alone."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(_family_key(row), []).append(row)
    return list(found.values())


def together(rows: Iterable[Row], *, share: bool) -> list[list[Row]]:
    """The rows, in lists of those that one machine has to train: a run and what starts from it, and, where they
    ``share`` steps, ``families``."""
    units = {row.run_id: unit for unit in (families(rows) if share else [[row] for row in rows]) for row in unit}
    for row in [row for unit in list(units.values()) for row in unit]:
        if row.start is not None and row.start.run_id in units:
            mine, theirs = units[row.run_id], units[row.start.run_id]
            if mine is not theirs:
                theirs += mine
                units |= {other.run_id: theirs for other in mine}
    return list({id(unit): unit for unit in units.values()}.values())


def share(rows: Sequence[Row], steps: Mapping[str, int] | None = None) -> list[Row]:
    """The rows with who carries each of them, and from which step on it trains by itself; in the order given.

    ``steps``: the newest checkpoint of each run that has one (by run_id). A run that is past where it would branch off
    goes on by itself. A run whose state another starts from trains those steps itself.
    """
    at = {row.run_id: (steps or {}).get(row.run_id, 0) for row in rows}
    found: dict[str, list[Need]] = {row.run_id: [] for row in rows}
    first_start = _first_starts(rows)
    points = dict.fromkeys(at, 0)
    for family in families(rows):
        held_out = [row for row in family if row.cell.holdout]
        for phase in ([row for row in family if not row.cell.holdout], held_out):
            waiting = sorted(phase, key=lambda r: (flat_steps(r), r.plan.num_steps, r.run_id))
            later = held_out if phase is not held_out else []
            while waiting:
                trunk = waiting.pop()
                start = at[trunk.run_id]
                for rider in [*waiting, *later]:
                    branch = min(flat_steps(trunk), flat_steps(rider))
                    may_ride = at[rider.run_id] < branch <= first_start.get(rider.run_id, branch)
                    if may_ride and branch >= start:  # saved right there: it branches off at once
                        at[rider.run_id] = branch
                        found[rider.run_id].append(Need(trunk.run_id, branch))
                        points[trunk.run_id] += sum(start < s <= branch for s in _eval_steps(rider))
                waiting = [r for r in waiting if trunk.run_id not in {need.run_id for need in found[r.run_id]}]
    return [
        dataclasses.replace(
            row, first_step=at[row.run_id], trunks=tuple(found[row.run_id]), extra_points=points[row.run_id]
        )
        for row in rows
    ]


def _first_starts(rows: Iterable[Row]) -> dict[str, int]:
    """By run_id, the first step whose state another run starts from."""
    found: dict[str, int] = {}
    for row in rows:
        start = row.cell.run.start
        if start is not None and start.step is not None:
            found[start.run] = min(start.step, found.get(start.run, start.step))
    return found


def _eval_steps(row: Row) -> list[int]:
    return accounting.eval_steps(row.plan.num_steps, row.cell.run.eval.num_points)


def flops(rows: Sequence[Row]) -> dict[str, float]:
    """Exact training FLOPs of rows from ``share``: ``asked`` if each trained alone, ``spent``, and their ``ratio``."""
    asked = sum(step_flops(row.cell.run) * row.plan.num_steps for row in rows)
    spent = sum(step_flops(row.cell.run) * row.own_steps for row in rows)
    return {"asked": asked, "spent": spent, "ratio": spent / asked if asked else 1.0}


def describe(rows: Sequence[Row]) -> list[str]:
    """A line on what sharing saves, and one on what keeps cells of one model and another horizon from sharing."""
    lines = []
    riders = sum(bool(row.trunks) for row in rows)
    if riders:
        total = flops(rows)
        lines.append(
            f"trunks: {riders} of {len(rows)} cells branch off another; {total['asked']:.2e} FLOPs asked, "
            f"{total['spent']:.2e} spent, ratio {total['ratio']:.3f}"
        )
    started = sum(row.cell.run.start is not None for row in rows)
    if started:
        lines.append(f"starts: {started} of {len(rows)} cells begin with the weights of another")
    reason = _why_not(rows)
    return lines + ([f"trunks: {reason}"] if reason else [])


# Fields of a run that a recipe sets by its horizon, and values that any optimiser may have.
_BY_RECIPE = {"peak_lr": 0.5, "beta2": 0.5, "weight_decay": 0.0}


def _why_not(rows: Sequence[Row]) -> str | None:
    alone = [family[0] for family in families(rows) if len(family) == 1]
    groups: dict[str, list[Row]] = {}
    largest = max((row.cell.run.batch_size for row in alone), default=1)  # an objective may not allow smaller ones
    for row in alone:
        run = dataclasses.replace(row.cell.run, batch_size=largest)
        key = canonical_json(_neutral(run, **_BY_RECIPE))
        groups.setdefault(key, []).append(row)
    apart = [g for g in groups.values() if len({r.plan.num_tokens for r in g}) > 1]
    if not apart:
        return None
    count = sum(map(len, apart))
    head = f"{count} cells that differ in horizon share nothing"
    schedules = {row.cell.run.optim.schedule.name for group in apart for row in group}
    if not schedules & {"wsd", "constant", "inverse_sqrt"}:
        return f"{head}: schedule {', '.join(sorted(schedules))} knows its end from the start; write wsd to share"
    names = {
        "batch_size": lambda r: r.cell.run.batch_size,
        "optim.warmup_tokens": lambda r: r.cell.run.optim.warmup_tokens,
    }
    names |= {f"optim.{n}": lambda r, n=n: getattr(r.cell.run.optim, n) for n in _BY_RECIPE}  # type: ignore[misc]  # n is bound by its default
    differ = [name for name, of in names.items() if any(len({of(row) for row in group}) > 1 for group in apart)]
    return f"{head}: {', '.join(differ)} differ with it, by the recipe; write them under base to share"
