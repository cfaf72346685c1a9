r"""What is known to bend or blur a scaling law, looked for in a grid before it is paid for.

Every rule is a pure function: rows of the plan → findings, each with the cells, the effect with its figure and the edit
to make. Where a rule needs the compute-optimal size it takes the sweep's own fit if there is one, else ``Expected``'s
defaults: 20 tokens per parameter (the head's matrix counted, Hoffmann et al. 2022), N* ∝ C^.5.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scaling import accounting, objectives
from scaling.config import DataConfig
from scaling.engine.plan.table import Row
from scaling.grid.recipes import RECIPES

MIN_STEPS = 200
MAX_WARMUP = 0.1
MIN_DECADES = 3.0
MAX_FINAL_RATE = 0.1
MAX_HEAD = 0.5
MAX_BATCH_RATIO = 1.25  # of a batch of whole sequences over the recipe's
MAX_BIAS = 0.01  # of the exponent, by the drift of the sizes
# Standard error of a mean validation loss over n tokens: this over √n nats, of bytes (measured: .06 over 517K of Python
# whose neighbouring parts go together). All runs share it, so it moves E and hardly the differences: hence the bound.
LOSS_NOISE = 43.2
MAX_STANDARD_ERROR = 0.08
MAX_VALIDATION = 0.5  # of the documents: a split that trains on less than it holds out is not what anybody wants

# Exponents of loss against N and D for the expected bend of an IsoFLOP curve (Hoffmann et al. 2022, unrounded).
ALPHA, BETA = 0.339, 0.285


@dataclass(frozen=True)
class Finding:
    """One warning: ``cells`` are run ids."""

    rule: str
    cells: tuple[str, ...]
    effect: str
    edit: str

    def __str__(self) -> str:
        count = f"{len(self.cells)} cell{'s' if len(self.cells) > 1 else ''}"
        return f"{self.rule} ({count}: {', '.join(self.cells[:3])}{', …' if len(self.cells) > 3 else ''}): {self.text}"

    @property
    def text(self) -> str:
        return f"{self.effect}. Edit: {self.edit}."


@dataclass(frozen=True)
class Expected:
    """What is expected of the compute-optimal runs, and of the data."""

    tokens_per_param: float = 20.0
    exponent: float = 0.5  # a in N* ∝ C^a
    source: str = "20 tokens per parameter, N* ∝ C^.5: Hoffmann et al. 2022"
    counts_head: bool = True  # whether the head is among the parameters that ``tokens_per_param`` refers to
    train_tokens: Mapping[DataConfig, int] = field(default_factory=dict)
    validation_tokens: Mapping[DataConfig, int] = field(default_factory=dict)
    device_memory: float | None = None  # bytes, of all devices together

    @classmethod
    def from_fit(cls, fit: Mapping[str, Any], **about_data: Any) -> "Expected":
        """From a sweep's fit.json, where it has an allocation; else the defaults."""
        allocation = fit.get("allocation") or {}
        ratios = [r["value"] for r in (allocation.get("tokens_per_param") or {}).values() if r.get("value")]
        counts = (fit.get("convention") or {}).get("num_params")
        if not ratios or not allocation.get("a") or counts not in ("non_embedding", "total"):
            return cls(**about_data)
        ratio = math.exp(sum(map(math.log, ratios)) / len(ratios))
        source = f"{ratio:.3g} tokens per parameter, N* ∝ C^{allocation['a']:.2f}: this sweep's own fit"
        return cls(ratio, allocation["a"], source, counts == "total", **about_data)


def check(*groups: tuple[Sequence[Row], Expected]) -> list[Finding]:
    """All findings about a grid, in the order of ``RULES``.

    ``groups``: the rows that one set of laws is fitted to, all or a part of the grid's, and what is expected of them.
    What is found of several groups is said once, of all their cells.
    """
    cells: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for rule in RULES:
        for finding in (finding for rows, expected in groups for finding in rule(rows, expected)):
            key = (finding.rule, finding.effect, finding.edit)
            cells[key] = cells.get(key, ()) + finding.cells
    return [Finding(rule, ids, effect, edit) for (rule, effect, edit), ids in cells.items()]


