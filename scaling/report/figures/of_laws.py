"""Figures of the laws themselves: what was fitted, how sure it is, what it says of size and data, what it misses."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from scaling.laws.answers import truth
from scaling.laws.answers.approaches import select
from scaling.laws.forms import catalogue
from scaling.laws.tables.observations import from_table
from scaling.report import plots, plots_of_fits
from scaling.report.axes import mathtext
from scaling.report.figures.drawing import (
    FULL,
    HALF,
    Drawing,
    Seen,
    count,
    engineering_flops,
    loss_unit,
    part,
    predictor,
)  # fmt: skip

# Exponents of N* ∝ C^a to hold one's own against.
PUBLISHED_EXPONENTS = {"Hoffmann et al. 2022": 0.50, "Kaplan et al. 2020": 0.73}


def isoflop(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    budgets = part(fit, "isoflop").get("budgets") or []
    if not budgets:
        return None
    figure = Figure(figsize=(HALF, 4.4))
    ax = plots.isoflop(figure.subplots(), budgets)
    if (least := truth.least_loss(done)) is not None:
        plots.line(ax, least)
    bracketed = sum(b["minimum"]["bracketed"] for b in budgets)
    caption = (
        "Final loss against size at equal compute, with the parabola in log N through each budget and its minimum. "
        f"Runs bracket the minimum in {bracketed} of {count(len(budgets), 'budget')}."
    )
    return Drawing("isoflop", "IsoFLOP profiles", caption, figure)


def surface(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    predict = predictor(fit)
    if predict is None:
        return None
    figure = Figure(figsize=(HALF, 4.4))
    frontier = fit.get("frontier") or []
    plots.surface(figure.subplots(), done, lambda n, d: predict(num_params=n, num_tokens=d), frontier)
    held = bool(done["holdout"].any()) if "holdout" in done else False
    caption = f"Contours of the fitted loss, {loss_unit(fit)}; markers are runs{', open if held out' if held else ''}."
    return Drawing("surface", "The parametric surface L(N, D)", caption, figure)


def power_laws(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    panels = {"num_params": "kaplan_n", "num_tokens": "kaplan_d", "flops": "kaplan_c"}
    found = {q: law for q, name in panels.items() for law in (name, f"{name}_offset") if predictor(fit, law)}
    if not found:
        return None
    figure = Figure(figsize=(FULL, 3.7))
    axes = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    excluded = {row.get("run") for row in fit.get("excluded") or []}
    candidates = done[~done["label"].isin(excluded)]
    columns = candidates[["label", "num_params", "num_tokens", "flops", "loss"]].rename(columns={"label": "run"})
    given = from_table(columns, units_known=True)
    for ax, (quantity, law) in zip(axes, found.items()):
        rows, _ = select(given, catalogue.FORMS[law])
        predict = predictor(fit, law)
        shown = done.assign(fitted=done["label"].isin(given.run[rows]))
        label = mathtext(catalogue.FORMS[law].equation.split(" = ", 1)[-1])
        plots.power_law(ax, shown, quantity, lambda x, q=quantity, p=predict: p(**{q: x}), label=label)
        alpha = fit["laws"][law]["params"]["alpha"]
        ax.set_title(f"$\\alpha$ = {alpha:.3f}")
        if (least := truth.least_loss(done)) is not None:
            plots.line(ax, least)
    for ax in axes[1:]:
        ax.set_ylabel("")
    caption = (
        "Each law of one quantity is fitted where nothing else limits the loss: to the runs that no run with as little "
        "of that quantity beats. The others, held-out runs among them, are grey."
    )
    return Drawing("power_laws", "Loss against size, data or compute alone", caption, figure)


def repetition(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    # Up to four epochs repeated tokens are as good as new (Muennighoff et al. 2023): nothing to see.
    if not {"epochs", "unique_tokens"} <= set(done) or not (done["epochs"] > 4).any():
        return None
    sizes = [rows for _, rows in done.groupby("num_params") if rows["epochs"].nunique() > 1]
    if not sizes:
        return None
    law = next(
        (
            name
            for name in part(fit, "laws")
            if name in catalogue.FORMS and "unique_tokens" in catalogue.FORMS[name].columns
        ),
        None,
    )
    columns = min(4, len(sizes))
    rows = -(-len(sizes) // columns)
    figure = Figure(figsize=(FULL, 3.4 * rows))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, table in zip(axes, sizes):
        plots.repetition(ax, table, law and predictor(fit, law), key=ax is axes[len(sizes) - 1])
        ax.label_outer()
    for ax in axes[len(sizes) :]:
        ax.remove()
    caption = "Loss against how often the same tokens were read, a panel for each size."
    if law:
        caption += f" Lines: {catalogue.FORMS[law].equation}, fitted to all of them."
    return Drawing("repetition", "Repeated tokens", caption, figure)


def exponent_rows(fit: Mapping) -> list[dict]:
    """Exponents of N* ∝ C^a, D* ∝ C^b by every approach that gave one: name, a, a_interval, b, b_interval."""
    isoflop, law = part(fit, "isoflop"), part(fit, "allocation")
    local = {"a": law.get("a_local"), "a_interval": law.get("a_local_interval")}
    found = {
        "1  envelope of curves": part(fit, "envelope"),
        "2  IsoFLOP minima, parabola": isoflop,
        "2  IsoFLOP minima, interpolated": part(isoflop, "interpolated"),
        "3  parametric law, fitted range": local,
        "3  parametric law, asymptotic": law,
    }
    for name, other in (law.get("by_law") or {}).items():
        found[f"3  {name}, fitted range"] = {"a": other.get("a_local"), "a_interval": other.get("a_local_interval")}
    keys = ("a", "a_interval", "b", "b_interval")
    return [{"name": n} | {k: part.get(k) for k in keys} for n, part in found.items() if part.get("a") is not None]


def exponents(seen: Seen) -> Drawing | None:
    fit = seen.fit
    rows = exponent_rows(fit)
    if len(rows) < 2:  # nothing to compare
        return None
    figure = Figure(figsize=(FULL, 1.2 + 0.27 * len(rows)))
    plots.exponents(figure.subplots(), [(r["name"], r["a"], r["a_interval"]) for r in rows], PUBLISHED_EXPONENTS)
    caption = (
        "Exponent of N* against C by each approach, with 95 % intervals. The asymptotic one is β/(α+β), where the head "
        "and attention no longer count; the one over the fitted range is what IsoFLOP minima estimate."
    )
    return Drawing("exponents", "How model size grows with compute", caption, figure)


def profiles(seen: Seen) -> Drawing | None:
    fit = seen.fit
    law = part(fit, "laws").get(part(fit, "allocation").get("law")) or {}
    walked = law.get("profiles") or {}
    if not walked or "profile_cut" not in law:  # a fit.json older than the cut
        return None
    derived = part(part(fit, "allocation"), "profiles")
    panels = [(k, p | {"interval": law["profile_intervals"][k]}, law["params"][k]) for k, p in walked.items()]
    panels += [(k, p, p["value"]) for k, p in derived.items() if len(p["grid"]) > 2]
    columns, rows = 4, -(-len(panels) // 4)
    figure = Figure(figsize=(FULL, 2.35 * rows))
    figure.get_layout_engine().set(h_pad=0.07, w_pad=0.06)
    axes = figure.subplots(rows, columns, squeeze=False)
    resampled = law.get("bootstrap_intervals") or {}
    resampled |= {k: v for k in ("a", "b", "a_local") if (v := fit["allocation"].get(f"{k}_bootstrap_interval"))}
    for ax, (name, entry, value) in zip(axes.ravel(), panels):
        plots_of_fits.profile(ax, name, entry, law["profile_cut"], value, resampled.get(name))
    for ax in axes.ravel()[len(panels) :]:
        ax.remove()
    for ax in axes[:, 0]:
        ax.set_ylabel("deviance")
    top = part(fit, "allocation").get("fitted_flops")
    caption = (
        "How much worse the law fits when one quantity is held and all else refitted (dots). The shaded interval ends "
        f"where the deviance crosses the dashed level ({100 * law['level']:.0f} %); the bar below is the bootstrap's."
    )
    if derived and top:
        caption += f" N*, D*, their ratio and L* are those at {engineering_flops(top[1])} FLOPs, the largest fitted."
    return Drawing("profiles", "Profile likelihoods", caption, figure)


def clouds(seen: Seen) -> Drawing | None:
    fit = seen.fit
    name = part(fit, "allocation").get("law")
    law = part(fit, "laws").get(name) or {}
    draws = law.get("draws") or {}
    pairs = cloud_pairs(catalogue.FORMS[name]) if name in catalogue.FORMS else []
    if len(next(iter(draws.values()), ())) < 20 or not pairs:
        return None
    figure = Figure(figsize=(FULL, 3.2))
    for ax, pair in zip(figure.subplots(1, len(pairs), squeeze=False)[0], pairs):
        plots_of_fits.cloud(ax, draws, law["params"], pair)
    caption = (
        f"{len(next(iter(draws.values())))} of the {law['num_bootstrap']} bootstrap replicates; the star is the fit. "
        "An amplitude and its exponent move together so closely that neither means much without the other."
    )
    return Drawing("clouds", "How the parameters move together", caption, figure)


def cloud_pairs(form) -> list[tuple[str, str]]:
    """Pairs worth seeing: the exponents, each amplitude with its exponent, the offset with the first exponent."""
    with_exponent = [
        (name, p.of[0][0])
        for name, p in form.parameters.items()
        if p.kind == "amplitude" and p.of[0][0] in form.parameters
    ]
    exponents = list(dict.fromkeys(e for _, e in with_exponent))
    pairs = [tuple(exponents[:2])] if len(exponents) > 1 else []
    pairs += with_exponent[:2]
    if "E" in form.parameters and exponents:
        pairs.append(("E", exponents[0]))
    return pairs


def allocation(seen: Seen) -> Drawing | None:
    fit = seen.fit
    frontier = fit.get("frontier") or []
    minima = part(fit, "isoflop").get("minima") or []
    if not frontier and not any(m.get("num_params") for m in minima):
        return None
    figure = Figure(figsize=(FULL, 3.7))
    axes = figure.subplots(1, 3)
    fitted = part(fit, "allocation").get("fitted_flops")
    # The envelope reaches down to the first steps of training; a decade of it is enough beside the rest.
    lowest = (fitted[0] if fitted else min(m["flops"] for m in minima)) / 10
    envelope = [p for p in part(fit, "envelope").get("points") or [] if p["flops"] >= lowest]
    for ax, quantity in zip(axes, ("num_params", "num_tokens", "tokens_per_param")):
        plots.allocation(ax, quantity, frontier, minima, envelope, fitted)
        ax.get_legend().remove()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=5)
    caption = "Size, tokens and their ratio that spend a budget best, by each approach."
    if frontier:
        caption += (
            " The line is the optimum of the parametric law at what the runs' own tokens cost, dashed outside the "
        )
        caption += "compute that was fitted; the band is its 95 % interval."
    return Drawing("allocation", "Compute-optimal size and data", caption, figure)


def residuals(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    predict = predictor(fit)
    if predict is None:
        return None
    figure = Figure(figsize=(FULL, 3.7))
    axes = figure.subplots(1, 2, sharey=True)
    predicted = predict(num_params=done["num_params"], num_tokens=done["num_tokens"])
    for ax, quantity in zip(axes, ("num_tokens", "flops")):
        plots.residuals(ax, done, predicted, quantity, key=ax is axes[-1])
    axes[1].set_ylabel("")
    caption = (
        "Loss above (+) or below (−) the parametric law; darker is less compute. A pattern is what the law cannot say."
    )
    return Drawing("residuals", "Residuals of the parametric law", caption, figure)


def excess(seen: Seen) -> Drawing | None:
    done, fit = seen.done, seen.fit
    least = truth.least_loss(done)
    if least is None or not (done["loss"] > least).any():
        return None
    figure = Figure(figsize=(HALF, 4.4))
    plots.excess(figure.subplots(), done[done["loss"] > least], least, fit.get("frontier") or [])
    caption = (
        f"What runs lose beyond {least:.4f} nats per token, what the source itself has on this validation split. "
        "A law whose irreducible loss is too high plunges here, one that has it too low flattens out."
    )
    return Drawing("excess", "Loss beyond the least possible", caption, figure)
