"""Wall time of work on a number of workers: what takes longest first, each to the next free worker."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """What one worker does in ``seconds``.

    ``after``: keys of other work and the share of it, 0 to 1, that has to be done before this can begin; a key that is
    not in the timetable waits for nothing. ``is_running``: a worker is at it already.
    """

    key: str
    seconds: float
    after: tuple[tuple[str, float], ...] = ()
    is_running: bool = False


def wall(works: Iterable[Work], workers: int) -> float:
    """Seconds until all ``works`` are done: those that run first, then the longest of those that can begin."""
    works = list(works)
    here = {work.key for work in works}
    waiting: dict[str, list[tuple[float, Work]]] = {}  # key of what they wait for → share of it, who waits
    unmet: dict[str, int] = {}
    ready: list[tuple[bool, float, str, Work]] = []

    def begin(work: Work) -> None:
        heapq.heappush(ready, (not work.is_running, -work.seconds, work.key, work))

    for work in works:
        after = [] if work.is_running else [(key, share) for key, share in work.after if key in here]
        unmet[work.key] = len(after)
        for key, share in after:
            waiting.setdefault(key, []).append((min(1.0, max(0.0, share)), work))
        if not after:
            begin(work)
    other: Work | None
    now, free = 0.0, workers
    events: list[tuple[float, str, Work | None]] = []  # a worker is free (None), or work has one thing less to wait for
    while ready or events:
        while ready and free:
            work = heapq.heappop(ready)[-1]
            free -= 1
            heapq.heappush(events, (now + work.seconds, "", None))
            for share, other in waiting.pop(work.key, ()):
                heapq.heappush(events, (now + share * work.seconds, other.key, other))
        now, _, other = heapq.heappop(events)
        if other is None:
            free += 1
            continue
        unmet[other.key] -= 1
        if not unmet[other.key]:
            begin(other)
    return now
