"""Batches made ahead: those that would have been made in turn, whatever ends in between, and no thread left over."""

import itertools
import threading
import types

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from scaling import accounting, data
from scaling.config import DataConfig
from scaling.execution import ExecutionConfig, MeshConfig
from scaling.training import calibration, loop, sharding
from scaling.training.member import Member, Rider
from scaling.training.pack import Pack
from scaling.training.prefetch import Prefetched
from tests.training.lab import EXECUTION, cell, essence, train, train_and_stop_at

LONG = 30  # seconds: a wait that is not over by then never ends


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@given(st.integers(0, 30), st.integers(1, 9), st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_items_come_in_order_and_at_most_depth_of_them_ahead(count, depth, take):
    taken, ahead = [], []

    def make(i):
        ahead.append(i - len(taken))  # how many lie ready, or are about to, when it is made
        return i

    with Prefetched(map(make, range(count)), depth) as items:
        for item in itertools.islice(items, take):
            taken.append(item)
    assert taken == list(range(count))[:take]
    assert all(lead <= depth for lead in ahead)


def test_what_raises_is_raised_where_its_item_is_taken_and_ever_after():
    error = ValueError("shard 3 holds 5 bytes instead of 7: delete it")

    def make(i):
        if i == 3:
            raise error
        return i

    with Prefetched(map(make, range(10)), depth=8) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(ValueError, match="delete it") as raised:
                next(items)
            assert raised.value is error


def test_leaving_early_waits_for_the_item_under_way_and_makes_no_other():
    under_way, may_end, made = threading.Event(), threading.Event(), []

    def make(i):
        under_way.set()
        assert may_end.wait(LONG)
        made.append(i)

    threading.Timer(0.05, may_end.set).start()
    with Prefetched(map(make, itertools.count()), depth=16) as items:
        assert under_way.wait(LONG)
    assert made == [0]
    assert not items._thread.is_alive()


def test_a_source_as_slow_as_the_step_is_hidden_by_it():
    """Batch i + 1 is made while step i runs, by events: in turn, neither would ever come to its end."""
    steps = 6
    stepping = [threading.Event() for _ in range(steps)]
    made = [threading.Event() for _ in range(steps)]

    def make(i):
        assert i == 0 or stepping[i - 1].wait(LONG)
        made[i].set()
        return i

    with Prefetched(map(make, range(steps)), depth=1) as items:
        for i in items:
            stepping[i].set()
            assert i + 1 == steps or made[i + 1].wait(LONG)


def test_a_block_that_takes_several_steps_is_hidden_by_them():
    """Every eighth item takes as long as four steps, and four lie ready when it is begun."""
    stepped, taken = threading.Semaphore(0), []

    def make(i):
        if i and i % 8 == 0:
            for _ in range(4):
                assert stepped.acquire(timeout=LONG)
        return i

    with Prefetched(map(make, range(64)), depth=8) as items:
        for _ in range(64):
            taken.append(next(items))
            stepped.release()
    assert taken == list(range(64))


class Numbered:
    """A corpus whose tokens say which batch they are of."""

    def __init__(self, seq_len):
        self.seq_len = seq_len

    def batch(self, step, batch_size, seed, rows=None):
        rows_R = np.arange(batch_size)[rows or slice(None)]
        place_RS = 1000 * rows_R[:, None] + np.arange(self.seq_len + 1)
        return (10_000_000 * seed + 10_000 * step + place_RS).astype(np.int32)


class Observed(Pack):
    """A pack that computes nothing, and looks at every batch in place of training on it: against a batch made at that
    moment, for the step at which each of its members is then."""

    def _compile(self):
        self.programs = types.SimpleNamespace(train=self._train, abstract_state={})
        self.state, self.seen = {}, getattr(self, "seen", [])

    def _train(self, state, batch):
        for k, tokens_BS in enumerate(np.asarray(batch["tokens"])):
            member = self.live.get(k)
            if member is None:
                assert not tokens_BS.any()
                continue
            np.testing.assert_array_equal(tokens_BS, self.corpus.batch(member.step, 8, member.run.seed))
            self.seen.append((member.run.run_id, member.step))
        losses = [np.nan if m is not None and m.step + 1 == m.doomed_at else 1.0 for m in self.members]
        return state, {"loss": jax.numpy.array(losses)}

    def evaluate_curves(self, members):
        pass

    def save(self, members):
        pass


def observed_pack(wanted, starts):
    """Members by (steps, where a rider branches off or None, the step that diverges or None), from ``starts``."""
    members = []
    for seed, (start, (steps, branch, doomed)) in enumerate(zip(starts, wanted)):
        one = cell(DataConfig(source="text:nowhere", seq_len=16), steps=steps, seed=seed)
        member = Member(one, accounting.plan(one.run), step=start)
        member.doomed_at = doomed
        if branch is not None and start < branch < steps:
            longer = cell(DataConfig(source="text:nowhere", seq_len=16), steps=99, seed=seed)
            member.riders.append(Rider(Member(longer, accounting.plan(longer.run), step=start), branch))
        members.append(member)
    mesh = sharding.make_mesh(MeshConfig(run=2, data=2, fsdp=1, tensor=2))
    return Observed(members, Numbered(16), ExecutionConfig(checkpoint_seconds=1e9), mesh)


def train_observed(pack, stop_after):
    """As the loop's ``_run``. Asks to stop after ``stop_after`` steps, and raises Interrupted then."""

    def watch(event):
        if pack.num_steps_done >= stop_after:
            loop.stop_requested.set()

    while pack.live:
        loop._train_to_boundary(pack, watch)
        for member in pack.live.values():
            member.riders = [r for r in member.riders if r.branch_step > member.step]
        pack.shrink()


MEMBER = st.tuples(st.integers(1, 12), st.none() | st.integers(1, 11), st.none() | st.integers(1, 12))


@given(
    wanted=st.lists(MEMBER, min_size=1, max_size=5), stop_after=st.none() | st.integers(1, 12), ahead=st.integers(1, 9)
)
@settings(deadline=None, max_examples=40)
def test_every_batch_is_the_one_of_its_members_steps_whatever_ends_branches_or_resumes(wanted, stop_after, ahead):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scaling.training.batches.AHEAD_STEPS", ahead)
        patch.setattr(loop, "_PROGRESS_SECONDS", -1.0)
        pack = observed_pack(wanted, [0] * len(wanted))
        members = [m for m in pack.members if m is not None]
        seen = []
        try:
            train_observed(pack, stop_after or np.inf)
        except loop.Interrupted:
            seen = pack.seen
            pack = observed_pack(wanted, [m.step for m in members])
            loop.stop_requested.clear()
            resumed = [m for m in pack.members if m is not None]
            for member, before in zip(resumed, members):
                member.diverged_at_step = before.diverged_at_step
            train_observed(pack, np.inf)
        finally:
            loop.stop_requested.clear()
    seen = sorted([*seen, *pack.seen])
    for member in members:  # every step of every run once, up to its end or at most two past its divergence
        steps = [step for run_id, step in seen if run_id == member.run.run_id]
        assert steps == list(range(len(steps)))
        ends = member.plan.num_steps
        assert len(steps) == ends or (member.doomed_at is not None and member.doomed_at <= len(steps) < ends)


def test_of_large_batches_two_are_made_ahead(monkeypatch):
    pack = observed_pack([(12, None, None)] * 3, [0] * 3)
    shape = (4, 8, 17)  # a row fills the mesh
    for budget, depth in ((1, 2), (5 * 4 * np.prod(shape), 5), (2**40, 32)):
        monkeypatch.setattr("scaling.training.batches.AHEAD_BYTES", int(budget))
        assert pack.batches()._depth == depth


def test_each_block_is_made_once_and_they_are_the_array():
    asked = []
    whole = np.arange(2 * 8 * 5, dtype=np.int32).reshape(2, 8, 5)

    def rows_of(index):
        asked.append(tuple((s.start, s.stop) for s in index))
        return whole[index]

    mesh = sharding.make_mesh(MeshConfig(run=2, data=2, fsdp=1, tensor=2))
    blocks = sharding.host_blocks(mesh, P("run", ("data", "fsdp")), whole.shape, rows_of)
    assert sorted(asked) == [((k, k + 1), (b, b + 4), (0, 5)) for k in (0, 1) for b in (0, 4)]
    made = sharding.from_blocks(mesh, P("run", ("data", "fsdp")), whole.shape, blocks)
    np.testing.assert_array_equal(np.asarray(made), whole)


@pytest.fixture
def failing_at_step_9(monkeypatch):
    batch = data.Corpus.batch

    def failing(self, step, *args):
        if step == 9:
            raise OSError(5, "Input/output error", "train-0.bin")
        return batch(self, step, *args)

    monkeypatch.setattr(data.Corpus, "batch", failing)


def test_a_disk_that_is_gone_ends_training_with_its_own_error(corpus, tmp_path, failing_at_step_9):
    steps = []
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: 'train-0.bin'$") as raised:
        train([cell(corpus[0])], corpus, tmp_path, on_event=lambda event: steps.append(event.get("step")))
    frames = [entry.name for entry in raised.traceback]
    assert frames[-1] == "failing"  # it says where it was read
    assert frames.index("_train_to_boundary") < frames.index("__next__") < frames.index("_make")


@pytest.mark.slow
def test_the_steps_before_a_batch_that_cannot_be_read_are_kept(corpus, tmp_path, failing_at_step_9, monkeypatch):
    """Trained and saved: what is ahead of the step must not cost the steps before it."""
    monkeypatch.setattr(Pack, "wants_save", lambda self, now: True)
    with pytest.raises(OSError, match="Input/output error"):
        train([cell(corpus[0])], corpus, tmp_path)
    (folder,) = (tmp_path / "work" / "checkpoints").iterdir()
    assert max(int(p.name) for p in folder.iterdir() if p.name.isdigit()) == 9


def test_interrupted_and_resumed_the_record_is_that_of_a_run_read_in_turn(corpus, tmp_path, monkeypatch):
    assert train_and_stop_at(7, [cell(corpus[0])], corpus, tmp_path / "cut") is None
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    [cut] = train([cell(corpus[0])], corpus, tmp_path / "cut")

    class InTurn(Prefetched):
        """Made when it is asked for, in the loop's own thread."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __next__(self):
            return next(self._items)

    monkeypatch.setattr("scaling.training.batches.Prefetched", InTurn)
    [in_turn] = train([cell(corpus[0])], corpus, tmp_path / "in_turn")
    assert essence(cut) == essence(in_turn)


def test_calibration_reads_ahead_and_ends_its_thread(corpus, monkeypatch):
    started = []
    enter = Prefetched.__enter__
    monkeypatch.setattr(Prefetched, "__enter__", lambda self: started.append(self) or enter(self))
    timed = calibration.calibrate(cell(corpus[0], steps=2).run, EXECUTION, corpus[1], seconds=0.01)
    assert timed["step_seconds"] > 0
    assert len(started) == 1
    assert not started[0]._thread.is_alive()
