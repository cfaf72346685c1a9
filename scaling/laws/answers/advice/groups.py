"""Which of two groups of runs to train from which compute on, with the probability that it is so."""

import numpy as np

from scaling.laws.answers.advice.basis import MAX_DECADES, Answer, Number
from scaling.laws.answers.at_best import log_multiplier
from scaling.laws.answers.multiplier import UNITS, Comparison, law_of
from scaling.laws.forms.law import Params

POINTS = 49


def of_groups(found: Comparison, first: str, second: str) -> Answer:
    """Which of two groups has the lower loss at equal compute, from where on, and with which probability.

    The probability at C is the share of the comparison's draws, spread by its ``widening``, in which the second takes
    more than C for the loss that the first has for C: of laws that share exponents, or, where the test rejects that, of
    the groups' own.

    Raises ValueError for a name that is none of the groups.
    """
    names = [g.name for g in found.groups]
    for name in (first, second):
        if name not in names:
            raise ValueError(f"{found.source}: --compare {name}: write two of {', '.join(names)}")
    if first == second:
        raise ValueError(f"{found.source}: --compare {first} {second}: write two different groups")
    if found.draws is None:
        raise ValueError(f"{found.source}: a probability is a share of resamples: write --bootstrap 1000")
    g, h = names.index(first), names.index(second)
    spent = [group.observations.columns[found.axis] for group in found.groups]
    top = max(x.max() for x in spent)
    at = np.geomspace(min(x.min() for x in spent), top * 10**MAX_DECADES, POINTS)

    def log_times(one: Params, other: Params, place: int, over: int) -> np.ndarray:
        return log_multiplier(law_of(found, one, g, place), law_of(found, other, h, over), np.log(at))

    one, other = found.groups[g], found.groups[h]
    apart = found.leads_apart
    if apart and one.alone and other.alone and one.alone_draws and other.alone_draws:
        value = log_times(one.alone.params, other.alone.params, 0, 0)[0]
        draws = log_times(one.alone_draws.params, other.alone_draws.params, 0, 0)
    else:
        value = log_times(found.joint.params, found.joint.params, g, h)[0]
        draws = log_times(found.draws.params, found.draws.params, g, h)
    draws = np.where(np.isfinite(draws), value + found.widening * (draws - value), draws)
    # Half a draw to each side: of a thousand draws that agree none is certainty.
    better = ((draws > 0).sum(axis=0) + 0.5) / ((~np.isnan(draws)).sum(axis=0) + 1)
    tail = [0.5 - found.level / 2, 0.5 + found.level / 2]
    ends = np.exp(np.quantile(draws, tail, axis=0, method="nearest"))
    places = [int(np.argmin(np.abs(np.log(at / x)))) for x in (top, top * 10, top * 100)]
    numbers = {}
    for i, beyond in zip(places, (0, 1, 2)):
        where = f"{beyond} decade{'s' * (beyond > 1)} beyond the fit" if beyond else "at the largest fitted"
        numbers[f"times the {UNITS[found.axis]} that {second} takes, {where}"] = Number(
            float(np.exp(value[i])), (float(ends[0, i]), float(ends[1, i])), "times"
        )
        numbers[f"probability that {first} is better, {where}"] = Number(float(better[i]), None, "")
    crossings = np.flatnonzero(np.diff(np.sign(value)))
    leader = first if value[-1] > 0 else second
    if len(crossings):
        i = crossings[-1]
        t = value[i] / (value[i] - value[i + 1])
        crossing = float(at[i] ** (1 - t) * at[i + 1] ** t)
        numbers[f"{leader} is better from"] = Number(crossing, None, UNITS[found.axis])
    said = "" if len(crossings) else f"{leader} is better at every compute from the fit to two decades beyond it"
    table = [
        {found.axis: float(x), f"probability that {first} is better": float(p)} for x, p in zip(at[::8], better[::8])
    ]
    shared = "by the groups' own laws: exponents that they share do not fit" if apart else ""
    return Answer(
        f"{first} or {second}", found.source, found.form.name, found.level, None, numbers,
        {"by compute": table}, tuple(note for note in (said, shared) if note),
    )  # fmt: skip
