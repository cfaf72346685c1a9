"""A loop for ``scaling.engine.run.hosts``: what some process cannot do, and computations that hear no signal."""

import threading

import jax

stop_requested = threading.Event()


class Interrupted(Exception):
    pass


def train(cells, **options):
    """Process 1 refuses the run of seed 1, the others wait for it in C, as in a collective; seed 2 all wait for."""
    import ctypes

    seed = cells[0].run.seed
    if seed == 0:
        return []
    if seed == 1 and jax.process_index() == 1:
        raise ValueError("its disk holds half a corpus")
    c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # zeros: PTHREAD_MUTEX_INITIALIZER
    for _ in range(2):  # the second never returns, and no signal ends it
        c.pthread_mutex_lock(mutex)
