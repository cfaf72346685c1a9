"""Shows a sweep while it runs: live progress with an ETA, a line for every cell that ended.

On a terminal the progress is redrawn in place, at most twice a second; elsewhere it is a plain line a minute.
"""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from scaling.engine.plan import timetable
from scaling.engine.plan.packing import Pack
from scaling.engine.plan.printed import labels_of
from scaling.engine.plan.table import Row, size_of
from scaling.numbers import compact, duration
from scaling.records import RunRecord
from scaling.terminal import text

REDRAW_SECONDS = 0.5
PLAIN_SECONDS = 60.0
PACE_SECONDS = 5.0  # of the plan's, behind a pace that is believed before any cell has ended


class Progress:
    """Follows an executor's events: ``with Progress(...) as progress: runner.run(tasks, progress.on_event)``.

    ``in_place``: whether it is redrawn in place; None where the console is a terminal.
    """

    def __init__(
        self, console: Console, packs: Sequence[Pack], *, workers: int, done: int, total: int,
        in_place: bool | None = None,
    ):  # fmt: skip
        self._console, self._workers = console, workers
        in_place = console.is_terminal if in_place is None else in_place
        self._waiting = {pack.key: pack for pack in packs}  # and running; a pack leaves when it ended
        self._trunks = {run_id: pack.key for pack in packs for run_id in pack.carried}
        self._running: dict[int, str] = {}  # worker → key
        self._at: dict[str, dict] = {}  # key → last progress event
        self._started: dict[str, float] = {}
        self._observed = self._predicted = 0.0  # seconds of the packs that ended
        self._done, self._total = done, total
        self._live = Live(console=console, auto_refresh=False, transient=True) if in_place else None
        self._every = REDRAW_SECONDS if self._live else PLAIN_SECONDS
        self._begin = time.monotonic()
        self._next = self._begin + self._every

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._live:
            self._live.stop()

    def on_event(self, event: dict) -> None:
        key: Any = event.get("key")
        kind = event["event"]
        if kind == "start":
            self._running[event["worker"]] = key
            self._started[key] = time.monotonic()
        elif kind == "progress":
            now = time.monotonic()
            first = self._at.get(key) or {"first_step": event["step"], "first_time": now}
            self._at[key] = {**event, **{name: first[name] for name in ("first_step", "first_time")}, "time": now}
        elif kind == "said":
            self._console.print(event["text"], soft_wrap=True)
        elif kind == "cell":
            self.cell_ended(event["row"], event["record"])
        elif kind in ("done", "failed", "retry"):
            self._ended(event)
        self._redraw()

    def _ended(self, event: dict) -> None:
        key = event["key"]
        self._running.pop(event["worker"], None)
        if event["event"] == "retry":
            said = f" {key}  {event['reason']}; goes on from its last checkpoint"
            self._console.print(text(("·", "yellow"), said), soft_wrap=True)
            return
        pack = self._waiting.pop(key)
        if event["event"] == "done" and pack.cost[0] and key in self._at:
            at = self._at[key]
            steps = pack.steps_left(at["first_step"], at["num_steps"])  # resumed: not all of it was now
            self._observed += time.monotonic() - self._started[key]
            self._predicted += pack.cost[0] * steps / max(1, pack.num_steps)

    def cell_ended(self, row: Row, record: RunRecord) -> None:
        """Prints the line of a cell that ended."""
        self._done += 1
        total = str(self._total)
        head = f"{self._done:>{len(total)}}/{total}  {row.run_id}  {size_of(row):>6}  {labels_of(row)}".rstrip()
        num_params, num_tokens = record.num_params["non_embedding"], record.num_tokens
        counts = f"{compact(num_params):>5} parameters  {compact(num_tokens):>5} tokens"
        seconds = record.timing.get("seconds")
        took = f"{duration(seconds)} (predicted {duration(row.seconds)})"
        if record.status == "completed":
            error = f" ± {record.standard_error:.4f}" if record.standard_error is not None else ""
            loss = (f"{record.loss:.4f}", "bold")
            line = text(("✓", "green"), f" {head}  {counts}  loss ", loss, f"{error}  {took}")
        elif record.status == "diverged":
            ending = f" at step {record.diverged_at_step}  {took}"
            line = text(("✗", "red"), f" {head}  {counts}  ", ("diverged", "red"), ending)
        else:
            line = text(("✗", "red"), f" {head}  ", ("failed", "red"), f": {record.environment['failure']}")
        self._console.print(line, soft_wrap=True)

    def seconds_left(self) -> float | None:
        """The schedule of what is left, at the pace of the cells that ended and of those that run; None if nothing can
        be said. A branch costs its own steps, and waits for its trunk to get to it."""
        if not all(pack.cost[0] for pack in self._waiting.values()):
            return None
        left = {}  # steps
        for key, pack in self._waiting.items():
            at = self._at.get(key)
            left[key] = pack.steps_left(at["step"], at["num_steps"]) if at else pack.num_steps
        running = set(self._running.values())
        works = []
        for key, pack in self._waiting.items():
            after = []
            for row in pack.rows:
                trunk = self._waiting.get(self._trunks.get(row.run_id))  # type: ignore[arg-type]  # None is no key
                if trunk is not None:
                    done = trunk.num_steps - left[trunk.key]
                    after.append((trunk.key, (trunk.steps_before(row) - done) / max(1, left[trunk.key])))
            seconds = pack.cost[0] * left[key] / max(1, pack.num_steps)
            works.append(timetable.Work(key, seconds, tuple(after), key in running))
        return self._pace() * timetable.wall(works, self._workers)

    def _pace(self) -> float:
        """Seconds that steps took over those that the plan gave them."""
        observed, predicted = self._observed, self._predicted
        for key in self._running.values():
            if (at := self._at.get(key)) and at["time"] > at["first_time"]:
                pack = self._waiting[key]
                observed += at["time"] - at["first_time"]
                predicted += pack.cost[0] * (at["step"] - at["first_step"]) / max(1, pack.num_steps)
        return observed / predicted if predicted >= PACE_SECONDS or self._predicted else 1.0

    def _summary(self) -> str:
        left = duration(self.seconds_left())
        return f"{self._done}/{self._total} cells  {duration(time.monotonic() - self._begin)} gone, {left} left"

    def _redraw(self) -> None:
        begun = time.monotonic()
        if begun < self._next:
            return
        if self._live:
            self._live.update(self._render(), refresh=True)
        else:
            self._console.print(f"… {self._summary()}")
        ended = time.monotonic()
        # Of a large grid the schedule of what is left takes its time: at most a twentieth of it all.
        self._next = ended + max(self._every, 20.0 * (ended - begun))

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2, 0, 0))
        for worker, key in sorted(self._running.items()):
            row = self._waiting[key].rows[0]
            name = f"{key} {size_of(row):>6}"
            if len(self._waiting[key].rows) > 1:
                name += f" +{len(self._waiting[key].rows) - 1}"
            at = self._at.get(key)
            if at is None:
                table.add_row(f"worker {worker}", name, ProgressBar(1, 0, width=24), "starting", "")
                continue
            loss = "" if at["loss"] is None else f"loss {at['loss']:.4f}"
            bar = ProgressBar(at["num_steps"], at["step"], width=24)
            table.add_row(f"worker {worker}", name, bar, f"step {at['step']:,} of {at['num_steps']:,}", loss)
        return Group(Text(), table, Text(self._summary(), style="bold"))
