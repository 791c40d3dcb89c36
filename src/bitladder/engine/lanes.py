"""Work side by side: threads that share small pieces, and contexts that decode chunks, each with half of the threads.

A chunk is a part of a text, or a batch of questions. The threads of a context wait for each other after each operation.
They also wait while Python scores rows or changes inputs. Two contexts wait at different times, so that all CPUs have
work. No figure depends on it: the library's sums do not depend on the number of threads (docs/evaluate.md).
"""

import collections
import contextlib
import itertools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from bitladder.engine.context import Context, Decoding
from bitladder.engine.model import Model
from bitladder.engine.types import threads_available
from bitladder.files import Closing

P = ParamSpec("P")
Result = TypeVar("Result")
AHEAD = 4  # works per thread that may be at hand or wait to be taken
LANES = 2
LANE_AHEAD = 2  # results of a lane that may wait to be taken: those of a large vocabulary are large
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


class Aside(Closing):
    """A thread that does some work while the caller does other work. With a single thread the caller does all at once.

    Parameters:
        threads: of the whole work; None for that of the CPUs.

    Example:
        >>> with Aside(1) as aside:
        ...     print(aside.submit(max, 2, 3).result())
        3
    """

    def __init__(self, threads: int | None) -> None:
        self._pool = ThreadPoolExecutor(1) if threads != 1 else None

    def close(self) -> None:
        """Waits for the work."""
        if self._pool:
            self._pool.shutdown()

    def submit(self, work: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Future[Result]:
        """Work that is done after what was submitted before it. Its result raises what the work raises."""
        if self._pool:
            return self._pool.submit(work, *args, **kwargs)
        done: Future[Result] = Future()
        done.set_result(work(*args, **kwargs))
        return done


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


class Lane(NamedTuple):
    """A context, and the threads that score what it decodes.

    Parameters:
        number: of the lane.
        context: decodes.
        workers: threads; their slots are those of no other lane.
    """

    number: int
    context: Context
    workers: Workers


def lane_count(decoding: Decoding) -> int:
    """Contexts that decode side by side: LANES, but one on a GPU or with a single thread."""
    threads = decoding.threads or threads_available()
    return LANES if threads >= LANES and decoding.gpu_layers == 0 else 1


class Lanes(Closing):
    """The lanes of a model.

    Parameters:
        model: the loaded model.
        decoding: tokens of a chunk, batch sizes, and the threads of all lanes together.
        observer: makes an observer for a lane; None for none.
        callback: makes what sees all nodes of a lane's graph, instead of an observer.
        n_seq: as of `Context`.
        kv_unified: alike.
        skip_head: alike.
        most: contexts at most (see `lane_count`).
        first_slot: of their threads (`Workers`).

    Attributes:
        watching: the observer or callback of each lane.
    """

    # Nine parameters: those of `Context`, and how many contexts there are.
    def __init__(
        self,
        model: Model,
        decoding: Decoding,
        *,
        observer: Callable[[], Any] | None = None,
        callback: Callable[[], Any] | None = None,
        n_seq: int = 1,
        kv_unified: bool = False,
        skip_head: bool = False,
        most: int = LANES,
        first_slot: int = 0,
    ) -> None:
        self._threads = threads = decoding.threads or threads_available()
        count = min(most, lane_count(decoding))
        shares = [threads // count + (number < threads % count) for number in range(count)]
        make = observer or callback
        self.watching = [make() for _ in shares] if make else []
        self._lanes: list[Lane] = []
        with contextlib.ExitStack() as opened:
            for number, share in enumerate(shares):
                context = Context(
                    model,
                    decoding.replace(threads=share),
                    observer=self.watching[number] if observer else None,
                    callback=self.watching[number] if callback else None,
                    n_seq=n_seq,
                    kv_unified=kv_unified,
                    skip_head=skip_head,
                )
                opened.enter_context(context)
                workers = opened.enter_context(Workers(share, first_slot + sum(shares[:number])))
                self._lanes.append(Lane(number, context, workers))
            self._all = opened.enter_context(Workers(threads, first_slot))
            self._opened = opened.pop_all()
        self._results: Iterator[Any] = iter(())

    def close(self) -> None:
        """Ends what is computed, and frees the contexts."""
        if isinstance(self._results, Generator):
            self._results.close()
        self._opened.close()

    @property
    def model(self) -> Model:
        """The model that is decoded."""
        return self._lanes[0].context.model

    @property
    def first(self) -> Lane:
        """The first lane, with its own threads only."""
        return self._lanes[0]

    def __len__(self) -> int:
        """Contexts."""
        return len(self._lanes)

    def each(self, count: int, work: Callable[[Lane, int], Result]) -> Iterator[Result]:
        """Does some work for each of `count` chunks.

        What is left over when every lane has the same number of chunks is done by one lane with all threads. Lanes do
        one such work at a time. The computations at hand end when the results or the lanes are closed.

        Parameters:
            count: chunks.
            work: is called with a lane and the number of a chunk, in a thread of the lane.

        Returns:
            The results, in the order of the chunks. Work begins when the first one is taken.

        Raises:
            BaseException: what `work` raises, in the order of the chunks.
        """
        self._results = results = self._each(count, work)
        return results

    def _each(self, count: int, work: Callable[[Lane, int], Result]) -> Iterator[Result]:
        shared = count - count % len(self._lanes) if len(self._lanes) > 1 else 0
        yield from side_by_side(self._lanes, range(shared), work)
        with self.first.context.more_threads(self._threads):
            yield from side_by_side([self.first._replace(workers=self._all)], range(shared, count), work)


def side_by_side(lanes: Sequence[Lane], chunks: range, work: Callable[[Lane, int], Result]) -> Iterator[Result]:
    """Does some work for each chunk on whichever lane is idle; what is left undone ends when this is closed.

    Parameters:
        lanes: of one model, or of several.
        chunks: their numbers.
        work: is called with a lane and the number of a chunk, in a thread of the lane.

    Returns:
        The results, in the order of the chunks. Work begins when the first one is taken.

    Raises:
        BaseException: what `work` raises, in the order of the chunks.
    """
    results: dict[int, Future[Result]] = {chunk: Future() for chunk in chunks}
    numbers, stop = iter(chunks), threading.Event()
    room, one_by_one = threading.Semaphore(LANE_AHEAD * len(lanes)), threading.Lock()

    def follow(lane: Lane) -> None:
        while room.acquire() and not stop.is_set():
            with one_by_one:
                chunk = next(numbers, None)
            if chunk is None:
                return
            try:
                results[chunk].set_result(work(lane, chunk))
            except BaseException as error:  # it is raised where results are taken
                results[chunk].set_exception(error)
                return

    threads = [threading.Thread(target=follow, args=(lane,), name=f"lane {lane.number}") for lane in lanes]
    for thread in threads:
        thread.start()
    try:
        for chunk in chunks:
            yield results[chunk].result()
            del results[chunk]
            room.release()
    finally:
        stop.set()
        for lane in lanes:
            lane.context.stop()
        room.release(len(threads))
        for thread in threads:
            thread.join()
        for lane in lanes:
            lane.context.go_on()
