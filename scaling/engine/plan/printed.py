"""The plan as a table: a line a cell, what it costs, whether it is done."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from scaling.engine.plan.table import Row, size_of
from scaling.numbers import compact, dollars, duration

HIDDEN_LABELS = ("budget_flops", "size", "width", "params")  # the plan's own columns show them


def labels_of(row: Row) -> str:
    shown = {k: v for k, v in row.cell.labels.items() if k not in HIDDEN_LABELS}
    if row.cell.run.seed:
        shown.setdefault("seed", row.cell.run.seed)
    return " ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items())


def plan_table(
    rows: Sequence[Row], found: Mapping[str, str], title: str, share: Callable[..., Any] | None = None
) -> Table:
    """The plan: a row per cell and a last one with the totals. ``share``: a row → its ``hardware.Cost``; money and
    energy are shown where they are known."""
    bills = [share(row) for row in rows] if share else []
    table = Table(title=title, title_justify="left", show_footer=True, box=None, padding=(0, 2, 0, 0))
    total_flops = sum(r.plan.flops["exact"] for r in rows)
    known = [r.seconds for r in rows if r.seconds is not None]
    footer_seconds = duration(sum(known)) if len(known) == len(rows) else "–"
    labels = any(map(labels_of, rows))
    table.add_column("run", footer=f"{len(rows)} cells", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    if labels:
        table.add_column("axes")
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    table.add_column("params", **right)
    table.add_column("tokens", footer=compact(sum(r.plan.num_tokens for r in rows)), **right)
    table.add_column("D/N", **right)
    table.add_column("steps", footer=f"{sum(r.plan.num_steps for r in rows):,}", **right)
    table.add_column("batch", **right)
    table.add_column("FLOPs", footer=f"{total_flops:.2e}", **right)
    table.add_column("time", footer=footer_seconds, **right)
    columns = _columns_of_cost(rows, bills)
    for name, footer, _ in columns:
        table.add_column(name, footer=footer, **right)
    table.add_column("", no_wrap=True)
    for i, row in enumerate(rows):
        p = row.plan
        cells = [row.run_id, size_of(row), *([labels_of(row)] if labels else [])]
        cells += [f"{p.num_params['non_embedding']:,}", compact(p.num_tokens), compact(p.tokens_per_param)]
        cells += [f"{p.num_steps:,}", str(row.cell.run.batch_size), f"{p.flops['exact']:.2e}"]
        cells += [duration(row.seconds), *(values[i] for _, _, values in columns), _note(row, found)]
        table.add_row(*cells, style="dim" if row.run_id in found else "")
    return table


def _columns_of_cost(rows: Sequence[Row], bills: Sequence[Any]) -> list[tuple[str, str, list[str]]]:
    """Header, footer and values of memory, money and energy, those of them that are known of any cell."""
    memory = [row.memory_bytes for row in rows]
    columns = []
    if any(memory):
        columns.append(("memory", "", ["–" if m is None else f"{compact(m)}B" for m in memory]))
    for name, write in (("dollars", dollars), ("kwh", lambda v: "–" if v is None else f"{v:.2g}")):
        values = [getattr(bill, name) for bill in bills]
        if any(v is not None for v in values):
            total = write(None if None in values else sum(values))
            columns.append(("cost" if name == "dollars" else "kWh", total, [write(v) for v in values]))
    return columns


def _left_out(row: Row) -> int:
    """Tokens of a horizon of epochs that its whole steps do not reach; below 0, tokens that they go beyond it."""
    return round(row.plan.requested_tokens) - row.plan.num_tokens if "epochs" in row.cell.labels else 0


def _note(row: Row, found: Mapping[str, str]) -> str:
    notes = ["held out"] if row.cell.holdout else []
    if left := _left_out(row):  # of epochs that end within a batch
        notes.append(f"{left:,} tokens left out" if left > 0 else f"{-left:,} tokens once more")
    if row.first_step:
        notes.append(f"from step {row.first_step:,}")
    if row.cell.run.start is not None:
        notes.append(f"starts from {row.cell.run.start.run}")
    status = found.get(row.run_id)
    if status:
        notes.append("done" if status == "completed" else status)
    return ", ".join(notes)
