"""From the records of a sweep to what it says: the forecast of its held-out cells, its laws, its report."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from scaling import numbers, records, storage
from scaling.config import num_params_of
from scaling.engine.folder.cells import Cells
from scaling.engine.folder.forecast import Forecast, digest
from scaling.engine.folder.manifest import Manifest
from scaling.engine.plan.table import Row
from scaling.engine.run.events import Sink
from scaling.grid import FitConfig
from scaling.records import read_or_empty
from scaling.terminal import text

FORECAST_LEVEL = 0.90
# Of the time that cells train, at most this share of one core goes into the page of what is in by then.
WATCH_SHARE, WATCH_AFTER_SECONDS = 0.01, 30.0


def get_ready() -> None:
    """Imports what laws and report are made with: a second that all cores would wait for after the training."""
    from scaling import fit  # noqa: F401
    from scaling.report import page  # noqa: F401


class Watch:
    """Has the page of a sweep written again while it trains, as its cells end: a listener to events.

    In a thread, at most ``WATCH_SHARE`` of the time, and not in the first half minute: a short sweep has its page soon
    anyway. A page that cannot be written is said once and stops no training.
    """

    def __init__(self, results: Path, console: Console):
        self._results, self._console = results, console
        self._next = time.monotonic() + WATCH_AFTER_SECONDS
        self._thread: threading.Thread | None = None

    def __call__(self, event: dict) -> None:
        if event["event"] != "cell" or time.monotonic() < self._next or storage.is_remote(self._results):
            return
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._write, daemon=True)
            self._thread.start()

    def _write(self) -> None:
        begun = time.monotonic()
        try:
            from scaling.report import provisional

            provisional.build(self._results)
        except Exception as e:  # whatever it is, the training matters more
            self._console.print(f"no provisional report: {storage.first_line(e)}", soft_wrap=True)
            self._next = float("inf")
            return
        self._next = time.monotonic() + (time.monotonic() - begun) / WATCH_SHARE

    def end(self) -> None:
        """Waits for a page that is being written, so that it does not replace the one of the whole sweep."""
        if self._thread is not None:
            self._thread.join()


class Conclusion:
    """What the records of ``cells`` come to: one set of laws, or one for each of the grid's groups."""

    def __init__(self, cells: Cells, fit_config: FitConfig, manifest: Manifest, console: Console):
        self._cells, self._manifest, self._console = cells, manifest, console
        self._laws = [Laws(cells, path, fit_config, console) for path in cells.apart()]
        compared = [Comparison(cells, fit_config)] if fit_config.compare is not None else []
        self._answers: list[Laws | Comparison] = [*self._laws, *compared]

    @contextlib.contextmanager
    def watched(self, events: Sink) -> Iterator[None]:
        """While it lasts the page is written again as cells end."""
        watch = Watch(self._cells.results, self._console)
        try:
            with events.heard_by(watch):
                yield
        finally:
            watch.end()

    def analysis(self):
        """The laws of what is in, of a grid whose runs are of one law; of one that compares groups, how they compare.

        Raises ValueError where there is too little for any.
        """
        return self._answers[-1].analysis()

    def forecast(self, held_out: Sequence[Row]) -> bool:
        """Forecasts loss and interval of the held-out cells that are about to train, once and for all; whether they
        may train now, which they may not before all fitted cells are in: one that failed is not, one that diverged is.

        Raises ValueError if forecast.json was edited or is damaged.
        """
        found = self._cells.found
        fitted = [found.get(row.run_id) for row in self._cells.rows if not row.cell.holdout]
        missing, failed = fitted.count(None), fitted.count("failed")
        if missing or failed:
            how_many = [f"{missing} of those are not in yet"] * bool(missing) + [f"{failed} failed"] * bool(failed)
            mend = "; or take those that fail again out of the grid" if failed else ""
            self._console.print(
                f"{len(held_out)} held-out cells wait: they are forecast first, from all fitted cells, and "
                f"{' and '.join(how_many)}; give this command again when they are{mend}", soft_wrap=True
            )  # fmt: skip
            return False
        with self._manifest.in_turn():
            for laws in self._laws:
                laws.add_to_forecast()
        return True

    def conclude(self) -> None:
        """Fits and reports, unless that was done from the same inputs, and prints the laws and what they cost.

        Every cell has a record. Raises ValueError if one of the folder's files cannot be read.
        """
        from scaling.laws.answers import precision
        from scaling.report import printed, words

        page = self._cells.results / "report.html"
        is_new = [answer.fit() for answer in self._answers]
        is_stale = not all(_is_newer(page, answer.path) for answer in self._answers)
        if any(is_new) or is_stale or (not storage.is_remote(page) and words.is_provisional(page)):
            from scaling.report.page import build

            page = build(self._cells.results)
        for answer in self._answers:
            payload = read_or_empty(answer.path)
            self._console.print(*([text(("\n" + answer.name, "bold"))] if answer.name else []))
            if "error" in payload:
                self._console.print(f"{answer.without}: {payload['error']}", soft_wrap=True)
            else:
                printed.show(self._console, payload)
        self._show_strangers()
        runs = self._cells.recorded()
        for sentence in precision.sentences(precision.of(runs)):
            self._console.print(text(("note", "yellow"), f" {sentence}"), soft_wrap=True)
        _show_plan_against_actual(self._console, read_or_empty(self._manifest.path), runs)
        self._console.print(f"report: {page}")

    def _show_strangers(self) -> None:
        """Names the laws that a call with another ``fit.by`` left in the results: nothing here renews them."""
        folders = [self._cells.results, *self._cells.results.glob("*=*")]
        others = sorted({path / "fit.json" for path in folders} - {answer.path for answer in self._answers})
        left = [str(path) for path in others if path.exists()]
        if left:
            self._console.print(
                f"from another fit.by, no longer renewed, delete them: {', '.join(left)}", soft_wrap=True
            )


