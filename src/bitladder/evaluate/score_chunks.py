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


class BasePredictions(Protocol):
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
    lanes: Lanes, base: BasePredictions, count: int, progress: Progress = SILENT, *, first: int = 0
) -> TokenScores:
    """Runs a model over `count` chunks of a base, from number `first` on, and compares the predictions.

    Raises:
        BitladderError: decoding fails, or the logits are not finite.
    """
    name = lanes.model.name
    each: list[TokenScores] = []
    total = 0.0
    with progress.task(f"Divergence of {name}", count) as task:
        for scores in lanes.each(count, lambda lane, place: compare_chunk(lane, base, first + place)):
            each.append(scores)
            total += float(scores.kld.mean())
            task.note(f"KLD {total / len(each):.6f}")
            task.advance()
    return TokenScores(
        *(np.concatenate([getattr(scores, part.name) for scores in each]) for part in dataclasses.fields(TokenScores))
    )


def compare_chunk(lane: Lane, base: BasePredictions, chunk: int) -> TokenScores:
    """Runs the model of a lane over a chunk of a base, and compares the predictions.

    Raises:
        BitladderError: decoding fails, or the logits are not finite.
    """
    name, known, targets = lane.context.model.name, base.rows(chunk), base.chunks.targets(chunk)
    refuse_broken(known, "the base")
    nll, kld = np.empty(len(targets)), np.empty(len(targets))
    same_top = np.empty(len(targets), np.bool_)
    with single_threaded():
        for start, logits in decode(lane.context, base.chunks, chunk):
            part = slice(start, start + len(logits))
            every = np.arange(len(logits))
            top = logits.argmax(axis=1)
            check_finite(logits[every, top], name)
            same_top[part] = top == known.top[part]
            predicted = base.logits(chunk, part.start, part.stop)
            shift = _quant_shift(logits, top, known.top[part])
            kld[part], lse = divergence(predicted, logits, known.top_logit[part], shift, lane.workers)
            nll[part] = lse - logits[every, targets[part]]
    if not np.isfinite(kld).all():
        raise overflow(f"the divergence of {name} from its base is")
    return TokenScores(nll, known.nll, kld, np.exp(-nll) - np.exp(-known.nll), same_top)


def _quant_shift(logits: Floats, top: npt.NDArray[np.intp], base_top: Tokens) -> Floats:
    # The shift is the logit of the base's likeliest token. The shifted logits of both models are then close to each
    # other, and little precision is lost where they cancel. The shift is at most 60 below the quant's own maximum: e^60
    # times the size of any vocabulary still fits into a float32.
    every = np.arange(len(logits))
    shift: Floats = np.maximum(logits[every, base_top], logits[every, top] - np.float32(60))
    return shift