def _ids(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(row.run_id for row in rows)


def _num_params(row: Row, expected: Expected) -> float:
    counts = row.plan.num_params
    model = row.cell.run.model
    return counts["non_embedding"] + (model.d_model * model.vocab_size if expected.counts_head else 0)


def _fitted(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row.cell.holdout]


def _isoflop(rows: Sequence[Row]) -> dict[float, list[Row]]:
    """The fitted cells by budget, of budgets with at least three sizes: those a minimum can be read from."""
    budgets: dict[float, list[Row]] = {}
    for row in _fitted(rows):
        if "budget_flops" in row.cell.labels:
            budgets.setdefault(row.cell.labels["budget_flops"], []).append(row)
    wide = {c: b for c, b in budgets.items() if len({row.plan.num_params["non_embedding"] for row in b}) >= 3}
    return dict(sorted(wide.items()))


# ---- rules ----------------------------------------------------------------------------------------------------------


def long_warmup(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    """Warm-up over a tenth of the run, a step of rounding allowed."""
    bad = [row for row in rows if row.plan.warmup_steps > MAX_WARMUP * row.plan.num_steps + 1]
    if not bad:
        return []
    share = max(row.plan.warmup_steps / row.plan.num_steps for row in bad)
    most = int(MAX_WARMUP * min(row.plan.num_tokens for row in bad))
    return [
        Finding(
            "long warm-up",
            _ids(bad),
            f"warm-up takes up to {share:.0%} of a run: short runs suffer most, and the exponent of N* rose from .60 "
            "to .71 by that alone (Porian et al. 2024)",
            f"optim.warmup_tokens at most {most}, or leave it to a recipe",
        )
    ]


def few_steps(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    bad = [row for row in rows if row.plan.num_steps < MIN_STEPS]
    if not bad:
        return []
    fewest = min(row.plan.num_steps for row in bad)
    batch = min(row.cell.run.batch_size * row.plan.num_steps // MIN_STEPS for row in bad)
    least = max(objectives.of(o).rows_together(o) for o in (row.cell.run.objective for row in bad))
    edit = f"batch_size at most {batch} there" if batch >= least else "longer horizons"
    return [
        Finding(
            "few steps",
            _ids(bad),
            f"as few as {fewest} steps: such a loss measures the batch, not the size (halving it still gained .04 nats "
            "at 430 steps), and the budget's minimum moves to smaller models",
            f"{edit}, or larger budgets, or leave those cells out",
        )
    ]


def optimum_outside(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    """IsoFLOP budgets all of whose sizes lie on one side of the expected optimum."""
    findings = []
    for budget, cells in _isoflop(rows).items():
        ratios = [row.plan.num_tokens / _num_params(row, expected) for row in cells]
        if min(ratios) < expected.tokens_per_param < max(ratios):
            continue
        small = min(ratios) >= expected.tokens_per_param
        factor = min(ratios) / expected.tokens_per_param if small else expected.tokens_per_param / max(ratios)
        findings.append(
            Finding(
                "optimum outside the sizes",
                _ids(cells),
                f"budget {budget:g}: all sizes are likely too {'small' if small else 'large'} ({min(ratios):.3g} to "
                f"{max(ratios):.3g} tokens per parameter; expected {expected.source}): a parabola's minimum would be "
                "extrapolated, and counts as not bracketed",
                f"add sizes up to {math.sqrt(factor) * 2:.2g} times as {'large' if small else 'small'}",
            )
        )
    return findings


def few_decades(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    """Levels over less than three decades: of compute, or of what alone differs, parameters or tokens. Two levels or
    one are no attempt at an exponent."""
    fitted = _fitted(rows)
    of_each = {
        "parameters": [math.log(row.plan.num_params["non_embedding"]) for row in fitted],
        "tokens": [math.log(row.plan.num_tokens) for row in fitted],
        "FLOPs": [math.log(row.cell.labels.get("budget_flops", row.plan.flops["exact"])) for row in fitted],
    }
    fixed = [name for name, logs in of_each.items() if len({round(x, 2) for x in logs}) < 2]
    unit = {"tokens": "parameters", "parameters": "tokens"}.get(fixed[0], "FLOPs") if len(fixed) == 1 else "FLOPs"
    logs = sorted(of_each[unit])
    if len({round(x, 2) for x in logs}) < 3:
        return []
    decades = (logs[-1] - logs[0]) / math.log(10)
    if decades >= MIN_DECADES - 1e-9:
        return []
    budgets = np.log(list(_isoflop(rows)))
    if len(budgets) >= 3:
        now = 1.96 * 0.1 / math.sqrt(np.square(budgets - budgets.mean()).sum())
        effect = (
            f"{decades:.2g} decades of compute: with each minimum known to ±10 % the exponent of N* is known to "
            f"±{now:.2f}, over three decades to ±{now * decades / MIN_DECADES:.2f}; what is fitted is a local slope"
        )
    else:
        effect = (
            f"{decades:.2g} decades of {'compute' if unit == 'FLOPs' else unit}: an exponent's interval is "
            f"{MIN_DECADES / decades:.2g} times as wide as over three, and an offset E is hardly told from a power"
        )
    top, bottom = math.exp(logs[-1]), math.exp(logs[0])
    what = {"FLOPs": "budgets", "parameters": "sizes", "tokens": "horizons"}[unit]
    edit = f"{what} from {bottom:.1g} to {bottom * 1000:.1g} {unit}, or from {top / 1000:.1g}; else mind the interval"
    return [Finding("few decades", _ids(fitted), effect, edit)]


def drifting_centres(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    r"""Sizes whose place around the optimum changes with the budget.

    In x = ln(N / N*) the loss above its asymptote goes as e^(-αx)/α + e^(βx)/β. A parabola through a budget's sizes
    puts its minimum beside x = 0, the more the further off their centre; the slope of that error against ln C is what
    the drift adds to the exponent. An offset that all budgets share only moves the level.
    """
    budgets = _isoflop(rows)
    if len(budgets) < 3:
        return []
    log_flops = np.log(list(budgets))
    sizes = [np.log([_num_params(row, expected) for row in cells]) for cells in budgets.values()]
    centres = np.array([x.mean() for x in sizes])
    by_ratio = [_log_size_at_ratio(x, cells, expected) for x, cells in zip(sizes, budgets.values())]
    log_optimum = np.mean(by_ratio) + expected.exponent * (log_flops - log_flops.mean())
    errors = [_parabola_minimum(x - optimum) for x, optimum in zip(sizes, log_optimum)]
    bias = np.polyfit(log_flops, errors, 1)[0] if None not in errors else math.inf  # type: ignore[arg-type]  # no None
    if abs(bias) <= MAX_BIAS:
        return []
    drift = np.polyfit(log_flops, centres - log_optimum, 1)[0] * math.log(10)
    effect = (
        f"the centre of the sizes drifts by a factor of {math.exp(abs(drift)):.2g} a decade "
        f"{'above' if drift > 0 else 'below'} the expected optimum ({expected.source}): the parabola's exponent is off "
        "by " + (f"{bias:+.3f}" if math.isfinite(bias) else "any amount, some budgets having no minimum in their sizes")
    )
    edit = f"let each budget list its own sizes, their centre growing as C^{expected.exponent:.2g}"
    return [Finding("drifting centres", _ids([row for cells in budgets.values() for row in cells]), effect, edit)]


def _log_size_at_ratio(log_sizes: np.ndarray, cells: Sequence[Row], expected: Expected) -> float:
    """ln N at which cells of a budget would have the expected tokens per parameter, on a line through logarithms."""
    log_ratios = [math.log(row.plan.num_tokens) - x for row, x in zip(cells, log_sizes)]
    slope, level = np.polyfit(log_ratios, log_sizes, 1)
    return float(level + slope * math.log(expected.tokens_per_param))


def _parabola_minimum(x: np.ndarray) -> float | None:
    """Where a parabola through the expected losses at ``x`` = ln(N / N*) has its minimum; None if it has none."""
    loss = np.exp(-ALPHA * x) / ALPHA + np.exp(BETA * x) / BETA
    curvature, slope, _ = np.polyfit(x, loss, 2)
    return float(-slope / (2 * curvature)) if curvature > 0 else None


def not_annealed(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    """Runs whose rate does not come down by their end: their last loss is not that of a run of this length."""

    def is_bad(row: Row) -> bool:
        s = row.cell.run.optim.schedule
        flat = s.name in ("constant", "inverse_sqrt") or (s.name == "wsd" and s.cooldown_fraction == 0)
        return flat or s.final_lr_fraction > MAX_FINAL_RATE

    bad = [row for row in rows if is_bad(row)]
    if not bad:
        return []
    return [
        Finding(
            "not annealed",
            _ids(bad),
            "the rate does not decay to each run's own end: the exponent of N* was .60 without that and .57 with "
            "(Porian et al. 2024), and losses of other horizons are not comparable",
            "optim.schedule: wsd with a cooldown, cosine or linear, and final_lr_fraction at most .1",
        )
    ]


def unmatched_cosine(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    """One cosine (or linear) run a shape and no budgets: only points along its curve are left for other horizons."""
    fitted = _fitted(rows)
    horizons: dict[object, set[int]] = {}
    for row in fitted:
        horizons.setdefault(row.cell.run.model, set()).add(row.plan.num_tokens)
    decays = all(row.cell.run.optim.schedule.name in ("cosine", "linear") for row in fitted)
    if not fitted or not decays or _isoflop(rows) or len(horizons) < 3 or max(map(len, horizons.values())) > 1:
        return []
    return [
        Finding(
            "cosine not matched",
            _ids(fitted),
            "each shape has one horizon, so every smaller budget is read off the middle of a cosine that ends later: "
            "such points lie above a run of that length (a cycle 25 % too long already shows, Hoffmann et al. 2022, "
            "figure A1)",
            "several horizons a shape, or isoflop budgets, or schedule wsd, whose trunk runs of all lengths share",
        )
    ]


def repeated_data(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    findings = []
    for data, unique in expected.train_tokens.items():
        of_data = [row for row in rows if row.cell.run.data == data]
        # The last batch of one epoch is no second epoch.
        bad = [row for row in of_data if row.plan.num_tokens > unique + row.plan.batch_tokens]
        if bad:
            most = max(row.plan.num_tokens for row in bad) / unique
            of = f"{unique:,} tokens of {data.source}"
            if " + " in data.source:  # of a mixture the tokens until one of its sources is read again
                of = f"that source of {data.source} which is read again first, from {unique:,} tokens on"
            findings.append(
                Finding(
                    "repeated data",
                    _ids(bad),
                    f"up to {most:.2g} epochs of {of}: repeated tokens are worth less "
                    "(as new to about four epochs, little beyond sixteen; Muennighoff et al. 2023), which a law of N "
                    "and D reads as a smaller β",
                    "a larger source or shorter horizons, or fit --law data_constrained, which counts epochs",
                )
            )
    return findings


def mixed_data(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    sources = {(data.source, data.tokenizer): data for data in (row.cell.run.data for row in _fitted(rows))}
    if len(sources) < 2:
        return []
    by = "source" if len({source for source, _ in sources}) > 1 else "tokenizer"
    names = dict.fromkeys(getattr(data, by) for data in sources.values())
    return [
        Finding(
            "several datasets",
            _ids(rows),
            f"losses on {' and on '.join(names)} are not points of one law: there will be none",
            f"fit.by data.{by}, for laws of each",
        )
    ]


def mixed_objectives(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    names = sorted({row.cell.run.objective.name for row in _fitted(rows)})
    if len(names) < 2:
        return []
    effect = f"losses of {' and of '.join(names)} are not points of one law: there will be none"
    return [Finding("several objectives", _ids(rows), effect, "fit.by objective.name, for laws of each")]


def mixed_starts(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    started = [row for row in _fitted(rows) if row.start is not None]
    if not started or len(started) == len(_fitted(rows)):
        return []
    effect = (
        "their tokens are not all that their weights have seen, and losses of runs that start from others and of runs "
        "that do not are not points of one law: there will be none"
    )
    edit = "fit.by the axis that starts them, for laws of each, or hold the one or the other out of this grid"
    return [Finding("some start from others", _ids(started), effect, edit)]


def large_head(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    def head_share(row: Row) -> float:
        run = row.cell.run
        inner, head = accounting.trained(run.model, run.objective).worked(run.lengths)
        return head / (head + inner)

    bad = [row for row in rows if head_share(row) > MAX_HEAD]
    if not bad:
        return []
    without = any(row.cell.run.horizon.rule in ("6ND", "kaplan") for row in bad if row.cell.run.horizon.flops)
    effect = (
        f"the head does up to {max(map(head_share, bad)):.0%} of the multiplications of these cells"
        + (", which this budget's rule does not count" if without else "")
        + ": counting it or not moved the exponent of N* from .84 to .71 (Porian et al. 2024)"
    )
    edit = "leave the smallest sizes out or take a smaller vocabulary" + ("; budgets by rule exact" if without else "")
    return [Finding("large head", _ids(bad), effect, edit)]


def foreign_recipe(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    """Recipes are of decoder-only Transformers that predict the next token (``grid.recipes``)."""
    bad: dict[str, list[Row]] = {}
    for row in rows:
        run = row.cell.run
        if row.cell.recipe is None or "lr_scale" in row.cell.labels:
            continue
        family = "" if run.model.family == "transformer" else f"model.family {run.model.family}"
        objective = "" if run.objective.name == "next_token" else f"objective {run.objective.name}"
        if what := " under ".join(filter(None, (family, objective))):
            bad.setdefault(what, []).append(row)
    if not bad:
        return []
    cells = [row for of_kind in bad.values() for row in of_kind]
    names = ", ".join(sorted({row.cell.recipe for row in cells if row.cell.recipe}))
    effect = (
        f"{names} gives what was best for decoder-only Transformers and the next token, and the cells are of "
        f"{' and of '.join(bad)}: their best rate and batch may be others, and what a law says of them then is of the "
        "recipe too"
    )
    edit = "axes: {recipe.lr_scale: [0.5, 1, 2]}, or recipe: none and the values written out"
    return [Finding("recipe of others", _ids(cells), effect, edit)]


def rounded_batch(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    """Batches of whole sequences that are far more than a recipe asks for: such runs take fewer steps than their
    neighbours, by a ratio that changes with the horizon."""
    times: dict[str, tuple[float, Row]] = {}
    for row in _fitted(rows):
        run = row.cell.run
        if row.cell.recipe is None:
            continue
        asked = RECIPES[row.cell.recipe](run.model, row.plan.num_tokens, run.data.seq_len).batch_tokens
        ratio = run.batch_tokens / (asked * row.cell.labels.get("batch_scale", 1.0))
        if run.batch_size == max(1, round(run.batch_size / ratio)):  # the recipe's own; another was written out
            times[row.run_id] = (ratio, row)
    bad = {run_id: (ratio, row) for run_id, (ratio, row) in times.items() if ratio > MAX_BATCH_RATIO}
    if not bad:
        return []
    most, row = max(bad.values(), key=lambda found: found[0])
    effect = (
        f"batches are whole sequences, up to {most:.2f} times the recipe's here: four runs at 1.43 times it lay 1.3 % "
        "above the law, and moved the exponent of N* from .50 to .52 by themselves (results/README.md)"
    )
    edit = f"data.seq_len at most {row.cell.run.data.seq_len // 2}, or leave the cells out (exclude)"
    return [Finding("rounded batch", tuple(bad), effect, edit)]


def small_validation(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    findings = []
    rows = [row for row in rows if row.cell.run.lengths.passes == 1]  # LOSS_NOISE is of tokens, not of sequences
    for data, whole in expected.validation_tokens.items():
        mine = [row for row in rows if row.cell.run.data == data]
        used = [min(whole, row.cell.run.eval.final_tokens or whole) for row in mine]
        tokens = min(used, default=whole)
        error = LOSS_NOISE / math.sqrt(tokens)
        bad = [row for row, n in zip(mine, used) if LOSS_NOISE / math.sqrt(n) > MAX_STANDARD_ERROR]
        if bad:
            enough = (LOSS_NOISE / MAX_STANDARD_ERROR) ** 2
            fraction = data.validation_fraction * enough / tokens
            larger = f"data.validation_fraction {fraction:.2g}, or " if fraction <= MAX_VALIDATION else ""
            if whole >= enough:  # the split suffices; what is taken of it does not
                larger = f"eval.final_tokens {math.ceil(enough)} or null, or "
            findings.append(
                Finding(
                    "small validation split",
                    _ids(bad),
                    f"{tokens:,} validation tokens: a loss has a standard error of about {error:.3f} nats, against "
                    ".0005 to .003 between seeds; runs share it, so E moves by it and the exponents less",
                    larger + f"more text: {enough:,.0f} tokens of validation would do",
                )
            )
    return findings


def mup_decay(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    """Cells under μP whose hidden matrices decay more slowly the wider they are."""

    def width(row: Row) -> float:
        model = row.cell.run.model
        return model.d_model / model.base_d_model if model.base_d_model else 1.0

    bad = [row for row in rows if row.cell.run.optim.weight_decay > 0 and width(row) != 1.0]
    if not bad:
        return []
    widest = max(map(width, bad))
    return [
        Finding(
            "decay under μP",
            _ids(bad),
            "μP divides the rate of hidden matrices by m = d_model / base_d_model, and with it their decay, rate × "
            f"weight_decay / m a step, m up to {widest:.3g} here: wide models are decayed less than narrow ones, and "
            "the best weight_decay moves with width (Wang & Aitchison 2024)",
            "optim.weight_decay times m in each cell for one decay at all widths, or 0",
        )
    ]


def too_large(rows: Sequence[Row], expected: Expected) -> list[Finding]:
    """Cells that cannot fit the devices: by their compiled program where it is known, else by parameters, gradients and
    optimiser state alone."""
    if expected.device_memory is None:
        return []

    def needs(row: Row) -> float:
        return row.memory_bytes or row.plan.state_bytes + 4 * row.plan.num_params["total"]

    bad = [row for row in rows if needs(row) > expected.device_memory]
    if not bad:
        return []
    most = max(map(needs, bad))
    return [
        Finding(
            "too large",
            _ids(bad),
            f"{most / 1e9:.3g} GB at least, on devices that hold {expected.device_memory / 1e9:.3g} GB together: "
            "it will not run",
            "more devices and execution.mesh.fsdp, or smaller sizes",
        )
    ]


RULES: tuple[Callable[[Sequence[Row], Expected], list[Finding]], ...] = (
    too_large,
    long_warmup,
    few_steps,
    optimum_outside,
    few_decades,
    drifting_centres,
    not_annealed,
    unmatched_cosine,
    repeated_data,
    mixed_data,
    mixed_objectives,
    mixed_starts,
    large_head,
    foreign_recipe,
    rounded_batch,
    mup_decay,
    small_validation,
)
