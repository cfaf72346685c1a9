"""Opens runs, fits laws to them, and gives both with their figures, as a notebook wants them.

    study = scaling.open("results/chinchilla")
    fit = study.fit()
    fit.predict(num_params=1e6, num_tokens=2e7)

What the commands do is done by the same code; here are only its names. No accelerator is touched, and what fits (a
second of SciPy) is imported when something is fitted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling import records, storage, terminal

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from scaling.laws.analysis import Analysis
    from scaling.laws.answers.advice.basis import Answer
    from scaling.laws.answers.multiplier import Comparison

PANELS = ("num_params", "num_tokens", "tokens_per_param")  # of an allocation


def axes(ax: Axes | None, height: float = 4.2) -> Axes:
    """The Axes given, or those of a new figure, which notebooks show."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(7, height)).subplots()


def styled(draw: Callable[..., Axes]) -> Callable[..., Axes]:
    """The same drawing in the project's style (``report.axes.STYLE``), whatever the notebook's is."""

    @functools.wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> Axes:
        import matplotlib.pyplot as plt

        plt.draw_if_interactive()  # loads the backend, whose settings for a notebook must outlast the style's context
        from scaling.report import plots

        with plots.style():
            return draw(*arguments, **options)

    return drawn


def open(source: str | Path | pd.DataFrame) -> Study:  # named as pandas and xarray name it
    """Opens runs: a results folder, on a disk or in a bucket, a group's in it, a CSV or JSON, or a pandas table.

    Raises ValueError, or OSError, saying what it should be.
    """
    if not isinstance(source, str | Path):
        if not hasattr(source, "columns"):
            raise ValueError(f"{type(source).__name__} is no table of runs: write a pandas table, or where one is")
        return Study("table", source)
    from scaling import fit

    folder = storage.folder(source)
    manifest = {} if folder.is_file() else records.manifest(folder)
    if manifest.get("groups"):  # of laws apart: a table to compare, in the grid's order, and groups to open
        runs = fit.as_in_grid(records.load_records(folder), manifest)
        return Study(str(source), records.table(runs), records.curves(runs), runs)
    table, curves, runs = fit.read(folder)
    return Study(str(source), table, curves, runs)


