"""Scores of rows of logits over the whole vocabulary: likelihood, and divergence from the full-precision model.

Threads compute rows of logits in pieces that fit into a core's cache.
"""

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine import PIECE, Workers
from bitladder.errors import BitladderError, overflow

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]

_ALIKE = 1e-5  # nats: a smaller spread of the NLL of different tokens is rounding


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


@dataclasses.dataclass(frozen=True)
class BaseRows:
    """What the base keeps of some scored rows.

    Parameters:
        nll: negative log-likelihood of the token that follows, nats, float64 [rows].
        top: id of the likeliest token, int32 [rows].
        top_logit: logit of that token, float32 [rows].
    """

    nll: Doubles
    top: Tokens
    top_logit: Floats


class LogitBlocks(Protocol):
    """Logits of some rows by blocks of the vocabulary; see `hidden.HeadLogits`."""

    @property
    def count(self) -> int:
        """Blocks that make up the vocabulary."""

    def block(self, index: int, slot: int) -> tuple[int, Floats]:
        """The first token id of a block and its logits, float32 [rows, block].

        The caller may write over the logits. Only one caller may use a slot at a time.
        """


def refuse_broken(rows: BaseRows, name: str) -> None:
    """Raises BitladderError if a base's scores of a chunk are not finite, or if it predicts all tokens alike."""
    if not (np.isfinite(rows.nll).all() and np.isfinite(rows.top_logit).all()):
        raise overflow(f"the logits of {name} are")
    refuse_alike(rows.nll, name)


def refuse_alike(nll: Doubles, name: str) -> None:
    """Raises BitladderError if a model predicts all tokens alike, by the NLL of some tokens, float64 [tokens]."""
    # Of V tokens that are all alike, each costs ln V, which is 0.7 or more.
    if len(nll) > 1 and np.ptp(nll) <= _ALIKE and nll.min() > 0.5:
        raise BitladderError(
            f"{name} predicts every token alike, whatever the text: weights are 0 or lost, or activations overflow; "
            "nothing can be said of it or compared with it"
        )


def divergence(
    base: LogitBlocks, logits: Floats, base_shift: Floats, shift: Floats, workers: Workers
) -> tuple[Doubles, Doubles]:
    """The Kullback-Leibler divergence of each row, exact over the vocabulary.

    Let z be the logits minus a shift of the row, e = exp z and S = Σ e. Then KL = Σ e_b (z_b − z_q) / S_b − ln S_b +
    ln S_q for any two shifts. Sums are float32 within a block and float64 over blocks. Their order does not depend on
    the number of threads.

    Parameters:
        base: the base's logits, by blocks of the vocabulary.
        logits: the quant's logits, float32 [rows, n_vocab].
        base_shift: subtracted from the base's logits, float32 [rows].
        shift: subtracted from the quant's logits, float32 [rows].

    Returns:
        KL, nats, and ln Σ exp of the quant's logits, float64 [rows] each.

    Example:
        >>> class Blocks:
        ...     count = 1
        ...     def block(self, index, slot):
        ...         return 0, np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
        >>> logits, zero = np.log(np.array([[0.25, 0.5, 0.25]], np.float32)), np.zeros(1, np.float32)
        >>> kl, _ = divergence(Blocks(), logits, zero, zero, Workers(1))
        >>> round(float(kl[0]), 4)  # 0.5 ln (0.5/0.25) + 0.25 ln (0.25/0.5)
        0.1733
    """
    rows = len(logits)
    sums = np.empty((base.count, 3, rows))
    shifts = base_shift[:, None], shift[:, None]

    def work(index: int, slot: int) -> None:
        first, block = base.block(index, slot)
        width = block.shape[1]
        height = PIECE // width
        for start in range(0, rows, height):
            band = slice(start, min(start + height, rows))
            quant = logits[band, first : first + width]
            scratch = workers.scratch[slot][:, : quant.size].reshape(2, *quant.shape)
            sums[index, :, band] = _sums(block[band], quant, shifts[0][band], shifts[1][band], scratch)

    workers.run(base.count, work)
    sum_base, sum_quant, sum_gap = sums.sum(axis=0)
    kld = sum_gap / sum_base - np.log(sum_base) + np.log(sum_quant)
    # Rounding can leave a value such as −1e-7 where the divergence is 0.
    return np.maximum(kld, 0), np.log(sum_quant) + shift


def _sums(
    base: Floats, quant: Floats, base_shift: Floats, shift: Floats, scratch: Floats
) -> tuple[Floats, Floats, Floats]:
    """S_b, S_q and Σ e_b (z_b − z_q) of a few rows. Writes over `base`; `scratch` holds two arrays of its shape."""
    shifted, gap = scratch
    np.subtract(base, base_shift, out=base)
    np.subtract(quant, shift, out=shifted)
    np.subtract(base, shifted, out=gap)
    np.exp(base, out=base)
    np.exp(shifted, out=shifted)
    return base.sum(axis=1), shifted.sum(axis=1), np.vecdot(base, gap)
