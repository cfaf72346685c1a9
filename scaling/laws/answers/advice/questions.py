"""Questions of a law that need no machine: a budget, a loss, data, a size, what a doubling buys."""

import functools
import math
from dataclasses import replace

import numpy as np

from scaling.laws.answers import optimum
from scaling.laws.answers.advice.basis import (
    WIDTH,
    Answer,
    Basis,
    Number,
    Quantity,
    Told,
    in_nats,
    log_flops,
    log_flops_where,
    loss_at,
    root,
)
from scaling.laws.answers.advice.budget import Budget
from scaling.laws.answers.at_best import LawAtBest
from scaling.laws.answers.forecast import forecast
from scaling.laws.answers.optimum import Surfaced
from scaling.laws.fitting.estimate import Fit
from scaling.laws.forms.law import Params
from scaling.laws.intervals.resampling import interval
from scaling.numbers import compact

FLAT = (0.001, 0.005, 0.01)  # shares of the best loss that a flat region is told for
FLAT_STEPS = np.linspace(0.0, 12.0, 121)  # in log N from the best, where its ends are looked for
OVERTRAINED = (1.0, 2.0, 4.0, 10.0)  # times the tokens at which a size is compute-optimal


def of_budget(found: Surfaced, budget: Budget) -> Answer:
    """What to train for a budget: N*, D*, the run's loss, the sizes that are nearly as good, what a wrong one costs.

    N* = argmin_N L(N, D(N)), with D(N) what the budget buys at that size: C/c(N) of C FLOPs. The loss is the run's own
    forecast (``forecast``); flat region and costs are the law's. With L* the least loss, the flat region at ε is all N
    with L(N, D(N)) ≤ (1 + ε) L*; ``overhead`` is how much more, over the budget, a size needs to reach L*.

    Args:
      budget: FLOPs, or the time of a machine whose FLOP/s depend on N (``Budget``).

    Raises:
      ValueError: the law has no interior optimum there.
    """
    basis = Basis(found)
    flops = budget.flops_at_best(found)
    decades = basis.decades(flops)
    rows = optimum.rows(found, np.array([flops]))
    if not rows:
        raise ValueError(f"{basis.source}: {found.surface} has no interior optimum at {flops:.3g} FLOPs")
    quantities: dict[str, tuple[Quantity, str]] = {
        "num_params": (lambda law: np.exp(budget.best_size(law))[:, 0], "parameters"),
        "num_tokens": (lambda law: np.exp(budget.log_tokens(law, budget.best_size(law)))[:, 0], "tokens"),
    }
    tokens_of, size_of = quantities["num_tokens"][0], quantities["num_params"][0]
    quantities["tokens_per_param"] = (lambda law: tokens_of(law) / size_of(law), "tokens per parameter")
    numbers = {name: basis.number(quantity, unit, decades) for name, (quantity, unit) in quantities.items()}
    for name in quantities:  # with the ends that the profile at the largest compute has, and no others
        ends, number = rows[0][f"{name}_interval"], numbers[name]
        if budget.flops is None and number.interval is not None:
            ends = [own if math.isfinite(end) else end for own, end in zip(number.interval, ends)]
        numbers[name] = replace(number, interval=basis.worth(ends, decades))
    num_params, num_tokens = numbers["num_params"].value, numbers["num_tokens"].value
    numbers["loss"] = _run_loss(basis, num_params, num_tokens, flops, decades)
    if budget.flops is None:
        numbers["flops"] = Number(flops, None, "FLOPs")
    for share in FLAT:
        for side, word in ((-1, "least"), (1, "most")):
            name = f"num_params within {100 * share:g} % of the best loss, {word}"
            numbers[name] = basis.number(functools.partial(_flat, budget, share, side), "parameters", decades)
    for factor, word in ((0.5, "half the size"), (2.0, "twice the size")):
        numbers[f"loss lost by {word}"] = basis.number(functools.partial(_loss_lost, budget, factor), "%", decades)
        numbers[f"overhead of {word}"] = basis.number(functools.partial(_overhead, budget, factor), "%", decades)
    return basis.answer(budget.asked, decades, numbers)


