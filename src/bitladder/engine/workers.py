"""Threads that share small pieces of work: in any order, with scratch memory of their own, or in order."""

import collections
import itertools
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from bitladder.engine.types import threads_available
from bitladder.files import Closing

Result = TypeVar("Result")
AHEAD = 4  # works per thread that may be at hand or wait to be taken
PIECE = 1 << 15  # numbers of a piece: 128 KB, so that a few such arrays fit into a core's second-level cache


class Workers(Closing):
    """Threads that take work piece by piece. NumPy releases Python's lock, so the threads run in parallel.

    Each thread has a number, its slot, and two scratch arrays of PIECE numbers, float32: `scratch[slot]`.

    Parameters:
        threads: their number; None for that of the CPUs.
        first: the first slot.
    """

    def __init__(self, threads: int | None = None, first: int = 0) -> None:
        self.threads = threads or threads_available()
        self._first = first
        self._pool = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None
        self.scratch = {first + number: np.empty((2, PIECE), np.float32) for number in range(self.threads)}

    def close(self) -> None:
        """Stops the threads."""
        if self._pool:
            self._pool.shutdown()

    def run(self, count: int, work: Callable[[int, int], None]) -> None:
        """Calls work(i, slot) for each i in 0 … count−1, in any order; the calling thread helps.

        Raises what `work` raises.
        """
        # Threads take pieces one by one, because on a busy machine one thread can be far slower than the others.
        counter = itertools.count()

        def worker(slot: int) -> None:
            while (index := next(counter)) < count:
                work(index, slot)

        helpers = min(self.threads, count) - 1
        first = self._first
        waiting = [self._pool.submit(worker, first + i + 1) for i in range(helpers)] if self._pool else []
        try:
            worker(first)
        finally:
            for future in waiting:
                future.result()


def in_order(
    works: Iterable[Callable[[], Result]], threads: int | None = None, ahead: int = AHEAD
) -> Generator[Result, None, None]:
    """Does works in threads, side by side, and yields their results in the order of the works.

    Parameters:
        works: what computes each result.
        threads: their number; None for that of the CPUs. A single one is the calling thread.
        ahead: works per thread that may be at hand or wait to be taken.

    Raises:
        BaseException: what a work raises. No thread is left running.

    Example:
        >>> list(in_order([lambda: 3, lambda: 1, lambda: 2], threads=2))
        [3, 1, 2]
    """
    count = threads or threads_available()
    if count == 1:
        for work in works:
            yield work()
        return
    pool = ThreadPoolExecutor(count)
    waiting: collections.deque[Future[Result]] = collections.deque()
    try:
        for work in works:
            if len(waiting) >= ahead * count:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work))
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
