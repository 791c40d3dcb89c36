"""Figures from arrays with one entry for each token, as llama-perplexity defines them.

The standard error of a mean is sqrt(var/(n−1)) with the population variance. Errors of derived figures follow to first
order. Percentiles are interpolated linearly. Tokens count as independent, as in llama-perplexity.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.errors import BitladderError
from bitladder.evaluate.divergence import TokenScores
from bitladder.evaluate.scores import DeltaP, Divergence, Figure

Doubles = npt.NDArray[np.float64]

_KLD_SHARES = {"p999": 99.9, "p99": 99, "p95": 95, "p90": 90, "median": 50, "p10": 10, "p05": 5, "p01": 1, "p001": 0.1}
_DELTA_P_SHARES = {**_KLD_SHARES, "p75": 75, "p25": 25}


def mean(values: Doubles) -> Figure:
    """The mean of values, float64 [n], and its standard error, which is 0 for a single value.

    Example:
        >>> mean(np.array([1.0, 3.0]))
        Figure(value=2.0, error=1.0)
    """
    count = len(values)
    error = math.sqrt(float(values.var()) / (count - 1)) if count > 1 else 0.0
    return Figure(value=float(values.mean()), error=error)


def exp(figure: Figure) -> Figure:
    """e to the power of a figure. Raises BitladderError if the result is no finite number."""
    if not figure.value <= 700:
        raise BitladderError(f"the mean negative log-likelihood is {figure.value:.4g}: the model is broken")
    value = math.exp(figure.value)
    return Figure(value=value, error=value * figure.error)


def perplexity(nll: Doubles) -> Figure:
    """exp of the mean negative log-likelihood, nats, float64 [tokens]."""
    return exp(mean(nll))


def ln_ratio(nll: Doubles, nll_base: Doubles) -> Figure:
    """ln (PPL/PPL base): the mean of the differences. Its variance includes the covariance of the two."""
    return mean(nll - nll_base)


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


def root_mean_square(values: Doubles) -> Figure:
    """The root of the mean square. Its error is the error of the mean square times 0.5/root."""
    square = mean(values**2)
    root = math.sqrt(square.value)
    return Figure(value=root, error=0.5 / root * square.error if root else 0.0)


def percentiles(values: Doubles, shares: dict[str, float]) -> dict[str, float]:
    """Percentiles by name, with "min" and "max". `shares` has the percentage of each name."""
    at_shares = np.percentile(values, list(shares.values()), method="linear")
    return {
        **dict(zip(shares, map(float, at_shares), strict=True)),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def divergence_figures(tokens: TokenScores) -> dict[str, Any]:
    """All fields of `Scores` that follow from a comparison with a base, by name."""
    ratio = ln_ratio(tokens.nll, tokens.nll_base)
    return {
        "tokens_scored": len(tokens.nll),
        "ppl": perplexity(tokens.nll),
        "ppl_base": perplexity(tokens.nll_base),
        "ppl_ratio": exp(ratio),
        "ln_ppl_ratio": ratio,
        "rho_ppl": correlation(tokens.nll, tokens.nll_base),
        "kld": Divergence(**mean(tokens.kld).model_dump(), **percentiles(tokens.kld, _KLD_SHARES)),
        "delta_p": DeltaP(
            mean=mean(tokens.delta_p),
            rms=root_mean_square(tokens.delta_p),
            **percentiles(tokens.delta_p, _DELTA_P_SHARES),
        ),
        "same_top_p": share(tokens.same_top),
    }