def _flat(budget: Budget, share: float, side: int, law: LawAtBest) -> np.ndarray:
    """The least (side -1) or largest N at which the loss for the budget is ``share`` above the least, (B,). In time the
    loss may dip twice: of several crossings the outermost."""
    best = budget.best_size(law)
    worst = budget.loss(law, best) * (1 + share)

    def rises(step: np.ndarray) -> np.ndarray:
        loss = budget.loss(law, best + side * step)
        return np.where(np.isnan(loss), np.inf, loss) - worst

    steps = np.append(FLAT_STEPS, WIDTH)
    inside = (rises(np.broadcast_to(FLAT_STEPS, (len(best), len(FLAT_STEPS)))) <= 0) * np.arange(len(FLAT_STEPS))
    last = inside.max(axis=1)[:, None]  # the place of N* itself, at the least
    return np.exp(best + side * root(rises, steps[last], steps[last + 1]))[:, 0]


def _loss_lost(budget: Budget, factor: float, law: LawAtBest) -> np.ndarray:
    """By how many per cent the loss for the budget is above the least at ``factor`` times the best size, (B,)."""
    best = budget.best_size(law)
    return 100 * (budget.loss(law, best + math.log(factor)) / budget.loss(law, best) - 1)[:, 0]


def _overhead(budget: Budget, factor: float, law: LawAtBest) -> np.ndarray:
    return 100 * (overhead(law, budget, factor) - 1)


def overhead(law: LawAtBest, budget: Budget, factor: float) -> np.ndarray:
    """What a model of ``factor`` times the best size needs for the loss that a budget buys at best, over it, (B,).

    For C = 6 N D FLOPs that is k_N (1 - (k_N^-α - 1) (A/B) G^(-α-β))^(-1/β), k_N the factor and G = (αA/βB)^(1/(α+β))
    (de Vries 2023, "Go smol or go home"). inf where no tokens bring that size there.
    """
    best = budget.best_size(law)
    return np.exp(budget.log_overhead(law, best + math.log(factor), budget.loss(law, best)))[:, 0]


def of_loss(found: Surfaced, loss: float, asked: str = "", told: Told = in_nats) -> Answer:
    """The least compute for a loss in nats, its N and D; or that none reaches it, where it lies below the floor E.

    ``asked``: the loss as it was written, in another unit; ``told``: how losses are said in that.
    """
    asked = f"loss {asked or f'{loss:g}'}"
    basis = Basis(found)
    start = np.log([[basis.top]])

    def log_c(law: LawAtBest) -> np.ndarray:
        return law.log_paid(np.full((len(law.floor), 1), loss), start)

    def size(law: LawAtBest) -> np.ndarray:
        x = log_c(law)
        known = np.isfinite(x)
        return np.where(known, np.exp(law.best_size(np.where(known, x, start))), np.exp(x))[:, 0]  # else inf or 0

    def tokens(law: LawAtBest) -> np.ndarray:
        x = log_c(law)
        known = np.isfinite(x)
        log_n = law.best_size(np.where(known, x, start))
        return np.where(known, np.exp(x - log_flops(log_n, np.zeros(1), law)), np.exp(x))[:, 0]

    floor = basis.number(lambda law: law.floor[:, 0], "nats", 0.0)
    if floor.interval is not None:  # a draw with E = 0 is at the end of E's domain, not beyond every end
        floor = replace(floor, interval=(max(floor.interval[0], 0.0), floor.interval[1]))
    draws = found.draws.get(str(found.surface))
    below = (
        "" if draws is None else f"{(basis.law(draws.params).floor >= loss).mean():.0%} of the draws have E above it"
    )
    error = found.observations.shared_error
    text = (f"E is that of this validation text, whose own standard error is {told(error)}",) if error else ()
    if said := basis.unreached(loss, told):
        is_above = loss > float(basis.best.floor[0, 0])  # the ceiling, of which the draws' floors say nothing
        said = said if is_above or not below else f"{said}; {below}"
        return basis.answer(asked, None, {"E": floor}, (said, *text))
    flops = float(np.exp(log_c(basis.best))[0, 0])
    decades = basis.decades(flops)
    numbers = {
        "flops": basis.number(lambda law: np.exp(log_c(law))[:, 0], "FLOPs", decades),
        "num_params": basis.number(size, "parameters", decades),
        "num_tokens": basis.number(tokens, "tokens", decades),
        "E": floor,
    }
    doubtful = floor.interval is not None and floor.interval[1] >= loss
    return basis.answer(asked, decades, numbers, (*(f"perhaps out of reach: {below or 'E'}",) * doubtful, *text))


