"""Schedules, by hand and by brute force."""

import itertools

import pytest

from scaling.engine.plan.timetable import Work, wall


def works(*seconds):
    return [Work(str(i), s) for i, s in enumerate(seconds)]


def test_longest_first_is_near_the_best():
    """Within 4/3 - 1/(3m) of the optimum (Graham 1969), which brute force finds here."""
    seconds, workers = [7, 6, 5, 4, 4, 3, 2], 3
    best = min(
        max(sum(s for s, w in zip(seconds, deal) if w == i) for i in range(workers))
        for deal in itertools.product(range(workers), repeat=len(seconds))
    )
    got = wall(works(*seconds), workers)
    assert best <= got <= best * (4 / 3 - 1 / (3 * workers))
    assert wall(works(*seconds), 1) == sum(seconds)
    assert wall([], 2) == 0.0
    assert wall(works(3, 3, 2, 2, 2), 2) == 7  # 3+2+2 and 3+2, though 3+3 and 2+2+2 would do


def test_what_runs_already_is_not_put_off_for_what_is_longer():
    running = Work("r", 10.0, is_running=True)
    assert wall([running, Work("a", 30.0), Work("b", 30.0)], 2) == 40.0  # 10 + 30 beside 30
    assert wall([Work("r", 10.0), Work("a", 30.0), Work("b", 30.0)], 2) == 40.0
    assert wall([running, Work("a", 30.0)], 1) == 40.0
    assert wall([running, Work("a", 30.0), Work("b", 12.0)], 2) == 30.0  # 10 + 12 beside 30


@pytest.mark.parametrize(
    "after, seconds",
    [
        ((("t", 0.25),), 100.0),  # 25 … 65
        ((("t", 0.75),), 115.0),
        ((("t", 0.25), ("u", 1.0)), 150.0),  # u: 0 … 60 on the other worker, then 90 more
        ((("gone", 1.0),), 100.0),
        ((("t", -3.0),), 100.0),  # it is past that
    ],
)
def test_work_waits_for_all_that_it_needs(after, seconds):
    length = 90.0 if len(after) == 2 else 40.0
    others = [Work("u", 60.0)] if len(after) == 2 else []
    assert wall([Work("t", 100.0), *others, Work("w", length, after)], 2) == seconds
