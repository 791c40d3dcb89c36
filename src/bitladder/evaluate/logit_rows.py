"""Rows of logits, computed by several threads in pieces that fit into a core's cache."""

import dataclasses
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from bitladder.engine import threads_available
from bitladder.errors import overflow
from bitladder.files import Closing

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]

PIECE = 1 << 15  # numbers of a piece: 128 KB, so that a few such arrays fit into a core's second-level cache


class Workers(Closing):
    """Threads that take work piece by piece. NumPy releases Python's lock, so the threads run in parallel.

    Each thread has a number, its slot, and two scratch arrays of PIECE numbers, float32: `scratch[slot]`.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or threads_available()
        self._pool = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None
        self.scratch = [np.empty((2, PIECE), np.float32) for _ in range(self.threads)]

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
        waiting = [self._pool.submit(worker, i + 1) for i in range(helpers)] if self._pool else []
        try:
            worker(0)
        finally:
            for future in waiting:
                future.result()


@dataclasses.dataclass(frozen=True)
class RowScores:
    """The scores of rows of logits.

    Parameters:
        nll: −ln of the target's probability, nats, float64 [rows].
        top: id of the highest logit, int32 [rows].
        top_logit: the highest logit, float32 [rows].
    """

    nll: Doubles
    top: Tokens
    top_logit: Floats


def score_rows(logits: Floats, targets: Tokens, workers: Workers, *, what: str) -> RowScores:
    """The negative log-likelihood of each row's target.

    The sum of exponentials is float32 within a piece of the vocabulary and float64 over the pieces.

    Parameters:
        logits: float32 [rows, n_vocab].
        targets: token ids, int32 [rows].
        workers: threads that compute.
        what: name of the model, for errors.

    Raises:
        BitladderError: the highest logit of a row is not finite.

    Example:
        >>> logits, targets = np.zeros((1, 4), np.float32), np.array([2], np.int32)
        >>> round(float(score_rows(logits, targets, Workers(1), what="model").nll[0]), 4)  # ln 4
        1.3863
    """
    rows, n_vocab = logits.shape
    top = logits.argmax(axis=1).astype(np.int32)
    every = np.arange(rows)
    top_logit = logits[every, top]
    check_finite(top_logit, what)
    sums = np.zeros(rows)

    def work(row: int, slot: int) -> None:
        for start in range(0, n_vocab, PIECE):
            piece = logits[row, start : start + PIECE]
            out = workers.scratch[slot][0, : piece.size]
            np.subtract(piece, top_logit[row], out=out)
            np.exp(out, out=out)
            sums[row] += float(out.sum())

    workers.run(rows, work)
    nll = np.log(sums) + top_logit.astype(np.float64) - logits[every, targets]
    return RowScores(nll, top, top_logit)


def check_finite(top_logit: Floats, what: str) -> None:
    """Raises BitladderError if the highest logit of a row is not finite. NaN counts as highest."""
    if not np.isfinite(top_logit).all():
        raise overflow(f"the logits of {what} are")
