"""Two models on the same tokens and questions: their difference, and its error.

The standard error of one model says how much its figure changes on another text. Two quants of one model change
together from text to text, so the error of their difference is far smaller.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.evaluate.figures import mean, perplexity
from bitladder.evaluate.measure import Measurement
from bitladder.evaluate.scores import Figure, Paired, PairedTask
from bitladder.evaluate.tasks.task import average_of_five

Doubles = npt.NDArray[np.float64]
Answers = Mapping[int, bool]

# Tokens of a chunk share its text, so chunks are independent and tokens are not. With fewer chunks than this their
# variance is too uncertain.
MIN_CHUNKS = 8


def compare_pair(this: Measurement, other: Measurement) -> Paired:
    """The paired difference of two models that were measured alike: this less other."""
    fields: dict[str, Any] = {"model": other.scores.model, "sha256": other.scores.sha256}
    mine, theirs, chunks = this.arrays, other.arrays, this.scores.chunks
    if "nll" in mine and "nll" in theirs and chunks is not None:
        fields["per"] = unit(chunks)
        fields["ln_ppl"] = paired_mean(mine["nll"], theirs["nll"], chunks)
        fields["ppl"] = paired_perplexity(mine["nll"], theirs["nll"], chunks)
        if "kld" in mine and "kld" in theirs:
            fields["kld"] = paired_mean(mine["kld"], theirs["kld"], chunks)
    tasks = {}
    for name, score in this.scores.tasks.items():
        if name in other.scores.tasks:
            pair = paired_task(score.right(), other.scores.tasks[name].right())
            if pair is not None:
                tasks[name] = pair
    if tasks:
        fields["tasks"] = tasks
    fields["tasks_average"] = average_of_five({name: pair.difference for name, pair in tasks.items()})
    return Paired(**fields)


def unit(chunks: int) -> str:
    """What the error of `paired_mean` takes as independent: "chunk", or "token" if there are too few chunks."""
    return "chunk" if chunks >= MIN_CHUNKS else "token"


def paired_mean(this: Doubles, other: Doubles, chunks: int) -> Figure:
    """The mean of this − other, and its standard error over chunks or tokens (see `unit`).

    Parameters:
        this: one value for each token in the order of the text, float64 [chunks × scored].
        other: the other model's values, of the same shape.
        chunks: chunks of the text.

    Example:
        >>> paired_mean(np.array([3.0, 5.0]), np.array([2.0, 2.0]), chunks=1)
        Figure(value=2.0, error=1.0)
    """
    return mean(_by_unit(this - other, chunks))


def paired_perplexity(this: Doubles, other: Doubles, chunks: int) -> Figure:
    """PPL(this) − PPL(other) from negative log-likelihoods, nats, float64 [chunks × scored].

    To first order the error is that of the mean of PPL(this)·NLL(this) − PPL(other)·NLL(other).
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
    """Compares two models' answers (record → right or wrong) over the records that both answered.

    The standard error of a difference of proportions on the same questions is sqrt(b + c − (b−c)²/n)/n, where b and c
    are the numbers of questions that only one model answered right (Agresti, Categorical Data Analysis, §11.1).

    Returns:
        The difference; None if no record was answered by both.
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
    """The two-sided p-value of McNemar's exact test: how likely so uneven a split is if neither model is better.

    Each of the b + c questions that only one model answered right belongs to either model with probability ½.

    Example:
        >>> mcnemar(0, 3)  # 2 / 2³
        0.25
    """
    total, fewer = only_this + only_other, min(only_this, only_other)
    ways = tail = 1  # ways to choose k questions of the total, from the number for k − 1
    for k in range(fewer):
        ways = ways * (total - k) // (k + 1)
        tail += ways
    return min(1.0, float(2 * tail / 2**total))
