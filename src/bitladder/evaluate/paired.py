"""Two models measured on the same tokens and questions: what the difference is, and how sure it is.

Each model's own ± says how much its figure would change on another text. Two quants of one model go up and down
together from text to text, so the ± of their difference is far smaller than their own.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bitladder.evaluate.figures import mean, perplexity
from bitladder.evaluate.scores import Figure, PairedTask

Doubles = npt.NDArray[np.float64]
Answers = Mapping[int, bool]

# Tokens of a chunk share its text, so chunks are what is independent; with fewer than this their spread is too vague.
MIN_CHUNKS = 8


def unit(chunks: int) -> str:
    """What the ± of `paired_mean` takes as independent: "chunk", or "token" if there are too few chunks."""
    return "chunk" if chunks >= MIN_CHUNKS else "token"


def paired_mean(this: Doubles, other: Doubles, chunks: int) -> Figure:
    """The mean of this − other, and its standard error over chunks (or tokens, see `unit`).

    Parameters: one value per token, float64 [chunks × scored] each, in the order of the text.
    """
    return mean(_by_unit(this - other, chunks))


def paired_perplexity(this: Doubles, other: Doubles, chunks: int) -> Figure:
    """PPL(this) − PPL(other) from two models' NLLs, nats [chunks × scored].

    The ± is to first order that of the mean of PPL(this)·NLL(this) − PPL(other)·NLL(other).
    """
    first, second = perplexity(this).value, perplexity(other).value
    error = mean(_by_unit(first * this - second * other, chunks)).error
    return Figure(value=first - second, error=error)


def _by_unit(values: Doubles, chunks: int) -> Doubles:
    if unit(chunks) == "token":
        return values
    means: Doubles = values.reshape(chunks, -1).mean(axis=1)
    return means


def paired_task(this: Answers, other: Answers) -> PairedTask | None:
    """Two models' answers (record → right or wrong), over the records that both answered; None if there are none.

    The ± of a difference of proportions on the same questions is sqrt(b + c − (b−c)²/n)/n, with b and c the numbers
    that only one of them got right (Agresti, Categorical Data Analysis, §11.1).
    """
    common = this.keys() & other.keys()
    if not common:
        return None
    only_this = sum(this[record] and not other[record] for record in common)
    only_other = sum(other[record] and not this[record] for record in common)
    count, gap = len(common), only_this - only_other
    error = math.sqrt(only_this + only_other - gap * gap / count) / count
    return PairedTask(
        difference=Figure(value=gap / count, error=error),
        only_this=only_this,
        only_other=only_other,
        p_value=mcnemar(only_this, only_other),
    )


def mcnemar(only_this: int, only_other: int) -> float:
    """Two-sided exact p-value (McNemar): how likely so uneven a split is if neither model is better.

    Of b + c questions that only one got right, each falls to either with probability ½.
    """
    total, fewer = only_this + only_other, min(only_this, only_other)
    ways = tail = 1  # of k questions out of the total: each follows from the one before
    for k in range(fewer):
        ways = ways * (total - k) // (k + 1)
        tail += ways
    return min(1.0, float(2 * tail / 2**total))


def average(differences: list[Figure]) -> Figure:
    """The plain mean of independent figures, with its standard error."""
    value = sum(figure.value for figure in differences) / len(differences)
    error = math.sqrt(sum(figure.error**2 for figure in differences)) / len(differences)
    return Figure(value=value, error=error)
