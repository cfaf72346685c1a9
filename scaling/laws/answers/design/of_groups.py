"""The next runs of two groups: those that narrow what one is worth over the other most for their cost.

The joint law of the groups (``forms.joint``) is one form, so ``beliefs`` hold of it as of any: a run of either group
tells of the exponents that they share and of its own group's amplitudes.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from scaling.laws.answers.at_best import log_multiplier
from scaling.laws.answers.design import beliefs, orders
from scaling.laws.answers.design.candidates import Candidates
from scaling.laws.answers.design.certificate import least_budget
from scaling.laws.answers.design.proposal import (
    EXPONENT,
    Order,
    Proposal,
    check_asked,
    far,
    unreached,
    what_is_left,
)
from scaling.laws.answers.design.target import Target
from scaling.laws.answers.multiplier import Comparison, curve, law_of
from scaling.laws.forms.joint import indicator
from scaling.laws.forms.law import Params

# Of groups that share exponents one test in twenty says that they do not, and one in a thousand so clearly.
FOR_GOOD = 1e-3


class NotShared(ValueError):
    """Exponents that the groups do not share; ``is_for_good``: more runs are not what would change that."""

    def __init__(self, said: str, *, is_for_good: bool) -> None:
        super().__init__(said)
        self.is_for_good = is_for_good


def numbers_of(found: Comparison, names: Sequence[str]) -> tuple[int, int]:
    """The numbers of two groups by their names. Raises ValueError for others."""
    known = [g.name for g in found.groups]
    if len(names) != 2 or len(set(names)) != 2 or not set(names) <= set(known):
        asked = " ".join(names) or "nothing"
        raise ValueError(f"{found.source}: --compare is {asked}: write two of {', '.join(known)}")
    g, h = (known.index(name) for name in names)
    return g, h


def numbers_by_name(found: Comparison, names: Sequence[str]) -> np.ndarray:
    """The number of each of ``names`` among the groups compared (n,). Raises ValueError for a group without runs."""
    numbers = {group.name: k for k, group in enumerate(found.groups)}
    if apart := [name for name in dict.fromkeys(names) if name not in numbers]:
        raise ValueError(f"no run of {', '.join(apart)} is completed")
    return np.array([numbers[name] for name in names], dtype=int)


def require_sizes(found: Comparison) -> None:
    """Raises ValueError for a law of one column, of which there is no size to choose."""
    if found.axis != "flops":
        raise ValueError(f"{found.source}: no design: {found.form.name} is not of N and D: write --law chinchilla")


def spread_of_groups(
    found: Comparison, groups: Sequence[str], target: Target, columns: orders.Columns, member: np.ndarray,
    blind: Collection[int] = (),
) -> orders.Spread:  # fmt: skip
    """``orders.spread_of`` the multiplier of two groups; ``member``: which group each row of ``columns`` is of, by its
    number."""
    log_times = _log_times(found, numbers_of(found, groups), target)
    apart = _told_apart(found, columns, member)
    return orders.spread_of(found.joint, lambda p: log_times(p)[:, 0], apart, blind=blind)


def _log_times(found: Comparison, pair: tuple[int, int], target: Target) -> Callable[[Params], np.ndarray]:
    """The log multiplier of the first of two groups over the second, by the joint law's parameters (B,): (B, 1)."""
    log_x, (g, h) = np.log(np.array(target.at)), pair
    return lambda params: log_multiplier(law_of(found, params, g, g), law_of(found, params, h, h), log_x)


def _told_apart(found: Comparison, columns: orders.Columns, member: np.ndarray) -> dict[str, np.ndarray]:
    """``columns`` with those by which the joint law tells groups apart."""
    own = {indicator(k): np.where(member == k, np.e, 1.0) for k in range(1, len(found.groups))}
    return {**columns, **own}


def propose_of_groups(
    found: Comparison, groups: Sequence[str], candidates: Candidates, member: np.ndarray, target: Target, *,
    batch: int = 1, exponent: float = EXPONENT, budget: float | None = None, asked: float | None = None,
) -> Proposal:  # fmt: skip
    """Chooses the runs that narrow the multiplier of the first of two ``groups`` over the second most for their cost,
    greedily as ``propose`` does; of an interval without an end it says so, and no width.

    Args:
      member: which group each candidate is of (n,), by its number among those of ``found``.
      target: ``multiplier@C``, C what the first group spends.

    Raises:
      ValueError: no such groups, or a law of one column, where there is no size to choose.
    """
    check_asked(batch, exponent, budget, asked)
    g, h = numbers_of(found, groups)
    require_sizes(found)
    member = np.asarray(member)
    if target.name != "multiplier":
        raise ValueError(f"--target is {target}: of two groups write multiplier@C")
    if member.shape != (len(candidates),) or not set(member.tolist()) <= set(range(len(found.groups))):
        raise ValueError(f"candidates: member is not the number of a group of each, 0 to {len(found.groups) - 1}")
    if found.leads_apart:
        p_value = found.sharing.p_value  # type: ignore[union-attr]  # the test was made: it rejects
        raise NotShared(
            f"{found.source}: no design: exponents shared by the groups do not fit (p {p_value:.2g}), "
            "and a multiplier by them is another number: narrow each group's own law, --target loss@C",
            is_for_good=p_value < FOR_GOOD,
        )
    log_times = _log_times(found, (g, h), target)
    lower, upper = curve(found, log_times).interval[0]
    interval = (float(lower), float(upper))
    width = target.width(interval)
    if not len(candidates):
        why = "there is no candidate: every cell has its record, or none was named"
        return Proposal(target, found.level, (), interval, width, width, candidates.unit, {}, (why,),
                        certificate=unreached(asked, "there is no candidate"))  # fmt: skip
    columns = _told_apart(found, candidates.columns, member)
    known = beliefs.of_fit(found.joint, columns, lambda p: log_times(p)[:, 0], target.name)
    order = Order(known, known, candidates, exponent, width)
    steps = order.take(batch, budget) if known.voters else []
    following = order.best(None if budget is None else budget - order.spent) if known.voters else None
    said = [*known.reasons, *(what_is_left(order, candidates, steps, following, budget) if known.voters else [])]
    for k, group in enumerate(found.groups):
        if group.cost is not None:
            said += far(group.cost, candidates, [s.candidate for s in steps if member[s.candidate] == k])
    if not np.isfinite(width):
        said.append("the interval has no end yet: these runs tell most of the law at this C, and no width can be said")
    certificate = unreached(asked, "no form tells of the target yet")
    if asked is not None and known.voters:
        reached = Order(known, known, candidates, exponent, width).until(asked)
        certificate = least_budget(known, candidates, width, asked, reached)
    after = steps[-1].width_after if steps else width
    return Proposal(target, found.level, tuple(steps), interval, width, after, candidates.unit, known.voters,
                    tuple(said), following, certificate)  # fmt: skip
