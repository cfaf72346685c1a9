"""How worker processes of this machine died, in words, and what to write so that the next do not."""

import signal

from scaling import machine


class Deaths:
    """Tells those that the kernel killed for want of memory from the others: it counts them, and says not whom.

    ``workers``: how many share the memory.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._killed_for_memory = machine.num_killed_for_memory()

    def reason(self, returncode: int, peak_bytes: int | None) -> str:
        """Says why a worker is gone that has just ended; ``peak_bytes``: the most memory it had, if that is known."""
        before, self._killed_for_memory = self._killed_for_memory, machine.num_killed_for_memory()
        if returncode != -signal.SIGKILL or before is None or not (self._killed_for_memory or 0) > before:
            return f"worker killed by signal {-returncode}" if returncode < 0 else f"worker exited with {returncode}"
        had = "" if peak_bytes is None else f" at {peak_bytes / 1e9:.2g} GB"
        of = "" if (limit := machine.memory_bytes()) is None else f" of the {limit / 1e9:.3g} GB that there are"
        beside, mend = "", "execution: {remat: full} or {accumulation_steps: …}, or a machine with more of it"
        if self._workers > 1:
            beside, mend = f", one of {self._workers}", f"--workers {self._workers // 2}"
        return f"worker killed for want of memory{had}{of}{beside}: write {mend}"
