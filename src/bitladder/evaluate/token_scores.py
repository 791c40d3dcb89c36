"""Perplexity, and divergence from the full-precision model, token by token, and the figures of a text from these.

Figures are defined as in llama-perplexity. The standard error of a mean is sqrt(var/(n−1)) with the population
variance. Errors of derived figures follow to first order. Percentiles are interpolated linearly. Tokens count as
independent, as in llama-perplexity.

Of several texts each counts alike, however long it is: means are means over texts, with the error of independent texts,
perplexity is e to the mean NLL, and the tokens of a percentile are weighted by 1 / (tokens of their text).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine import Lane, Lanes
from bitladder.errors import BitladderError, overflow
from bitladder.evaluate.divergence import BaseRows, LogitBlocks, check_finite, divergence, refuse_broken, score_rows
from bitladder.evaluate.identity import decode
from bitladder.evaluate.scores import DeltaP, Divergence, Figure
from bitladder.progress import SILENT, Progress
from bitladder.text import Chunks

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]
_KLD_SHARES = {"p999": 99.9, "p99": 99, "p95": 95, "p90": 90, "median": 50, "p10": 10, "p05": 5, "p01": 1, "p001": 0.1}
_DELTA_P_SHARES = {**_KLD_SHARES, "p75": 75, "p25": 25}


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


def average(figures: Sequence[Figure]) -> Figure:
    """The plain mean of independent figures, with its standard error.

    Example:
        >>> average([Figure(value=0.5, error=0.03), Figure(value=0.7, error=0.04)])
        Figure(value=0.6, error=0.025)
    """
    if len(figures) == 1:
        return figures[0]
    value = sum(figure.value for figure in figures) / len(figures)
    error = math.sqrt(sum(figure.error**2 for figure in figures)) / len(figures)
    return Figure(value=value, error=error)


def mean(*texts: Doubles) -> Figure:
    """The mean of the values of each text, float64 [tokens], and its standard error, which is 0 for a single value.

    Example:
        >>> mean(np.array([1.0, 3.0]))
        Figure(value=2.0, error=1.0)
        >>> mean(np.array([1.0, 3.0]), np.array([4.0]))
        Figure(value=3.0, error=0.5)
    """
    return average([_mean(values) for values in texts])


def _mean(values: Doubles) -> Figure:
    count = len(values)
    error = math.sqrt(float(values.var()) / (count - 1)) if count > 1 else 0.0
    return Figure(value=float(values.mean()), error=error)


def exp(figure: Figure) -> Figure:
    """e to the power of a figure. Raises BitladderError if the result is no finite number."""
    if not figure.value <= 700:
        raise BitladderError(f"the mean negative log-likelihood is {figure.value:.4g}: the model is broken")
    value = math.exp(figure.value)
    return Figure(value=value, error=value * figure.error)


def perplexity(*nll: Doubles) -> Figure:
    """exp of the mean negative log-likelihood of each text, nats, float64 [tokens]."""
    return exp(mean(*nll))


def correlation(a: Doubles, b: Doubles) -> float:
    """Pearson's correlation. Of constant values it is 1 if the two are equal, otherwise 0."""
    spread = float(a.std() * b.std())
    if spread == 0:
        return float(np.array_equal(a, b))
    return float(((a - a.mean()) * (b - b.mean())).mean()) / spread


def share(hits: npt.NDArray[np.bool_]) -> Figure:
    """The share of hits and its standard error sqrt(p(1−p)/(n−1))."""
    count = len(hits)
    value = float(hits.mean())
    return Figure(value=value, error=math.sqrt(value * (1 - value) / (count - 1)) if count > 1 else 0.0)


def root_mean_square(*texts: Doubles) -> Figure:
    """The root of the mean square. Its error is the error of the mean square times 0.5/root."""
    square = mean(*(values**2 for values in texts))
    root = math.sqrt(square.value)
    return Figure(value=root, error=0.5 / root * square.error if root else 0.0)


def percentiles(texts: Sequence[Doubles], shares: dict[str, float]) -> dict[str, float]:
    """Percentiles by name, with "min" and "max". `shares` has the percentage of each name."""
    values = np.concatenate(texts)
    if len(texts) == 1:
        at_shares = np.percentile(values, list(shares.values()), method="linear")
    else:  # with weights, numpy takes a value that is there
        weights = np.concatenate([np.full(len(text), 1 / len(text)) for text in texts])
        at_shares = np.percentile(values, list(shares.values()), weights=weights, method="inverted_cdf")
    return {
        **dict(zip(shares, map(float, at_shares), strict=True)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def likelihood_figures(*nll: Doubles) -> dict[str, Any]:
    """The fields of `Scores` that follow from the negative log-likelihood of each text, nats, float64 [tokens]."""
    return {"ppl": perplexity(*nll), "tokens_scored": sum(map(len, nll))}


def divergence_figures(*texts: TokenScores) -> dict[str, Any]:
    """All fields of `Scores` that follow from a comparison of each text with its base, by name."""
    # The variance of a difference includes the covariance of the two.
    ratio = mean(*(tokens.nll - tokens.nll_base for tokens in texts))
    kld, delta_p = [tokens.kld for tokens in texts], [tokens.delta_p for tokens in texts]
    return {
        **likelihood_figures(*(tokens.nll for tokens in texts)),
        "ppl_base": perplexity(*(tokens.nll_base for tokens in texts)),
        "ppl_ratio": exp(ratio),
        "ln_ppl_ratio": ratio,
        "rho_ppl": sum(correlation(tokens.nll, tokens.nll_base) for tokens in texts) / len(texts),
        "kld": Divergence(**mean(*kld).model_dump(), **percentiles(kld, _KLD_SHARES)),
        "delta_p": DeltaP(mean=mean(*delta_p), rms=root_mean_square(*delta_p), **percentiles(delta_p, _DELTA_P_SHARES)),
        "same_top_p": average([share(tokens.same_top) for tokens in texts]),
    }
