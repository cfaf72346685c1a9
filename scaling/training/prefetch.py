"""Items made ahead, in a thread beside the loop that uses them.

Of the libraries at hand ``flax.jax_utils.prefetch_to_device`` has no thread: it overlaps copies to the device, which a
dispatched step does already, and makes every host array while the loop waits.
"""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetched(Generic[T]):
    """The items of an iterable, in its order, at most ``depth`` of them made ahead.

        with Prefetched(map(read, range(1000)), depth=2) as items:
            for item in items: ...

    The thread lives inside the ``with``. Whatever making an item raises is raised where that item is taken.
    """

    def __init__(self, items: Iterable[T], depth: int):
        self._items, self._depth = iter(items), depth
        self._orders: queue.SimpleQueue[int] = queue.SimpleQueue()  # how many items to make; 0: end
        self._made: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        # A thread that is woken for one item costs two switches of context, on a core that computes about as much as
        # a batch: it is told of freed places by the half.
        self._order = max(1, depth // 2)
        self._taken, self._closed = 0, False
        # A daemon: where a disk hangs and the user interrupts twice, nothing keeps the process.
        self._thread = threading.Thread(target=self._make, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetched[T]":
        self._orders.put(self._depth)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed = True
        self._orders.put(0)
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item, error = self._made.get()
        if error is not None:
            self._made.put((None, error))  # for whoever asks again: nobody makes anything any more
            raise error
        self._taken += 1
        if self._taken % self._order == 0:
            self._orders.put(self._order)
        return item

    def _make(self) -> None:
        try:
            while count := self._orders.get():
                for _ in range(count):
                    if self._closed:
                        return
                    self._made.put((next(self._items), None))
        except BaseException as e:  # StopIteration too: it is how the items end
            self._made.put((None, e))
