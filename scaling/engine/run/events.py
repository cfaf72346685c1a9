"""One sink for what happens while a sweep runs, and the listener that writes it as JSON lines.

An event is a dict with ``event``, its kind: executors' own (``start``, ``progress``, ``branched``, ``said``, ``retry``,
``done``, ``failed``, ``tick``; see ``workers.Local.run``), and of the command ``plan``, ``cell`` (one that ended, with
its ``row`` and ``record``) and ``report``. The progress that a person sees, the signs in the work folder and JSON lines
are listeners.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Listener = Callable[[dict], None]


class Sink:
    """Hands every event to all who listen, in the order in which they began to."""

    def __init__(self, *listeners: Listener):
        self._listeners = list(listeners)

    def __call__(self, event: dict) -> None:
        for listener in list(self._listeners):
            listener(event)

    @contextmanager
    def heard_by(self, *listeners: Listener) -> Iterator[None]:
        """While it lasts, these listen too."""
        self._listeners += listeners
        try:
            yield
        finally:
            self._listeners = [one for one in self._listeners if one not in listeners]


class JsonLines:
    """Writes a line of JSON for every event but ticks; of a cell that ended its status, loss, size and tokens."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __call__(self, event: dict) -> None:
        if event["event"] == "tick":
            return
        if event["event"] == "cell":
            event = _about_cell(**event)
        self._stream.write(json.dumps(event, allow_nan=False, default=str) + "\n")
        self._stream.flush()


def _about_cell(event: str, row, record) -> dict:
    return {
        "event": event,
        "run_id": row.run_id,
        "labels": row.cell.labels,
        "holdout": row.cell.holdout,
        "status": record.status,
        "loss": record.loss,
        "loss_standard_error": record.standard_error,
        "num_params": record.num_params["non_embedding"],
        "num_tokens": record.num_tokens,
        "seconds": record.timing.get("seconds"),
        "predicted_seconds": row.seconds,
        "failure": record.environment.get("failure"),
    }