def of_num_params(found: Surfaced, num_params: float) -> Answer:
    """How far to train a model of N parameters: the tokens past which a larger one would be better for the compute."""
    basis = Basis(found)
    start, log_n = math.log(basis.top), np.log([[num_params]])

    def log_d(law: LawAtBest) -> np.ndarray:
        return log_flops_where(law, num_params, start, of_size=True) - log_flops(log_n, np.zeros(1), law)

    flops = float(np.exp(log_flops_where(basis.best, num_params, start, of_size=True))[0, 0])
    decades = basis.decades(flops)
    numbers = {
        "num_tokens": basis.number(lambda law: np.exp(log_d(law))[:, 0], "tokens", decades),
        "flops": basis.number(
            lambda law: np.exp(log_flops_where(law, num_params, start, of_size=True))[:, 0], "FLOPs", decades
        ),
        "loss": _run_loss(basis, num_params, float(np.exp(log_d(basis.best))[0, 0]), flops, decades),
    }
    table, law = [], basis.best
    for times in OVERTRAINED:
        longer = log_d(law) + math.log(times)
        loss = loss_at(law, log_n, longer)
        spent = log_flops(log_n, longer, law)
        over = np.exp(spent - law.log_paid(loss, spent))
        table.append({
            "num_tokens": float(np.exp(longer)[0, 0]), "flops": float(np.exp(spent)[0, 0]),
            "loss": float(loss[0, 0]), "compute over the least for that loss": float(over[0, 0]),
        })  # fmt: skip
    notes = ("past num_tokens a larger model is better for the same compute",)
    return basis.answer(
        f"{compact(num_params)} parameters", decades, numbers, notes, {"trained longer, by the law": table}
    )


def _run_loss(basis: Basis, num_params: float, num_tokens: float, flops: float, decades: float) -> Number:
    """The loss of one run as it is forecast, with its interval."""
    cell = {"run_id": "asked", "num_params": num_params, "num_tokens": num_tokens, "flops": flops}
    (said,) = forecast(basis.found, [cell], basis.level)
    return Number(said["predicted"], basis.worth(said["interval"], decades), "nats", said["by_law"])


def of_data(found: Surfaced, num_tokens: float, unique_tokens: float | None = None) -> Answer:
    """The size for which D tokens are compute-optimal, its loss, and what twice the tokens would buy.

    With only U < D unique tokens, and the data-constrained law among the fits (Muennighoff et al. 2023), the size that
    is best for the same compute when they repeat; without that law, that repetition is not covered.
    """
    basis = Basis(found)
    start = math.log(basis.top)
    log_d = np.log([[num_tokens]])

    def log_c(law: LawAtBest) -> np.ndarray:
        return log_flops_where(law, num_tokens, start, of_size=False)

    def size(law: LawAtBest) -> np.ndarray:
        return np.exp(law.best_size(log_c(law)))[:, 0]

    def buys(law: LawAtBest) -> np.ndarray:
        return (law.loss(log_c(law)) - law.loss(log_flops_where(law, 2 * num_tokens, start, of_size=False)))[:, 0]

    def at_one_size(law: LawAtBest) -> np.ndarray:
        log_n = law.best_size(log_c(law))
        return (loss_at(law, log_n, log_d) - loss_at(law, log_n, log_d + math.log(2)))[:, 0]

    flops = float(np.exp(log_c(basis.best))[0, 0])
    decades = basis.decades(flops)
    numbers = {
        "num_params": basis.number(size, "parameters", decades),
        "flops": basis.number(lambda law: np.exp(log_c(law))[:, 0], "FLOPs", decades),
        "loss": _run_loss(basis, float(size(basis.best)[0]), num_tokens, flops, decades),
        "loss less by twice the tokens, same size": basis.number(at_one_size, "nats", decades),
        "loss less by twice the tokens, best size": basis.number(buys, "nats", decades),
    }
    asked, notes = f"{compact(num_tokens)} tokens", []
    if unique_tokens is not None:
        asked += f", {compact(unique_tokens)} of them unique"
        numbers["epochs"] = Number(max(num_tokens / unique_tokens, 1.0), None, "epochs")
        repeated = next((f for f in found.fits.values() if "unique_tokens" in f.form.columns), None)
        if num_tokens > unique_tokens and repeated is None:
            notes.append(
                "repetition is not covered: the numbers take every token for new; write --law chinchilla "
                "data_constrained on runs that repeat theirs"
            )
        elif repeated is not None:
            numbers |= _repeated(basis, repeated, flops, unique_tokens, decades)
        if num_tokens > unique_tokens and repeated is not None:
            epochs = numbers["epochs, tokens repeated"].value
            notes.append(
                f"tokens repeated: by {repeated.form.name}, the size that is best for the same {flops:.3g} FLOPs, and "
                f"reads its data {epochs:.3g} times; the lines above take every token for new"
            )
    return basis.answer(asked, decades, numbers, tuple(notes))


