"""Rows of logits, shared among threads in pieces that stay in a core's cache."""

import dataclasses
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from bitladder.closing import Closing
from bitladder.engine.types import threads_available
from bitladder.errors import BitladderError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]

PIECE = 1 << 15  # numbers handled at a time: 128 KB, so that a few such arrays fit into a core's second-level cache


class Workers(Closing):
    """Threads that take work piece by piece. NumPy leaves Python's lock, so that they really run at once.

    Each thread has a number, its slot, and two scratch arrays of PIECE float32: `scratch[slot]`.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or threads_available()
        self._pool = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None
        self.scratch = [np.empty((2, PIECE), np.float32) for _ in range(self.threads)]

    def close(self) -> None:
        """Stop the threads."""
        if self._pool:
            self._pool.shutdown()

    def run(self, count: int, work: Callable[[int, int], None]) -> None:
        """Call work(i, slot) for i in 0…count−1, in any order; the calling thread helps. Raises what work raises."""
        # Pieces are taken one by one, not dealt out beforehand: on a busy machine one thread may be far slower.
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
    """What is known of each row of logits: all [rows].

    `nll` −ln of the target's probability; `top` the id with the highest logit and `top_logit` that logit.
    """

    nll: Doubles
    top: Tokens
    top_logit: Floats


def score_rows(logits: Floats, targets: Tokens, workers: Workers, *, what: str) -> RowScores:
    """Negative log-likelihood of each row's target.

    Parameters: logits float32 [rows, n_vocab]; targets int32 [rows]; `what` names the model in errors. The sum of
    exponentials over the vocabulary is taken in float32 by pieces and in float64 over the pieces.
    Raises BitladderError if a row has no finite maximum.
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
    """Raise BitladderError if the highest logits of some rows are not finite (NaN counts as highest)."""
    if not np.isfinite(top_logit).all():
        raise BitladderError(f"{what} gives logits that are not finite: the file is damaged, or its weights overflow")
