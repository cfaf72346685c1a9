"""Numbers as a person reads and writes them: counts, durations, dollars, how many resamples."""

import math
import numbers
from typing import Any


def compact(value: float, _position: Any = None) -> str:
    """A count a person reads at a glance, in at most five characters: 950, 30K, 1.25M, 7B.

    ``_position`` is what matplotlib's formatters are also given.
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    suffixes = ("", "K", "M", "B", "T")
    # Rounded to three digits first: 999,999 is 1M, not 1e+03K.
    value = float(f"{value:.3g}")
    group = min(max(math.floor(math.log10(abs(value)) / 3), 0), len(suffixes) - 1)
    return f"{value / 1000**group:.3g}{suffixes[group]}"


# No count, loss or amplitude is so large: an end of an interval that resamples or a profile put there is none.
NO_END = 1e40


def ended(end: float | None) -> float | None:
    """An end of an interval; None, unbounded, for one that the data do not set."""
    return end if end is not None and (end == 0 or 1 / NO_END < abs(end) < NO_END) else None


def duration(seconds: float | None) -> str:
    """Seconds as 8.4 s, 3:07 or 2:05:00; a dash for what is not known."""
    if seconds is None:
        return "–"
    if 0 < seconds < 0.05:
        return "<0.1 s"
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def dollars(value: float | None) -> str:
    """$0.0031, $4.20, $12,300; a dash for what is not known."""
    if value is None:
        return "–"
    return f"${value:,.0f}" if value >= 100 else f"${value:.2f}" if value >= 0.1 else f"${value:.2g}"


MIN_RESAMPLES = 20  # of fewer the ends of an interval are the first that came, as if it had none


def check_resamples(name: str, given: Any) -> None:
    """Raises ValueError on a number of resamples that makes no interval."""
    whole = isinstance(given, numbers.Integral) and not isinstance(given, bool)
    if not whole or 0 != int(given) < MIN_RESAMPLES:
        raise ValueError(f"{name} is {given!r}: write {MIN_RESAMPLES} or more, or 0 for the delta method")
