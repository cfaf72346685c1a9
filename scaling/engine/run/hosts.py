"""Tasks on all hosts at once: process 0 publishes each and does its part, the others follow."""

import dataclasses
import hashlib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scaling import records
from scaling.config import DataConfig, RunConfig
from scaling.engine.run import inline
from scaling.engine.run import worker as worker_module
from scaling.engine.run.executor import Executor, Runner
from scaling.engine.run.tasks import LOOP, ExecutorError, Task, ignore
from scaling.fields import from_dict, to_dict
from scaling.training.distributed import Group


class InProcess(Executor):
    """All in this process, one task after another; as one of several processes, together with the others."""

    can_be_distributed = True

    @property
    def times_here(self) -> bool:
        """Not with others: processes that time a step together would each stop after a number of their own."""
        return self.orders.group is None

    def num_workers(self, num_packs: int) -> int:
        return 1

    def start(self, workers: int, lock_fds: Sequence[int] = ()) -> Runner:
        group, loop = self.orders.group, self.orders.loop
        return inline.Inline(loop) if group is None else Leader(group, loop)


class Leader(inline.Inline):
    """``Inline`` on process 0, with the other processes doing the same.

    An error that is not about bad input cannot be a cell's alone here: the others are inside the same computation, or
    one of them is gone. So it ends the command everywhere.
    """

    def __init__(self, group: Group, loop: str = LOOP):
        super().__init__(loop, compile_ahead=False)  # the others would not
        self._group = group

    def run(self, tasks: Sequence[Task], on_event: Callable[[dict], None] = ignore) -> dict:
        """As ``Inline.run``, when all processes have said that they have the same software and the same data.

        Raises ExecutorError where they have not: they would train, and record one fingerprint of several.
        """
        cells = [raw for task in tasks for raw in task.payload.get("cells", ())]
        configs = list(dict.fromkeys(from_dict(RunConfig, raw["run"]).data for raw in cells))
        self._group.publish({"agree": [to_dict(c) for c in configs]})
        words = self._group.gather(_word(configs, Path(tasks[0].payload["cache_dir"])) if tasks else {})
        difference = _difference(words)
        self._group.publish({"verdict": difference})
        if difference is not None:
            raise ExecutorError(difference)
        return super().run(tasks, on_event)

    def _execute(self, loop, task: Task, on_event: Callable[[dict], None]) -> dict:
        self._group.publish({"task": dataclasses.asdict(task)})
        return _together(self._group, loop, task, on_event)


def follow(group: Group, cache_dir: Path, loop: str = LOOP) -> int:
    """What a process other than 0 does: its part of every task, until process 0 says with which exit code to stop.

    ``cache_dir`` is this host's: where it is not shared with process 0, the data is prepared here too.
    """
    module = importlib.import_module(loop)
    with inline.stopping_politely(module):
        for message in group.published():
            if "stop" in message:
                return message["stop"]
            if "agree" in message:
                group.tell(_word([from_dict(DataConfig, raw) for raw in message["agree"]], cache_dir))
                continue
            if "verdict" in message:
                if message["verdict"] is not None:
                    _say(group, message["verdict"])
                continue
            task = Task(**message["task"])
            task.payload["cache_dir"] = str(cache_dir)
            try:
                _together(group, module, task, lambda event: None)
            except ValueError as e:  # the same on process 0, most often, which says what comes of it
                _say(group, worker_module.describe(e))
            except module.Interrupted:
                pass  # process 0 says with which code to end
    raise AssertionError("process 0 ended without a last word")


def _say(group: Group, text: str) -> None:
    print(f"error: process {group.process} of {group.processes}: {text}", file=sys.stderr, flush=True)


def _word(configs: Sequence[DataConfig], cache_dir: Path) -> dict:
    """What this process would train with; it prepares the data that it has not."""
    from scaling import data

    software = records.software()
    word = {f"software: {name}": version for name, version in software["versions"].items()}
    source = hashlib.sha256()  # a commit says nothing of what was edited since
    for path in sorted(Path(records.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    word["software: source of scaling"] = source.hexdigest()
    for config in configs:
        try:
            data.prepare(config, cache_dir)
            corpus = data.open(config, cache_dir)
        except Exception as e:  # known to process 0, which waits for an answer
            return {"error": worker_module.describe(e)[:500]}
        name = f"{config.source} in windows of {config.seq_len}"
        word[f"data: {name}"] = corpus.fingerprint
        few = min(8, len(corpus.validation_counts()))
        windows = hashlib.sha256(corpus.batch(0, 8, seed=0).tobytes() + corpus.validation_windows(0, few)[0].tobytes())
        word[f"windows: {name}"] = windows.hexdigest()
    return word


def _difference(words: Sequence[dict]) -> str | None:
    """What keeps the processes from training together, in one line; None if nothing does."""
    for i, word in enumerate(words):
        if "error" in word:
            return f"process {i}: {word['error']}"
    for i, word in enumerate(words):
        for what in sorted(words[0].keys() | word.keys()):
            here, there = words[0].get(what), word.get(what)
            if here != there:
                kind, _, name = what.partition(": ")
                mend = "install the same on every host" if kind == "software" else (
                    "the hosts read different files: prepare the data once, in a SCALING_CACHE that all see, or copy it"
                )  # fmt: skip
                return f"process 0 has {kind} {name} {_short(here)}, process {i} has {_short(there)}: {mend}"
    return None


def _short(value: str | None) -> str:
    return "none" if value is None else value[:12]


def _together(group: Group, loop, task: Task, on_event) -> dict:
    with group.at_task(is_deaf=lambda: not loop.stop_requested.is_set()):
        try:
            return worker_module.execute(loop, task.command, task.payload, on_event)
        except ValueError as e:
            group.could_not(worker_module.describe(e)[:500])
            raise
        except loop.Interrupted:
            raise
        except Exception as e:
            group.abandon(worker_module.describe(e)[:200])