def _repeated(basis: Basis, fitted: Fit, flops: float, unique_tokens: float, decades: float) -> dict[str, Number]:
    """Best size, epochs and loss for C when U tokens repeat, and what twice as many would buy."""
    log_c, middle = math.log(flops), float(basis.best.best_size(np.log([flops]))[0, 0])
    grid = middle + np.linspace(-6, 6, 1201)  # the law has kinks where repeating begins: searched, not descended

    def least(p: Params, unique: float) -> tuple[np.ndarray, np.ndarray]:
        params = {k: np.atleast_1d(v)[:, None] for k, v in p.items()}
        tokens = np.exp(log_c - basis.cost.log_flops_per_token(grid))
        with np.errstate(all="ignore"):
            loss = fitted.form.predict(params, num_params=np.exp(grid), num_tokens=tokens, unique_tokens=unique)
        loss = np.where(np.isfinite(loss), loss, np.inf)
        return grid[loss.argmin(axis=1)], loss.min(axis=1)

    quantities = {
        "num_params, tokens repeated": ("parameters", lambda p: np.exp(least(p, unique_tokens)[0])),
        "epochs, tokens repeated": (
            "epochs",
            lambda p: np.exp(log_c - basis.cost.log_flops_per_token(least(p, unique_tokens)[0])) / unique_tokens,
        ),
        "loss, tokens repeated": ("nats", lambda p: least(p, unique_tokens)[1]),
        "loss less by twice the unique tokens": (
            "nats", lambda p: least(p, unique_tokens)[1] - least(p, 2 * unique_tokens)[1],
        ),
    }  # fmt: skip
    draws, out = basis.found.draws.get(fitted.form.name), {}
    for name, (unit, quantity) in quantities.items():
        ends = None if draws is None else basis.worth(interval(quantity(draws.params), basis.level), decades)
        out[name] = Number(float(quantity(fitted.params)[0]), ends, unit)
    return out


def value(found: Surfaced, flops: float | None = None, downstream: Fit | None = None) -> Answer:
    """What a doubling of N, of D, and of C at its best, takes off the loss, from the optimum at C (by default the
    largest compute fitted) on; and off an error whose law of the loss is given (Gadre et al. 2024, eq. 5)."""
    basis = Basis(found)
    flops = basis.top if flops is None else flops
    decades, log_c, two = basis.decades(flops), np.log([flops]), math.log(2)

    def at(log_n_more: float, log_d_more: float) -> Quantity:
        def quantity(law: LawAtBest) -> np.ndarray:
            log_n = law.best_size(log_c)
            log_d = log_c - log_flops(log_n, np.zeros(1), law)
            return loss_at(law, log_n + log_n_more, log_d + log_d_more)[:, 0]

        return quantity

    def of_more_compute(law: LawAtBest) -> np.ndarray:
        return law.loss(log_c + two)[:, 0]

    def less(then: Quantity) -> Quantity:
        return lambda law: before(law) - then(law)

    before: Quantity = at(0.0, 0.0)
    after: dict[str, Quantity] = {"N": at(two, 0.0), "D": at(0.0, two), "C": of_more_compute}
    numbers = {f"loss less by twice {what}": basis.number(less(then), "nats", decades) for what, then in after.items()}
    if downstream is not None:
        numbers |= {
            f"error less by twice {what}": _error_number(basis, downstream, before, then, decades)
            for what, then in after.items()
        }
    return basis.answer(f"what a doubling is worth at {flops:.3g} FLOPs", decades, numbers)


def _error_number(basis: Basis, error: Fit, before: Quantity, after: Quantity, decades: float) -> Number:
    """What an error falls by between two losses, by draws of the loss's law and of the error's, paired."""

    def fall(params: Params, of: Params) -> np.ndarray:
        law = basis.law(params)
        first, then = (error.form.predict(of, loss=loss(law)) for loss in (before, after))
        return np.atleast_1d(first - then)

    drawn, ends = basis.found.draws.get(str(basis.found.surface)), None
    if drawn is not None and error.draws is not None:
        num = min(len(drawn), len(error.draws))
        falls = fall(drawn.first(num).params, error.draws.first(num).params)
        ends = basis.worth(interval(falls, basis.level), decades)
    return Number(float(fall(basis.fitted.params, error.params)[0]), ends, "error")