@dataclass(frozen=True)
class Study:
    """Runs, before anything is fitted to them.

    Attributes:
      table: a row per run (``records.load``), or the CSV's.
      curves: their losses while they trained; None of a table.
      runs: the records; none of a table.
    """

    source: str
    table: pd.DataFrame = field(repr=False)
    curves: pd.DataFrame | None = field(default=None, repr=False)
    runs: Sequence[records.RunRecord] = field(default=(), repr=False)

    def _repr_html_(self) -> str:
        return self.table.to_html(max_rows=12)

    @property
    def asked(self) -> dict[str, Any]:
        """What the folder's own fit was asked for (``fit.asked``); empty without one, and of tables."""
        from scaling import fit

        return fit.asked(storage.folder(self.source)) if self.runs else {}

    @property
    def seal(self) -> str | None:
        """What the hash of the forecast says that was made before the held-out runs trained; None without one."""
        from scaling.report import page

        return page.forecast_seal(page.read(storage.folder(self.source)).forecast) if self.runs else None

    @property
    def expert_load(self) -> pd.DataFrame:
        """The share of a layer's choices that fell on each expert, of the largest run that has experts.

        Raises ValueError where none has.
        """
        import pandas as pd

        known = [run for run in self.runs if "expert_load" in run.measures]
        if not known:
            raise ValueError(f"{self.source}: no run has experts")
        largest = max(known, key=lambda run: run.flops["exact"] * run.num_params["total"])
        return pd.DataFrame(largest.measures["expert_load"]["value"]).rename_axis("layer")

    @property
    def groups(self) -> dict[str, Study]:
        """The studies of groups that have laws apart, by name."""
        folder = storage.folder(self.source)
        manifest = records.manifest(folder) if self.runs else {}
        return {name: open(folder / name) for name in manifest.get("groups") or {}}

    def fit(
        self, laws: Sequence[str] | str | None = None, loss: str | None = None,
        convention: Mapping[str, str] | None = None, **options: Any,
    ) -> Fit:  # fmt: skip
        """Fits laws to the runs, as ``python -m scaling.fit`` does.

        Args:
          laws: names of forms, or one; by default those of the folder's own fit, else ``analysis.DEFAULT_LAWS``.
          loss: huber, lad, squared or tukey; by default the folder's own with its δ, else huber.
          convention: how N and C are counted, {"num_params": "total", "flops": "6ND"}; by default as the folder's own
            fit.json counts.
          options: of ``analysis.analyse``: delta, noise (by default as the folder's own fit), bootstrap, seed,
            holdout_flops, combined.
        """
        from scaling.laws.analysis import DEFAULT_LAWS, analyse

        known = self.asked
        of_folder = known.pop("laws", None) or DEFAULT_LAWS
        if loss is not None:  # another objective than the folder's has another δ
            known = {k: v for k, v in known.items() if k not in ("delta", "tau")} | {"loss": loss}
        if convention is not None:
            known = {k: v for k, v in known.items() if k not in ("num_params", "flops")} | dict(convention)
        names = (laws,) if isinstance(laws, str) else tuple(of_folder if laws is None else laws)
        asked = {**known, "source": self.source, **options}
        return Fit(self, analyse(self.table, self.curves, laws=names, **asked))

    def compare(self, column: str, **options: Any) -> Compared:
        """Says how many times the compute groups of the runs save over each other (``scaling.compare``).

        Args:
          column: whose values the groups are: of the table, or a path into the runs such as model.family.
          options: of ``multiplier.compare``: law, level, bootstrap, loss …
        """
        from scaling import fit
        from scaling.laws.answers.multiplier import compare

        table = records.with_coordinate(self.table, self.runs, column) if self.runs else self.table
        asked = fit.compared_as(self.asked)
        if "loss" in options:  # another objective than the folder's has another δ
            asked = {k: v for k, v in asked.items() if k not in ("delta", "tau")}
        return Compared(self, compare(table, column, **{**asked, "source": self.source, **options}))

    def positions(self, column: str) -> pd.DataFrame:
        """Loss by place in the window of every group's best run, as ``plots.positions_of_groups`` draws it."""
        table = records.with_coordinate(self.table, self.runs, column)
        best = table.loc[table.groupby(column)["loss"].idxmin()].set_index("run_id")[column]
        found = records.positions([run for run in self.runs if run.run_id in best.index])
        return found.assign(group=found["run_id"].map(best))