class Laws:
    """Fits the laws of one group of cells, or of all of them, into fit.json of its folder, ``path``.

    ``Cells.apart`` says which rows are whose.
    """

    without = "no laws"  # what is said where they could not be fitted

    def __init__(self, cells: Cells, path: Path, fit_config: FitConfig, console: Console):
        self.name = "" if path == cells.results else path.name
        self._cells, self._folder, self._fit_config, self._console = cells, path, fit_config, console

    @property
    def path(self) -> Path:
        return self._folder / "fit.json"

    @property
    def _rows(self) -> list[Row]:
        """The rows whose laws these are; cells that a budget has left out since are no longer among them."""
        return self._cells.apart()[self._folder]

    def _recorded(self) -> list[records.RunRecord]:
        return [self._cells.record(row) for row in self._rows if row.run_id in self._cells.found]

    # ---- the forecast -----------------------------------------------------------------------------------------------

    def add_to_forecast(self) -> None:
        """Forecasts those of its held-out cells that neither were forecast nor are in. Raises ValueError."""
        forecast = Forecast(self._folder)
        known = {entry["run_id"] for entry in forecast.entries}
        new = [r for r in self._rows if r.cell.holdout and r.run_id not in known and not self._cells.is_done(r)]
        if not new:
            return
        from scaling import fit

        self._console.print("fitting the finished cells, to forecast those held out …")
        cells = {row.run_id: self._as_forecast(row) for row in new}
        try:
            predicted = fit.forecast(self._analysis(self._recorded()), list(cells.values()), level=FORECAST_LEVEL)
        except ValueError as e:
            self._console.print(f"{self.name}{': ' if self.name else ''}no forecast: {e}", soft_wrap=True)
            return
        fitted = [r for r in self._rows if not r.cell.holdout and self._cells.found.get(r.run_id) == "completed"]
        forecast.add(
            [{**cells[entry["run_id"]], **entry, "level": FORECAST_LEVEL} for entry in predicted],
            [row.run_id for row in fitted],
        )

    def _as_forecast(self, row: Row) -> dict:
        """A cell as ``fit.forecast`` takes it, counted by the fit's conventions."""
        return {
            "run_id": row.run_id,
            "num_params": num_params_of(row.plan.num_params, self._fit_config.num_params),
            "num_tokens": row.plan.num_tokens,
            "flops": row.plan.flops[self._fit_config.flops],
        }

    def _forecast_against_actual(self) -> list[dict]:
        forecast = Forecast(self._folder)
        if not forecast.is_intact:
            self._console.print(f"{forecast.path}: does not match its own sha256: it was edited")
        mine = {r.run_id: r for r in self._rows if r.cell.holdout and r.run_id in self._cells.found}
        trained = [entry for entry in forecast.entries if entry["run_id"] in mine]
        return [{**entry, "actual": self._cells.record(mine[entry["run_id"]]).loss} for entry in trained]

    # ---- the laws ---------------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        """Writes fit.json, unless it is there and from the same inputs; whether it did."""
        from scaling.laws.answers import of_runs

        inputs = self._inputs_sha256()
        if read_or_empty(self.path).get("inputs_sha256") == inputs:
            return False
        forecast = self._forecast_against_actual()
        runs = self._recorded()
        try:
            found = self._analysis(runs)
            payload = found.to_json() | {"recounted": self._recounted(found, runs)}
            payload["warnings"] = [*records.changed_sides(runs), *payload["warnings"]]
        except ValueError as e:
            payload = {"schema": 1, "error": str(e)}
        answers = of_runs.complete(payload, runs)
        if self._folder == self._cells.results:
            answers |= _rounds_told(self._folder)
        records.write_json(self.path, answers | {"forecast": forecast, "inputs_sha256": inputs})
        return True

    def analysis(self):
        """The laws of what is in. Raises ValueError when that is too little for any."""
        return self._analysis(self._recorded())

    def _analysis(self, runs: Sequence[records.RunRecord]):
        """The laws of the fitted among ``runs``. Raises ValueError when they are too few for any."""
        from scaling import fit

        options = self._fit_config.options
        return fit.analyse(records.table(runs), records.curves(runs), source=str(self._folder), **options)

    def _recounted(self, found, runs: Sequence[records.RunRecord]) -> list[dict]:
        """The law of N and D under every count and rule that the records carry: values alone."""
        from scaling.laws.answers import comparison
        from scaling.laws.payload import finite

        fitted = found.fits.get(found.surface)
        if fitted is None or fitted.loss.name == "asymmetric":
            return []
        objective = {"loss": fitted.loss.name, "delta": fitted.loss.delta, "source": str(self._folder)}
        try:
            return finite(comparison.conventions(records.table(runs), fitted.form, bootstrap=0, **objective))
        except ValueError:  # a count that these runs do not identify: the page shows points alone
            return []

    def _inputs_sha256(self) -> str:
        return _inputs_sha256(self._cells, self._rows, self._folder, self._fit_config)


