"""Signals heard while the main thread computes.

Python runs its handlers in the main thread, between two of its own instructions: in a compilation, or a collective that
waits for another host, minutes may pass or the night. The signal itself arrives at once, and is written to a socket.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Listener:
    """Calls ``hear`` with the number of every signal that has a Python handler, in a thread of its own, until
    ``close``. To be made, and closed, in the main thread; the one before it goes on hearing too."""

    def __init__(self, hear: Callable[[int], None]):
        self._hear = hear
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._before = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        with self._ours:
            while numbers := self._ours.recv(4096):
                if self._before != -1:
                    with suppress(OSError):
                        os.write(self._before, numbers)
                for number in numbers:
                    self._hear(number)

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        self._theirs.close()  # ends the thread
        self._thread.join(1.0)