@dataclass(frozen=True)
class Fit:
    """Laws fitted to a study's runs. ``analysis`` is what they are made of, ``payload`` fit.json's content."""

    study: Study
    analysis: Analysis = field(repr=False)

    @functools.cached_property
    def payload(self) -> dict[str, Any]:
        from scaling.laws.answers import of_runs

        found = self.analysis.to_json()
        return of_runs.complete(found, self.study.runs) if self.study.runs else found

    @property
    def table(self) -> pd.DataFrame:
        """The study's runs, counted as the fit counts, held-out rows marked."""
        from scaling.laws.tables.observations import HELD_OUT, LEFT_OUT, as_counted
        from scaling.report.figures import drawing

        table = as_counted(self.study.table, self.analysis.observations.convention)
        excluded = [row["run"] for row in self.payload["excluded"] if row["reason"] in (HELD_OUT, LEFT_OUT)]
        return table if "holdout" in table else table.assign(holdout=[n in excluded for n in drawing.labels(table)])

    @property
    def done(self) -> pd.DataFrame:
        """Those that have a loss."""
        table = self.table
        return table[table["loss"].notna() & ((table["status"] == "completed") if "status" in table else True)]

    @property
    def law(self) -> str:
        """The law of N and D, by name. Raises ValueError where none was fitted."""
        if self.analysis.surface is None:
            raise ValueError(f"{self.study.source}: no law of N and D was fitted: write laws=('chinchilla',)")
        return self.analysis.surface

    @property
    def params(self) -> dict[str, float]:
        """The parameters of the law of N and D."""
        return dict(self.analysis.fits[self.law].params)

    def parameters(self, law: str | None = None) -> pd.DataFrame:
        """A law's parameters: value, standard error and interval, as the page has them."""
        import pandas as pd

        of = self.payload["laws"][law or self.law]
        return pd.DataFrame(
            {"value": of["params"], "standard error": of["standard_errors"], "interval": of["intervals"]}
        )

    @property
    def exponents(self) -> pd.DataFrame:
        """Exponents of N* ∝ C^a and D* ∝ C^b by every approach, with intervals."""
        import pandas as pd

        from scaling.report.figures import of_laws

        return pd.DataFrame(of_laws.exponent_rows(self.payload)).set_index("name")

    @property
    def exponent(self) -> dict[str, Any]:
        """The law's exponent of N* ∝ C^a over the fitted compute, or β/(α+β) where C = 6 N D, and its interval."""
        found = self.payload["allocation"]
        name = "a_local" if found.get("a_local") else "a"
        return {"a": found[name], "interval": found[f"{name}_interval"]}

    @property
    def doubts(self) -> tuple[str, ...]:
        """What a reader must know before believing the rest, in words."""
        return self.analysis.warnings

    def _repr_html_(self) -> str:
        from html import escape

        doubts = "".join(f"<li>{escape(line)}</li>" for line in self.doubts)
        return f"{self.exponents.to_html()}<ul>{doubts}</ul>"

    def summary(self) -> None:
        """Prints laws, exponents, forecast and doubts, as the command does."""
        import sys

        from scaling.report import printed

        printed.show(terminal.console(sys.stdout, width=160, fold=False), self.payload)

    def predict(self, num_params: Any, num_tokens: Any, interval: float | None = None) -> pd.DataFrame:
        """The losses of new runs, of arrays of N and D or one of each.

        Args:
          interval: its level, as .9, for that of the run itself.

        Returns:
          num_params, num_tokens, flops, loss, and lower and upper.
        """
        import numpy as np
        import pandas as pd

        from scaling.laws.answers.forecast import forecast

        n, d = np.broadcast_arrays(np.atleast_1d(num_params).astype(float), np.atleast_1d(num_tokens).astype(float))
        flops = d * self.analysis.cost.flops_per_token(n)
        table = pd.DataFrame({"num_params": n, "num_tokens": d, "flops": flops})
        said = forecast(self.analysis, table.to_dict("records"), 0.9 if interval is None else interval)
        table["loss"] = [row["predicted"] for row in said]
        if interval is not None:
            table["lower"], table["upper"] = zip(*(row["interval"] for row in said))
        return table

    def forecast(self, cells: pd.DataFrame | Sequence[Mapping[str, Any]], level: float = 0.9) -> pd.DataFrame:
        """The forecast of cells: predicted, interval, by_law.

        ``cells``: with num_params and num_tokens, by the fit's own count or under every count as a study's table has
        them; with flops, else by the runs' own FLOPs of a token; and with run_id, where they have one.
        """
        import pandas as pd

        from scaling.laws.answers.forecast import forecast

        rows = cells.to_dict("records") if isinstance(cells, pd.DataFrame) else cells
        return pd.DataFrame(forecast(self.analysis, [self._counted(row) for row in rows], level))

    def _counted(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        """A cell with size and FLOPs as the fit counts them; FLOPs by its cost of a token where it has none."""
        import pandas as pd

        convention, out = self.analysis.observations.convention, dict(cell)
        for name in ("num_params", "flops"):
            if (counted := cell.get(f"{name}_{convention.get(name)}")) is not None:
                out[name] = counted
        n, d = out.get("num_params"), out.get("num_tokens")
        is_there = all(
            isinstance(x, Real) and float(x) > 0 for x in (n, d)
        )  # else the forecast says what is wrong with it
        if is_there and pd.isna(out.get("flops")):
            out["flops"] = float(d) * float(self.analysis.cost.flops_per_token(float(n)))  # type: ignore[arg-type]
        return out

    @property
    def held_out(self) -> pd.DataFrame:
        """What the laws say of the runs held out, beside what these gave."""
        import pandas as pd

        sizes = {row["run"]: row["num_params"] for row in self.payload["excluded"]}
        return pd.DataFrame([{"num_params": sizes[row["run_id"]], **row} for row in self.payload["forecast"]])

    def optimum(self, flops: float) -> pd.Series:
        """N*, D*, D*/N* and the loss for C FLOPs, with intervals. Raises ValueError where none follows from the law."""
        import numpy as np
        import pandas as pd

        from scaling.laws.answers import allocation, optimum
        from scaling.laws.answers.advice.basis import Basis, require_determined

        found = self.analysis
        if found.no_allocation or allocation.has_two_powers(found.fits[self.law].form):
            Basis(found)  # refuses, as advice does, where runs do not determine an optimum
        require_determined(str(self.study.source), found.fits[self.law])
        rows = optimum.rows(found, np.array([float(flops)]))
        if not rows:
            raise ValueError(f"{self.study.source}: {self.law} has no interior optimum at {flops:.3g} FLOPs")
        return pd.Series(rows[0])

    def advise(self, **question: Any) -> Answer:
        """What to do: the question put to this fit, with flops=, loss=, num_tokens=, deadline= …"""
        from scaling import advise

        return advise.advise(self, **question)

    def compare(self, column: str, **options: Any) -> Compared:
        """``study.compare`` of the runs that this is fitted to."""
        return self.study.compare(column, **options)

    def write_figures(self, folder: str | Path) -> list[Any]:
        """Writes every figure with its caption as SVG and PNG, as the command does; returns what was saved."""
        from scaling.report import figures

        return figures.write(storage.folder(folder), self.study.table, self.payload, self.study.runs)

    @property
    def plot(self) -> Plot:
        """The figures, each a method that returns its Axes."""
        return Plot(self)


@dataclass(frozen=True)
class Compared:
    """Groups of runs compared (``multiplier.Comparison``, as ``found``)."""

    study: Study
    found: Comparison = field(repr=False)

    @functools.cached_property
    def payload(self) -> dict[str, Any]:
        from scaling.laws.payload import finite, of_comparison

        return finite(of_comparison(self.found, {}))["multiplier"]

    @property
    def sharing(self) -> Any:
        """Whether the groups may share exponents: F, p and degrees of freedom."""
        return self.found.sharing

    @property
    def table(self) -> pd.DataFrame:
        """Of each pair the multiplier and its interval where it is told (``multiplier.told``); ``by`` says of which
        laws: those that share exponents, or, where the test rejects these, the groups' own."""
        import pandas as pd

        from scaling.laws.answers import multiplier

        axis, (lead, _) = self.payload["axis"], multiplier.prefixes(self.payload)
        rows = [
            {"first": pair["group"], "second": pair["over"], axis: p[axis], "times": p.get(f"{lead}value"),
             "interval": p.get(f"{lead}interval"), "by": "laws apart" if lead else "shared exponents",
             "extrapolated": p["extrapolated"]}
            for pair in self.payload["pairs"] for p in multiplier.told(pair["points"])
        ]  # fmt: skip
        return pd.DataFrame(rows)

    @property
    def moves(self) -> pd.DataFrame:
        """How far each group's least loss moves if its law is fitted apart."""
        import pandas as pd

        return pd.DataFrame(self.payload["moves"])

    def _repr_html_(self) -> str:
        return self.table.to_html()

    def advise(self, first: str, second: str) -> Answer:
        """Which of two groups to train, from which compute on, with which probability."""
        from scaling import advise

        return advise.advise_between(self.found, first, second)

    @styled
    def plot(self, ax: Axes | None = None) -> Axes:
        """Multipliers against what is paid, a line for each pair."""
        from scaling.report import plots_of_fits

        return plots_of_fits.multipliers(axes(ax), self.payload)


def exponents(fits: Mapping[str, Fit]) -> pd.DataFrame:
    """The exponent of N* ∝ C^a by fits to be held against each other, by name: a and its interval."""
    import pandas as pd

    return pd.DataFrame([fit.exponent for fit in fits.values()], index=pd.Index(fits, name="fit"))


@styled
def plot_exponents(fits: Mapping[str, Fit], ax: Axes | None = None) -> Axes:
    """``exponents`` side by side."""
    from scaling.report import plots
    from scaling.report.figures import of_laws

    rows = [(name, fit.exponent["a"], fit.exponent["interval"]) for name, fit in fits.items()]
    return plots.exponents(axes(ax, 0.9 + 0.36 * len(rows)), rows, of_laws.PUBLISHED_EXPONENTS)


@dataclass(frozen=True)
class Plot:
    """Figures of a fit. Each draws on ``ax``, or on a new figure, and returns its Axes (``report.plots``)."""

    fit: Fit

    @styled
    def isoflop(self, ax: Axes | None = None) -> Axes:
        """Loss against size at equal compute, with each budget's minimum."""
        from scaling.report import plots

        return plots.isoflop(axes(ax), self.fit.payload["isoflop"].get("budgets", ()))

    @styled
    def surface(self, ax: Axes | None = None) -> Axes:
        """Contours of the law of N and D, the runs, and the frontier."""
        from scaling.report import plots

        predict = self.fit.analysis.fits[self.fit.law].predict
        frontier = self.fit.payload["frontier"]
        return plots.surface(axes(ax), self.fit.done, lambda n, d: predict(num_params=n, num_tokens=d), frontier)

    @styled
    def allocation(self, quantity: str = "num_params", ax: Axes | None = None) -> Axes:
        """num_params, num_tokens or tokens_per_param that spend a budget best, by the law and by IsoFLOP minima."""
        from scaling.report import plots

        if quantity not in PANELS:
            raise ValueError(f"quantity is {quantity!r}: write one of {', '.join(PANELS)}")
        found = self.fit.payload
        fitted = found["allocation"].get("fitted_flops")
        minima = found["isoflop"].get("minima", ())
        return plots.allocation(axes(ax), quantity, found["frontier"], minima, fitted_flops=fitted)

    @styled
    def residuals(self, quantity: str = "num_tokens", ax: Axes | None = None) -> Axes:
        """What the law of N and D misses of each run, against num_params, num_tokens or flops."""
        from scaling.report import plots

        done = self.fit.done
        predicted = self.fit.analysis.fits[self.fit.law].predict(
            num_params=done["num_params"], num_tokens=done["num_tokens"]
        )
        return plots.residuals(axes(ax), done, predicted, quantity)

    @styled
    def forecast(self, ax: Axes | None = None, *, relative: bool = False) -> Axes:
        """Held-out runs: their loss by the laws, and what training gave."""
        from scaling.report import plots

        return plots.forecast(axes(ax), self.fit.held_out.to_dict("records"), relative=relative)

    @styled
    def exponents(self, ax: Axes | None = None) -> Axes:
        """The exponent of N* by every approach."""
        from scaling.report import plots
        from scaling.report.figures import of_laws

        rows = [(name, row["a"], row["a_interval"]) for name, row in self.fit.exponents.iterrows()]
        return plots.exponents(axes(ax), rows, of_laws.PUBLISHED_EXPONENTS)

    @styled
    def power_law(self, quantity: str = "flops", ax: Axes | None = None) -> Axes:
        """Loss against num_params, num_tokens or flops alone."""
        from scaling.report import plots

        return plots.power_law(axes(ax), self.fit.done, quantity)

    @styled
    def curves(self, ax: Axes | None = None) -> Axes:
        """Validation loss while the runs trained. Raises ValueError of a table, which has no curves."""
        from scaling.laws.tables.observations import as_counted
        from scaling.report import plots

        if self.fit.study.curves is None:
            raise ValueError(f"{self.fit.study.source}: a table has no curves: open a results folder")
        counted = as_counted(self.fit.study.curves, self.fit.analysis.observations.convention)
        return plots.loss_curves(axes(ax), counted, self.fit.payload["envelope"].get("points", ()))
