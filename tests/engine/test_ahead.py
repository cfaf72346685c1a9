"""The next pack's programs compiled while the present one trains: forced on, since on a CPU it is off."""

import contextlib
import threading

import jax
import pytest

from scaling import fields, records
from scaling.engine.run import worker
from scaling.engine.run.inline import Inline
from scaling.engine.run.tasks import Line, Task
from scaling.training import programs
from tests.training.lab import EXECUTION, cell, essence, make_corpus, progress_at_every_step

COMPILATION = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("cache"))


def task(cells, corpus, folder):
    payload = {
        "cells": [worker.cell_to_json(c) for c in cells],
        "execution": fields.to_dict(EXECUTION),
        "workdir": str(folder / "work"),
        "results": str(folder / "results"),
        "cache_dir": str(corpus[1]),
        "sweep_name": "t",
    }
    return Task(cells[0].run.run_id, "train", payload)


def packs_of(corpus, folder):
    """Two packs of different programs: of one run, and of two."""
    data = corpus[0]
    pair = [cell(data, seed=seed, name="lion") for seed in (0, 1)]
    return [task([cell(data)], corpus, folder), task(pair, corpus, folder)]


@contextlib.contextmanager
def compilations():
    """(name of the thread, of the program) of each compilation, those that come from the cache on disk included."""
    found = []

    def listen(event, seconds, **about):
        if event == COMPILATION:
            found.append((threading.current_thread().name, about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def trained(corpus, folder, **options):
    """The records of both packs, and what the main thread compiled for the second."""
    programs._for_pack.cache_clear()
    tasks, begun = packs_of(corpus, folder), []
    with compilations() as found, progress_at_every_step():

        def on_event(event):
            if event["event"] == "start":
                begun.append(len(found))

        answers = Inline(**options).run(tasks, on_event)
        later = [program for thread, program in found[begun[1] :] if thread == threading.main_thread().name]
        others = [program for thread, program in found if thread != threading.main_thread().name]
    assert all(answer.reason is None for answer in answers.values())
    return [essence(r) for r in records.load_records(folder / "results")], later, others


@pytest.mark.slow
def test_the_next_pack_finds_its_programs_compiled_and_leaves_the_same_records(corpus, tmp_path):
    plain, compiled, others = trained(corpus, tmp_path / "plain", compile_ahead=False)
    assert len(plain) == 3
    assert not others
    ahead, left, others = trained(corpus, tmp_path / "ahead", compile_ahead=True)
    assert not left
    assert sorted(others) == sorted(compiled)
    assert len(others) == 3  # train, evaluate, init: each once
    assert ahead == plain


def test_it_begins_at_the_first_progress_and_is_waited_for(corpus, tmp_path):
    """Whatever becomes of it: the task itself will say what is wrong."""
    said, may_end = [], threading.Event()

    class Loop:
        @staticmethod
        def compile_ahead(cells, execution):
            may_end.wait(10)
            said.append([c.run.run_id for c in cells])
            raise ValueError("out of memory")

    (first, second), events = packs_of(corpus, tmp_path), []
    ahead = worker.Ahead(Loop)
    watch = ahead.during(second.payload, events.append)
    watch({"event": "branched"})
    assert not ahead.is_busy
    watch({"event": "progress"})
    watch({"event": "progress"})
    assert ahead.is_busy
    threading.Timer(0.2, may_end.set).start()
    watch = ahead.during(None, events.append)
    assert said == [[raw.run.run_id for raw in map(worker.cell_from_json, second.payload["cells"])]]
    watch({"event": "progress"})
    assert not ahead.is_busy
    assert [event["event"] for event in events] == ["branched", "progress", "progress", "progress"]
    assert first.key not in said[0]


def test_what_follows_counts_what_the_task_will_have_released():
    trunk = Task("t", "train", {}, releases=("a",))
    other = Task("o", "train", {}, releases=("b",))
    a, b = Task("a", "train", {}, after=("a",)), Task("b", "train", {}, after=("b",))
    line = Line([trunk, b, a, other])
    assert line.after(line.next()) is a
    assert [line.next(), line.after(other)] == [other, b]  # of the trunk's nothing is released yet