class Comparison:
    """Compares the groups of a grid (``fit.compare``), into fit.json of the results folder."""

    without = "no comparison"

    def __init__(self, cells: Cells, fit_config: FitConfig):
        self.name = f"compared by {fit_config.compare}"
        self._cells, self._fit_config = cells, fit_config

    @property
    def path(self) -> Path:
        return self._cells.results / "fit.json"

    def fit(self) -> bool:
        """Writes fit.json, unless it is there and from the same inputs; whether it did."""
        from scaling.laws.payload import of_comparison

        rows = [row for group in self._cells.apart().values() for row in group]
        inputs = _inputs_sha256(self._cells, rows, self._cells.results, self._fit_config)
        if read_or_empty(self.path).get("inputs_sha256") == inputs:
            return False
        try:
            compared = self._compared([row for row in rows if row.run_id in self._cells.found])
            payload = of_comparison(compared, dataclasses.asdict(self._fit_config))
        except ValueError as e:
            payload = {"schema": 1, "error": str(e), "multiplier": {"column": self._fit_config.compare}}
        payload |= _rounds_told(self._cells.results)
        records.write_json(self.path, payload | {"inputs_sha256": inputs})
        return True

    def analysis(self):
        """How the groups compare by what is in. Raises ValueError when that is too little."""
        rows = [row for group in self._cells.apart().values() for row in group]
        return self._compared([row for row in rows if row.run_id in self._cells.found])

    def _compared(self, rows: Sequence[Row]):
        """The comparison of the fitted among ``rows``, group by group. Raises ValueError where there can be none."""
        from scaling.laws.answers.multiplier import compare

        options = dataclasses.asdict(self._fit_config)
        laws, column, _ = options.pop("laws"), options.pop("compare"), options.pop("by")
        runs = [self._cells.record(row) for row in rows]
        table = records.with_coordinate(records.table(runs), runs, column)
        return compare(table, column, law=laws[0] if laws else None, source=str(self._cells.results), **options)


def _rounds_told(results: Path) -> dict:
    """fit.json's ``design``, of a sweep that buys its cells in rounds."""
    from scaling.laws.answers import rounds

    design = read_or_empty(results / "sweep.json").get("design")
    return {"design": rounds.told(design)} if design else {}


def _inputs_sha256(cells: Cells, rows: Sequence[Row], folder: Path, fit_config: FitConfig) -> str:
    """Of all that answers and report are made from: records, forecast, manifest, options and the code that makes them.
    Equal: nothing to do again."""
    here = Path(__file__).parent
    made_by = [*here.glob("*.py"), *(here / "laws").rglob("*.py"), *(here / "report").rglob("*.py")]
    code = [*made_by, *(f for kind in ("html", "js", "css") for f in (here / "report").rglob(f"*.{kind}"))]
    paths = [records.path_of(cells.results, row.run_id) for row in rows] + sorted(code)
    paths += [folder / "forecast.json", cells.results / "sweep.json"]
    return digest(paths, repr(fit_config))


def _is_newer(path: Path, than: Path) -> bool:
    """Whether ``path`` is there and was written after ``than``: a call may have been killed between the two."""
    if storage.is_remote(path):  # its clock goes by whole seconds, or not at all: the report is made again
        return False
    return path.exists() and path.stat().st_mtime_ns >= than.stat().st_mtime_ns


def _show_plan_against_actual(console: Console, manifest: dict, runs: Sequence[records.RunRecord]) -> None:
    """One line: what the plan said and what came of it."""
    rows = {row["key"]: row for row in records.plan_against_actual(manifest, runs)}
    parts = []
    if (wall := rows.get("wall")) and wall["ratio"]:
        took, said = numbers.duration(wall["actual"]), numbers.duration(wall["planned"])
        parts.append(f"{took} for {said} planned ({wall['ratio'] - 1:+.0%})")
    if cells := rows.get("cells"):
        parts.append(f"a cell {cells['ratio']:.2f} of its plan ({cells['low']:.2f} to {cells['high']:.2f})")
    if idle := rows.get("idle"):
        parts.append(f"{idle['actual']:.1%} of training not in steps")
    if money := rows.get("dollars"):
        parts.append(f"{numbers.dollars(money['actual'])} for {numbers.dollars(money['planned'])} planned")
    if energy := rows.get("measured_kwh") or rows.get("kwh"):
        parts.append(f"{energy['actual']:.3g} kWh")
    if parts:
        console.print(f"plan against actual: {'; '.join(parts)}", soft_wrap=True)
