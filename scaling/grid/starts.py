"""Which run of the grid each cell starts from: selectors → run_ids, parents before their children.

A cell's ``start: {run: {stage: pretrain}}`` names its parent by coordinates. Of several cells that have them it is the
one that agrees with this cell wherever those differ among themselves: of each size its own, of each seed its own.
"""

import dataclasses
from collections.abc import Sequence

from scaling import accounting
from scaling.config import RunConfig, StartConfig
from scaling.grid import strict
from scaling.grid.cell import Cell, called, select
from scaling.grid.strict import GridError, Leaves, shown


def resolve(cells: Sequence[Cell], wanted: Sequence[Leaves]) -> list[Cell]:
    """Returns the cells with ``run.start`` set where ``wanted``, the start's leaves of each, says so.

    Raises GridError where a selector names none or several, a cell starts from itself in the end, or its model, its
    tokens or the step are not its parent's.
    """
    parents = [_parent(i, cells, leaves) if leaves else None for i, leaves in enumerate(wanted)]
    done: dict[int, Cell] = {}
    for i in range(len(cells)):
        chain = [i]
        while chain[-1] not in done:
            parent = parents[chain[-1]]
            if parent is None:
                done[chain[-1]] = cells[chain[-1]]
            elif parent in done:
                done[chain[-1]] = _started(cells[chain[-1]], done[parent], wanted[chain[-1]])
            elif parent in chain:
                raise GridError(f"{_path(wanted[i])}: {called(cells[i].labels)} starts from itself; write another cell")
            else:
                chain.append(parent)
                continue
            chain.pop()
            if not chain:
                break
    return [done[i] for i in range(len(cells))]


def _path(leaves: Leaves) -> str:
    return leaves.get(("start", "run"), next(iter(leaves.values())))[1]


def _parent(i: int, cells: Sequence[Cell], leaves: Leaves) -> int:
    """Index of the cell that cell ``i`` starts from."""
    path = _path(leaves)
    if ("start", "run") not in leaves:
        raise GridError(f"{path}: start.run is missing; write the coordinates of a cell, e.g. {{stage: pretrain}}")
    selector = leaves["start", "run"][0]
    found = [j for j, chosen in enumerate(select(cells, selector, path)) if chosen]
    coordinates = [{**cell.labels, "seed": cell.run.seed} for cell in cells]
    names = dict.fromkeys(name for j in found for name in coordinates[j])
    differ = [n for n in names if len({shown(coordinates[j].get(n)) for j in found}) > 1]
    same = [j for j in found if all(coordinates[j].get(n) == coordinates[i].get(n) for n in differ)]
    if len(same) != 1:
        raise GridError(
            f"{path}: {shown(selector)} names {len(found)} cells, and {len(same)} of them agree with "
            f"{called(cells[i].labels)} in {', '.join(differ) or 'nothing else'}; write more coordinates of the one"
        )
    return same[0]


def _started(cell: Cell, parent: Cell, leaves: Leaves) -> Cell:
    values = {key[1:]: value for key, (value, _) in leaves.items()} | {("run",): parent.run.run_id}
    start = strict.build(StartConfig, values, leaves, called(cell.labels), ("start",))
    _require_alike(cell.run, parent.run, _path(leaves), called(cell.labels))
    kept = ("name", "momentum_dtype")  # what an optimiser's moments depend on
    if start.take != "params" and any(getattr(cell.run.optim, n) != getattr(parent.run.optim, n) for n in kept):
        raise GridError(
            f"{leaves['start', 'take'][1]}: {start.take}: {called(cell.labels)} has {cell.run.optim.name}, and "
            f"{parent.run.run_id}, whose moments it would take, {parent.run.optim.name}; write the same optim.name and "
            "optim.momentum_dtype in both, or take: params"
        )
    num_steps = accounting.plan(parent.run).num_steps
    if start.step is not None and start.step > num_steps:
        raise GridError(
            f"{leaves['start', 'step'][1]}: {start.step} is past the {num_steps} steps of {parent.run.run_id}; write "
            "one of these, or null for the last"
        )
    return dataclasses.replace(cell, run=dataclasses.replace(cell.run, start=start))


def _require_alike(run: RunConfig, parent: RunConfig, path: str, where: str) -> None:
    """Raises GridError unless the one can take the other's weights, and they mean the same to it."""
    for field in dataclasses.fields(run.model):
        mine, theirs = getattr(run.model, field.name), getattr(parent.model, field.name, None)
        if mine != theirs:
            raise GridError(
                f"{path}: model.{field.name} of {where} is {shown(mine)}, and {shown(theirs)} in the run that it "
                "starts from; write the same in both"
            )
    if run.data.tokenizer != parent.data.tokenizer:
        raise GridError(
            f"{path}: data.tokenizer of {where} is {shown(run.data.tokenizer)}, and {shown(parent.data.tokenizer)} in "
            "the run that it starts from; write the same in both"
        )
    if run.data.bpe_size and run.data.source != parent.data.source:
        raise GridError(
            f"{path}: {shown(run.data.tokenizer)} is trained on the text of its own source, and {where} and the run "
            f"that it starts from read two; write data.tokenizer: file:<the tokenizer.json of one>"
        )


def require_before(cells: Sequence[Cell]) -> None:
    """Raises GridError for a fitted cell that starts from a held-out one, which trains after the fit."""
    held_out = {cell.run.run_id for cell in cells if cell.holdout}
    for cell in cells:
        if cell.run.start is not None and not cell.holdout and cell.run.start.run in held_out:
            raise GridError(
                f"holdout: {called(cell.labels)} starts from {cell.run.start.run}, which is held out and trains after "
                "all that is fitted; hold this one out too"
            )
