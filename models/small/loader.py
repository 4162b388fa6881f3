"""Batches made ahead of time by other processes, handed out in order."""

import collections
import concurrent.futures
import multiprocessing
from collections.abc import Iterator

from models.small.curriculum import Curriculum
from models.small.stream import Batch

AHEAD = 3
"""Batches that wait ready or in the making, per process."""


class Loader:
    """The curriculum's batches of a range of steps; a context that ends its processes."""

    def __init__(self, curriculum: Curriculum, steps: range, num_workers: int):
        """Starts `num_workers` processes; with 0, batches are made where they are asked for."""
        self.curriculum, self.steps, self.num_workers = curriculum, steps, num_workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Iterator[Batch]:
        """The batches, in order."""
        if not self.num_workers:
            return map(self.curriculum.batch, self.steps)
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(self.num_workers, mp_context=context)
        return self._ordered(self._pool)

    def __exit__(self, *error: object) -> None:
        """Ends the processes; batches under way are dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _ordered(self, pool: concurrent.futures.Executor) -> Iterator[Batch]:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        steps = iter(self.steps)
        for step in steps:
            waiting.append(pool.submit(self.curriculum.batch, step))
            if len(waiting) >= AHEAD * self.num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
