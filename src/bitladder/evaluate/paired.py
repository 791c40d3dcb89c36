"""Two models on the same tokens and questions: their difference, and its error.

The standard error of one model says how much its figure changes on another text. Two quants of one model change
together from text to text, so the error of their difference is far smaller.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.evaluate.measure import Arrays, Measurement
from bitladder.evaluate.scores import Figure, Paired, PairedTask, Scores, TextScores
from bitladder.evaluate.tasks.task import average_of_five
from bitladder.evaluate.token_scores import average, mean, perplexity

Doubles = npt.NDArray[np.float64]
Answers = Mapping[int, bool]
OfChunks = int | npt.NDArray[np.int32]
TextParts = Sequence[tuple[TextScores, Arrays]]

# Tokens of a chunk share its text, so chunks are independent and tokens are not. With fewer chunks than this their
# variance is too uncertain.
MIN_CHUNKS = 8
SURE = 2.0  # standard errors: a difference of less counts as noise
EQUAL_SIZE = 1.01  # the ratio of two sizes that count as equal


def with_pair(this: Measurement, other: Measurement) -> Scores:
    """The scores of a model with its paired difference from another one: over all texts, on each, and in tasks."""
    scores = this.scores
    texts = tuple(
        text.model_copy(update={"paired": _compare([(text, mine)], [(text, theirs)], other.scores)})
        for (text, mine), (_, theirs) in zip(this.by_text, other.by_text, strict=True)
    )
    return scores.model_copy(update={"paired": compare_pair(this, other), "texts": texts if scores.texts else ()})


def compare_pair(this: Measurement, other: Measurement) -> Paired:
    """The paired difference of two models that were measured alike: this less other."""
    pair = _compare(this.by_text, other.by_text, other.scores)
    tasks = {}
    for name, score in this.scores.tasks.items():
        if name in other.scores.tasks:
            task = paired_task(score.right(), other.scores.tasks[name].right())
            if task is not None:
                tasks[name] = task
    average = average_of_five({name: task.difference for name, task in tasks.items()})
    return pair.model_copy(update={"tasks": tasks or None, "tasks_average": average})


def _compare(this: TextParts, other: TextParts, of: Scores) -> Paired:
    """The paired difference over some texts, each of which counts alike; `of` are the scores of the other model."""
    fields: dict[str, Any] = {"model": of.model, "sha256": of.sha256}
    pairs = [
        (mine, theirs, mine.get("chunk", text.chunks))
        for (text, mine), (_, theirs) in zip(this, other, strict=True)
        if text.chunks
    ]
    if pairs and all("nll" in mine and "nll" in theirs for mine, theirs, _ in pairs):
        fields["per"] = "chunk" if all(unit(chunks) == "chunk" for *_, chunks in pairs) else "token"
        fields["ln_ppl"] = average([paired_mean(mine["nll"], theirs["nll"], chunks) for mine, theirs, chunks in pairs])
        fields["ppl"] = paired_perplexity([(mine["nll"], theirs["nll"], chunks) for mine, theirs, chunks in pairs])
        if all("kld" in mine and "kld" in theirs for mine, theirs, _ in pairs):
            fields["kld"] = average([paired_mean(mine["kld"], theirs["kld"], chunks) for mine, theirs, chunks in pairs])
    return Paired(**fields)


@dataclasses.dataclass(frozen=True)
class MixedPair:
    """Two models of which one is better on one text and worse on another, by more than noise.

    Parameters:
        this: index of a model.
        other: index of a model that is no larger.
        gaps: how much more KLD `this` has on each text, nats per token.
    """

    this: int
    other: int
    gaps: tuple[Figure, ...]


def mixed_pairs(
    sizes: Sequence[int], gaps: Callable[[int, int], Sequence[Figure]], largest: float = EQUAL_SIZE
) -> list[MixedPair]:
    """The pairs of models that texts order in two ways. Of two models of equal size the pair is listed once.

    Parameters:
        sizes: the bytes of each model.
        gaps: how much more KLD the first of two models has on each text, by their indices.
        largest: the largest ratio of two sizes that count as equal.
    """
    pairs = []
    for this, other in itertools.permutations(range(len(sizes)), 2):
        equal = max(sizes[this], sizes[other]) <= min(sizes[this], sizes[other]) * largest
        if this > other if equal else sizes[other] > sizes[this]:
            continue
        on_texts = tuple(gaps(this, other))
        signs = {math.copysign(1, gap.value) for gap in on_texts if abs(gap.value) > SURE * gap.error}
        if len(signs) == 2:
            pairs.append(MixedPair(this, other, on_texts))
    return pairs


def unit(chunks: OfChunks) -> str:
    """What the error of `paired_mean` takes as independent: "chunk", or "token" if there are too few chunks."""
    count = chunks if isinstance(chunks, int) else len(np.unique(chunks))
    return "chunk" if count >= MIN_CHUNKS else "token"


def paired_mean(this: Doubles, other: Doubles, chunks: OfChunks) -> Figure:
    """The mean of this − other, and its standard error over chunks or tokens (see `unit`).

    Parameters:
        this: one value for each token in the order of the text, float64 [tokens].
        other: the other model's values, of the same shape.
        chunks: chunks of the text, each with as many tokens; or the number of the chunk of each token, int32 [tokens].

    Example:
        >>> paired_mean(np.array([3.0, 5.0]), np.array([2.0, 2.0]), chunks=1)
        Figure(value=2.0, error=1.0)
    """
    return mean(_by_unit(this - other, chunks))


def paired_perplexity(texts: Sequence[tuple[Doubles, Doubles, OfChunks]]) -> Figure:
    """PPL(this) − PPL(other) over texts that count alike.

    To first order the error is that of the mean of PPL(this)·NLL(this) − PPL(other)·NLL(other).

    Parameters:
        texts: of each text the negative log-likelihoods of both, nats, float64 [tokens], and its chunks.
    """
    first, second = perplexity(*(text[0] for text in texts)).value, perplexity(*(text[1] for text in texts)).value
    spread = mean(*(_by_unit(first * this - second * other, chunks) for this, other, chunks in texts))
    return Figure(value=first - second, error=spread.error)


def _by_unit(values: Doubles, chunks: OfChunks) -> Doubles:
    """Independent values with the mean of all: the tokens, or one value for each chunk.

    Where chunks have different numbers of tokens n_c, the mean m is a ratio of sums. Its error follows to first order
    from m + (S_c − m n_c) C / N, with the sum S_c of each of C chunks and N tokens (Cochran, Sampling Techniques, §6).
    """
    if unit(chunks) == "token":
        return values
    if isinstance(chunks, int):
        means: Doubles = values.reshape(chunks, -1).mean(axis=1)
        return means
    counts = np.bincount(chunks)
    sums, counts = np.bincount(chunks, values)[counts > 0], counts[counts > 0]
    mean_of_all = values.mean()
    linear: Doubles = mean_of_all + (sums - mean_of_all * counts) * len(counts) / len(values)
    return linear


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
