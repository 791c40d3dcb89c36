"""Perplexity, and divergence from the full-precision model, token by token over the chunks of a text."""

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine import Lane, Lanes, single_threaded
from bitladder.errors import overflow
from bitladder.evaluate.divergence import BaseRows, LogitBlocks, check_finite, divergence, refuse_broken, score_rows
from bitladder.evaluate.measure_options import decode
from bitladder.progress import SILENT, Progress
from bitladder.text import Chunks

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """A quant against the base: one entry for each scored token, in the order of the text.

    Two quants over the same text can be compared token by token.

    Parameters:
        nll: negative log-likelihood under the quant, nats, float64 [tokens].
        nll_base: negative log-likelihood under the base, nats, float64 [tokens].
        kld: Σ p_base ln(p_base/p_quant) over the vocabulary, nats, float64 [tokens].
        delta_p: p_quant − p_base of the token that follows, float64 [tokens].
        same_top: whether the same token is likeliest under both, bool [tokens].
    """

    nll: Doubles
    nll_base: Doubles
    kld: Doubles
    delta_p: Doubles
    same_top: npt.NDArray[np.bool_]


class Base(Protocol):
    """Where the full-precision model's predictions come from. Several threads may call it."""

    @property
    def chunks(self) -> Chunks:
        """The tokens that were predicted."""

    def rows(self, chunk: int) -> BaseRows:
        """What is kept of a chunk's scored rows."""

    def logits(self, chunk: int, start: int, stop: int) -> LogitBlocks:
        """Logits of a chunk's scored rows start … stop−1."""


def token_nll(lanes: Lanes, chunks: Chunks, progress: Progress = SILENT) -> Doubles:
    """Runs a model over some chunks without a base.

    Returns:
        The negative log-likelihood of every scored token, nats, float64 [chunks × scored].

    Raises:
        BitladderError: decoding fails, or the logits are not finite.
    """
    name = lanes.model.name
    nll = np.empty((len(chunks), chunks.scored))

    def score(lane: Lane, chunk: int) -> None:
        targets = chunks.targets(chunk)
        for start, logits in decode(lane.context, chunks, chunk):
            stop = start + len(logits)
            nll[chunk, start:stop] = score_rows(logits, targets[start:stop], lane.workers, what=name).nll

    with progress.task(f"Perplexity of {name}", len(chunks)) as task:
        for chunk, _ in enumerate(lanes.each(len(chunks), score)):
            task.note(f"PPL {np.exp(min(nll[: chunk + 1].mean(), 700)):.4f}")
            task.advance()
    return nll.reshape(-1)


def compare_with_base(
    lanes: Lanes, base: Base, count: int, progress: Progress = SILENT, *, first: int = 0
) -> TokenScores:
    """Runs a model over `count` chunks of a base, from number `first` on, and compares the predictions.

    Raises:
        BitladderError: decoding fails, or the logits are not finite.
    """
    chunks = base.chunks.head(first + count)
    name = lanes.model.name
    shape = (count, chunks.scored)
    nll, nll_base, kld = np.empty(shape), np.empty(shape), np.empty(shape)
    same_top = np.empty(shape, np.bool_)

    def score(lane: Lane, place: int) -> None:
        chunk = first + place
        known, targets = base.rows(chunk), chunks.targets(chunk)
        refuse_broken(known, "the base")
        nll_base[place] = known.nll
        for start, logits in decode(lane.context, chunks, chunk):
            part = slice(start, start + len(logits))
            every = np.arange(len(logits))
            top = logits.argmax(axis=1)
            check_finite(logits[every, top], name)
            same_top[place, part] = top == known.top[part]
            predicted = base.logits(chunk, part.start, part.stop)
            shift = _quant_shift(logits, top, known.top[part])
            kld[place, part], lse = divergence(predicted, logits, known.top_logit[part], shift, lane.workers)
            nll[place, part] = lse - logits[every, targets[part]]
        if not np.isfinite(kld[place]).all():
            raise overflow(f"the divergence of {name} from its base is")

    with progress.task(f"Divergence of {name}", count) as task, single_threaded():
        for place, _ in enumerate(lanes.each(count, score)):
            task.note(f"KLD {kld[: place + 1].mean():.6f}")
            task.advance()
    delta_p = np.exp(-nll) - np.exp(-nll_base)
    return TokenScores(nll.ravel(), nll_base.ravel(), kld.ravel(), delta_p.ravel(), same_top.ravel())


def _quant_shift(logits: Floats, top: npt.NDArray[np.intp], base_top: Tokens) -> Floats:
    # The shift is the logit of the base's likeliest token. The shifted logits of both models are then close to each
    # other, and little precision is lost where they cancel. The shift is at most 60 below the quant's own maximum: e^60
    # times the size of any vocabulary still fits into a float32.
    every = np.arange(len(logits))
    shift: Floats = np.maximum(logits[every, base_top], logits[every, top] - np.float32(60))
    return shift
