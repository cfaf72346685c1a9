"""The batches of a pack: which windows each of its rows reads, made ahead of the step as blocks of the mesh."""

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from scaling import data, objectives
from scaling.config import RunConfig
from scaling.training import programs, sharding
from scaling.training.evaluation import keys_of
from scaling.training.prefetch import Prefetched

# Batches made ahead of the step, at most. Of a mapped corpus two would do, and of large ones it is two; but a synthetic
# source now and then makes a thousand windows at once, for 2 to 7 ms: several steps of a small model.
AHEAD_STEPS, AHEAD_BYTES = 32, 2**26

BATCH_SPEC = P("run", ("data", "fsdp"))


@dataclass(frozen=True)
class Batches:
    """What the rows of a pack train on, from ``corpus``; ``run``: what all of them share of shapes, batch and data."""

    corpus: data.Corpus
    run: RunConfig
    num_rows: int
    mesh: Mesh

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        spec = programs.batch_spec(self.run)
        return {name: (self.num_rows, self.run.batch_size, columns) for name, (columns, _) in spec.items()}

    def ahead(
        self, live: Mapping[int, tuple[int, int]], num_steps: int | None
    ) -> Prefetched[dict[str, sharding.Blocks]]:
        """Makes the next ``num_steps`` batches, or batches without end, of rows that are at (step, seed) now; zeros for
        rows that are not ``live``."""
        shapes = self.shapes

        def blocks(i: int) -> dict[str, sharding.Blocks]:
            made = functools.cache(lambda k, start, stop: self._rows_of_member(live.get(k), slice(start, stop), i))

            def block_of(name: str, index) -> np.ndarray:
                runs, rows, columns = index
                each = [made(k, rows.start, rows.stop)[name] for k in range(runs.start, runs.stop)]
                return np.stack(each)[:, :, columns]

            return {
                name: sharding.host_blocks(self.mesh, BATCH_SPEC, shape, functools.partial(block_of, name))
                for name, shape in shapes.items()
            }

        batch_bytes = 4 * sum(map(math.prod, shapes.values())) // jax.process_count()
        depth = min(max(2, AHEAD_BYTES // batch_bytes), AHEAD_STEPS)
        return Prefetched(map(blocks, itertools.count() if num_steps is None else range(num_steps)), depth)

    def _rows_of_member(self, at: tuple[int, int] | None, rows: slice, i: int) -> dict[str, np.ndarray]:
        """Some ``rows`` of the batch that a member, ``at`` a step and with a seed, reads ``i`` steps later."""
        run = self.run
        if at is None:
            spec = programs.batch_spec(run)
            return {name: np.zeros((rows.stop - rows.start, n), dtype) for name, (n, dtype) in spec.items()}
        step, seed = at
        windows_RS = self.corpus.batch(step + i, run.batch_size, seed, rows)
        index_R = np.arange(rows.start, rows.stop, dtype=np.uint64) + np.uint64((step + i) * run.batch_size)
        return objectives.of(run.objective).batch(
            run.objective, run.model.vocab_size, windows_RS, keys_of(seed, index_R)
        )

    def onto_mesh(self, blocks: Mapping[str, sharding.Blocks]) -> dict[str, jax.Array]:
        """Makes global arrays of one batch that ``ahead`` has made."""
        shapes = self.shapes
        return {
            name: sharding.from_blocks(self.mesh, BATCH_SPEC, shapes[name], of_name) for name, of_name in blocks.items()
        }
