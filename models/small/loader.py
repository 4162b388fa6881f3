"""Batches made ahead of time by other processes, returned in order."""

import collections
import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterable, Iterator

import jax

AHEAD = 3
"""Batches that wait ready or in the making, per process."""


class Loader[T, B]:
    """Results of `make` for each of `items`, in order; a context that ends its processes."""

    def __init__(self, make: Callable[[T], B], items: Iterable[T], num_workers: int):
        """Makes batches in `num_workers` processes, which import `make`; with 0, where they are used."""
        self.make, self.items, self.num_workers = make, items, num_workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Iterator[B]:
        """The batches, in order."""
        if not self.num_workers:
            return map(self.make, self.items)
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(
            self.num_workers, mp_context=context, initializer=_keep_off_the_device
        )
        return self._ordered(self._pool)

    def __exit__(self, *error: object) -> None:
        """Ends the processes; batches under way are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _ordered(self, pool: concurrent.futures.Executor) -> Iterator[B]:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for item in self.items:
            waiting.append(pool.submit(self.make, item))
            if len(waiting) >= AHEAD * self.num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _keep_off_the_device() -> None:
    """A process that makes batches must not take the accelerator's memory."""
    jax.config.update("jax_platforms", "cpu")
