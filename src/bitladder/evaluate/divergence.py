"""How far a quant's predictions are from the full-precision model's, token by token, over the whole vocabulary."""

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine.blas import single_threaded
from bitladder.engine.context import Context
from bitladder.evaluate.decode_chunks import Chunks, decode
from bitladder.evaluate.logit_rows import PIECE, Workers, check_finite
from bitladder.progress import SILENT, Progress

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """One entry per scored token, all [tokens], in the order of the text.

    `nll`, `nll_base`: negative log-likelihoods of the quant and of the base, nats; `kld`: Σ p_base ln(p_base/p_quant)
    over the vocabulary, nats; `delta_p`: p_quant − p_base of the token that follows; `same_top`: whether both find
    the same token likeliest. Two quants' arrays over the same text can be compared token by token.
    """

    nll: Doubles
    nll_base: Doubles
    kld: Doubles
    delta_p: Doubles
    same_top: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class BaseRows:
    """The base's knowledge of some scored rows: `nll`, `top` (likeliest id), `top_logit`, all [rows]."""

    nll: Doubles
    top: Tokens
    top_logit: Floats


class LogitBlocks(Protocol):
    """Logits of some rows by blocks of the vocabulary; see `head.HeadLogits`."""

    @property
    def count(self) -> int:
        """Blocks that make up the vocabulary."""

    def block(self, index: int, slot: int) -> tuple[int, Floats]:
        """First token id and logits, float32 [rows, block], to be written over; one caller per slot at a time."""


class Base(Protocol):
    """Where the full-precision model's predictions come from."""

    @property
    def chunks(self) -> Chunks:
        """The tokens it predicted."""

    def rows(self, chunk: int) -> BaseRows:
        """What is stored of a chunk's scored rows."""

    def logits(self, chunk: int, start: int, stop: int) -> LogitBlocks:
        """Logits of a chunk's scored rows start…stop."""


def compare(context: Context, base: Base, count: int, workers: Workers, progress: Progress = SILENT) -> TokenScores:
    """Run a model over the base's first `count` chunks and compare it with the base.

    Raises BitladderError if decoding fails or the logits are not finite.
    """
    chunks = base.chunks.head(count)
    name = context.model.path.name
    shape = (count, chunks.scored)
    nll, nll_base, kld = np.empty(shape), np.empty(shape), np.empty(shape)
    same_top = np.empty(shape, np.bool_)
    with progress.task(f"Divergence of {name}", count) as task, single_threaded():
        for chunk in range(count):
            known, targets = base.rows(chunk), chunks.targets(chunk)
            nll_base[chunk] = known.nll
            for start, logits in decode(context, chunks, chunk):
                part = slice(start, start + len(logits))
                every = np.arange(len(logits))
                top = logits.argmax(axis=1)
                check_finite(logits[every, top], name)
                same_top[chunk, part] = top == known.top[part]
                predicted = base.logits(chunk, part.start, part.stop)
                shift = _quant_shift(logits, top, known.top[part])
                kld[chunk, part], lse = divergence(predicted, logits, known.top_logit[part], shift, workers)
                nll[chunk, part] = lse - logits[every, targets[part]]
            task.note(f"KLD {kld[: chunk + 1].mean():.6f}")
            task.advance()
    delta_p = np.exp(-nll) - np.exp(-nll_base)
    return TokenScores(nll.ravel(), nll_base.ravel(), kld.ravel(), delta_p.ravel(), same_top.ravel())


def _quant_shift(logits: Floats, top: npt.NDArray[np.intp], base_top: Tokens) -> Floats:
    # Both models' logits are measured from the base's likeliest token: then their differences are as small as the
    # quant is good, and little is lost where they cancel. Not farther than 60 from the quant's own maximum: e^60
    # times any vocabulary is still a float32.
    every = np.arange(len(logits))
    shift: Floats = np.maximum(logits[every, base_top], logits[every, top] - np.float32(60))
    return shift


def divergence(
    base: LogitBlocks, logits: Floats, base_shift: Floats, shift: Floats, workers: Workers
) -> tuple[Doubles, Doubles]:
    """Kullback-Leibler divergence of each row, exact over the vocabulary.

    With z the logits less a shift of the row's own, e = exp z and S = Σ e, KL = Σ e_b (z_b − z_q) / S_b − ln S_b +
    ln S_q for any two shifts. Parameters: logits float32 [rows, n_vocab]; both shifts float32 [rows]. Sums are
    float32 within a block and float64 over blocks, in the same order whatever the number of threads.
    Returns KL and the quant's ln Σ exp (logits), float64 [rows] each.
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
    # Rounding may leave something like −1e-7 where it should be 0.
    return np.maximum(kld, 0), np.log(sum_quant) + shift


def _sums(
    base: Floats, quant: Floats, base_shift: Floats, shift: Floats, scratch: Floats
) -> tuple[Floats, Floats, Floats]:
    """S_b, S_q and Σ e_b (z_b − z_q) of a few rows; `base` is written over, `scratch` is two arrays like it."""
    shifted, gap = scratch
    np.subtract(base, base_shift, out=base)
    np.subtract(quant, shift, out=shifted)
    np.subtract(base, shifted, out=gap)
    np.exp(base, out=base)
    np.exp(shifted, out=shifted)
    return base.sum(axis=1), shifted.sum(axis=1), np.vecdot(base, gap)
