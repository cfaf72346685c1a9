"""A pack while it trains: its members, the state they share, their batches and evaluations.

A pack is only where its members happen to run. Each is at its own step, has its own checkpoints, and leaves at its own
end; the rest go on.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from scaling import data
from scaling.config import program_key
from scaling.execution import ExecutionConfig
from scaling.training import optimizers, programs, sharding
from scaling.training.batches import Batches
from scaling.training.evaluation import Evaluated, Evaluator
from scaling.training.member import Clock, Member
from scaling.training.prefetch import Prefetched

# Saving, as a part of training, at most.
MAX_SAVING_SHARE = 0.05


class Pack:
    """The runs of one compiled program: ``members[k]`` is row k of the state. Rows whose member has ended, and rows
    added to fill the mesh's ``run`` axis (None), train on and are not looked at."""

    def __init__(self, members: list[Member], corpus: data.Corpus, execution: ExecutionConfig, mesh):
        self.corpus, self.execution, self.mesh = corpus, execution, mesh
        self.run = members[0].run  # what all share of it: shapes, batch, data, evaluation
        self.members: list[Member | None] = self._filled(members)
        self.clock = Clock()
        self.state: Any = None
        self.num_steps_done = 0  # in this call
        self._last_save = time.perf_counter()
        self._save_seconds = 0.0  # of the last save
        self._compile()

    def _filled(self, members: Sequence[Member]) -> list[Member | None]:
        return [*members, *[None] * (sharding.rows_for(len(members), self.mesh) - len(members))]

    def _compile(self) -> None:
        self.programs = programs.for_pack(program_key(self.run), self.execution, len(self.members), self.mesh)
        with self.clock.timed("compile"):
            _ = self.programs.train, self.programs.evaluate
        self.curve_eval = Evaluator(self.corpus, self.run, self.run.eval.curve_tokens, self.programs)

    @property
    def live(self) -> dict[int, Member]:
        """The members that have not ended, by row."""
        return {k: m for k, m in enumerate(self.members) if m is not None and not m.has_ended}

    @property
    def steps_to_boundary(self) -> int:
        """Steps until the next member ends, or leaves a rider or an heir what it needs."""
        live = self.live.values()
        ends = [m.plan.num_steps - m.step for m in live]
        ends += [rider.branch_step - m.step for m in live for rider in m.riders]
        return min(ends + [heir.step - m.step for m in live for heir in m.heirs])

    def initialise(self) -> None:
        """Every row at step 0, by its member's seed and hyperparameters."""
        members = [m or self.members[0] for m in self.members]
        seeds_K = np.array([m.run.seed for m in members], np.int32)
        hparams = [optimizers.hyperparams(m.run.optim, m.plan) for m in members]
        hparams_K = {name: np.stack([h[name] for h in hparams]) for name in hparams[0]}
        with self.clock.timed("compile"):
            init = self.programs.init
        self.state = init(seeds_K, hparams_K)

    @property
    def abstract_row(self) -> dict:
        """Shapes, dtypes and shardings of ``row``: a lone run's state."""
        return self.programs.abstract_state if len(self.members) == 1 else self.programs.abstract_row

    def row(self, k: int) -> dict:
        """The state of member k, with a leading axis of 1."""
        return self.state if len(self.members) == 1 else self.programs.take_row(self.state, np.int32(k))

    def put_row(self, k: int, row: dict) -> None:
        self.state = row if len(self.members) == 1 else self.programs.put_row(self.state, row, np.int32(k))

    def rider_row(self, k: int, rider: Member) -> dict:
        """The state of member k as that of a rider: with its hyperparameters, but for the seed, which is the same."""
        row = self.row(k)
        hparams = dict(row["hparams"])
        for name, value in optimizers.hyperparams(rider.run.optim, rider.plan).items():
            spec = hparams[name].sharding.spec
            hparams[name] = sharding.host_array(self.mesh, spec, (1,), lambda index, value=value: value[None][index])
        return {**row, "hparams": hparams}

    @property
    def _batches(self) -> Batches:
        return Batches(self.corpus, self.run, len(self.members), self.mesh)

    def batches(self, num_steps: int | None = None) -> Prefetched[dict[str, sharding.Blocks]]:
        """For ``batch``: the next ``num_steps`` batches of the members that are live now, or batches without end.

        What they are is settled here, by each member's step; so none outlives a boundary, at which members change.
        """
        return self._batches.ahead({k: (m.step, m.run.seed) for k, m in self.live.items()}, num_steps)

    def batch(
        self, batches: Prefetched[dict[str, sharding.Blocks]], in_flight: dict[str, jax.Array] | None = None
    ) -> dict[str, jax.Array]:
        """The next batch of every member, each at its own step; zeros where none is looked at.

        It is taken while the device is busy with the step of ``in_flight``, its metrics. It counts as time spent on
        data only if that step was done before it: then the device had to wait.
        """
        started = time.perf_counter()
        taken = self._batches.onto_mesh(next(batches))
        if in_flight is None or all(value.is_ready() for value in in_flight.values()):
            self.clock.seconds["data"] += time.perf_counter() - started
        return taken

    def evaluate_curves(self, members: Mapping[int, Member]) -> None:
        """A point of the curve for every one of ``members``, by row, that wants it, and for its riders."""
        rows = [k for k, m in members.items() if m.wants_evaluation]
        for k, result in self._evaluate(self.curve_eval, rows).items():
            for member in (members[k], *(r.member for r in members[k].riders)):
                if member.step in member.eval_steps:
                    member.add_point(member.step, result.loss, result.standard_error, self.curve_eval.num_tokens)

    def evaluate_all(self, rows: Sequence[int]) -> tuple[dict[int, Evaluated], int]:
        """The loss of the members of ``rows`` over what the config takes of the validation split, and its tokens."""
        evaluator = Evaluator(self.corpus, self.run, self.run.eval.final_tokens, self.programs)
        return self._evaluate(evaluator, rows, final=True), evaluator.num_tokens

    def _evaluate(self, evaluator: Evaluator, rows: Sequence[int], *, final: bool = False) -> dict[int, Evaluated]:
        """By row. A few rows are evaluated one by one, by a lone run's program: the pack's would evaluate all."""
        with self.clock.timed("eval"):
            if 2 * len(rows) >= len(self.members) or self.mesh.shape["run"] > 1:
                results = evaluator(self.state["params"], final=final)
                return {k: results[k] for k in rows}
            lone = evaluator.by(programs.for_pack(program_key(self.run), self.execution, 1, self.mesh))
            return {k: lone(self.row(k)["params"], final=final)[0] for k in rows}

    def shrink(self) -> None:
        """Leaves out the rows of members that have ended, once that halves the pack: each size is another program."""
        kept = list(self.live)
        rows = len(self._filled(kept))
        if not kept or 2 * rows > len(self.members):
            return
        kept += [k for k in range(len(self.members)) if k not in kept][: rows - len(kept)]  # to fill the mesh
        live, indices = self.live, np.array(kept)
        self.members = [live.get(k) for k in kept]
        state = jax.tree.map(lambda x: x[indices], self.state)
        self._compile()
        self.state = jax.device_put(state, jax.tree.map(lambda a: a.sharding, self.programs.abstract_state))

    def wants_save(self, now: float) -> bool:
        """A save that took long (a pack's takes a tenth of a second a member) is followed by as much more training."""
        pause = max(self.execution.checkpoint_seconds, self._save_seconds / MAX_SAVING_SHARE)
        return now - self._last_save > pause

    def save(self, members: Mapping[int, Member]) -> None:
        """Starts saving ``members``, by row, each to its own checkpoints."""
        self.clock.end_lap()
        self.clock.charge(list(members.values()))
        started = time.perf_counter()
        with self.clock.timed("save"):
            for k, member in members.items():
                member.checkpoints.save(member.step, self.row(k), self.host_state(member))
        self._last_save = time.perf_counter()
        self._save_seconds = self._last_save - started

    def host_state(self, member: Member) -> dict:
        # A copy: Orbax writes it in the background, while training goes on to change these lists.
        return copy.deepcopy({"fingerprint": self.corpus.fingerprint, "member": member.saved()})
