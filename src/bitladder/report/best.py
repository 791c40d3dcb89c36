"""Which figures of a column are the best, as far as noise allows, and which files to choose."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from bitladder.evaluate import FIVE, Figure, RunScores, average_of_five, paired_task
from bitladder.report.finished_run import RunModel

# A difference of less than this many standard errors counts as noise.
NOISE = 2.0

# The figure of one model less that of another, in the order (this, other); None if one of them was not measured.
Difference = Callable[[RunScores, RunScores], Figure | None]

# Largest mean KLD of each verdict, nats per token. On the model of benchmarks/results, 96, 88 and 80 % of the next
# tokens are the same at the ends of the first three.
LEVELS = (
    (0.003, "Nearly identical"),
    (0.03, "Small loss"),
    (0.1, "Moderate loss"),
    (0.3, "Large loss"),
)
WORST = "Very large loss"


def best(models: Sequence[RunModel], difference: Difference, *, higher: bool = False) -> list[bool]:
    """For each model, whether its figure is the best, or within NOISE standard errors of the best.

    Parameters:
        models: the models of a column.
        difference: how two figures of the column differ.
        higher: whether the highest figure is the best; otherwise the lowest is.

    Returns:
        A flag for each model. With fewer than two figures no model is the best.
    """
    sign = -1.0 if higher else 1.0
    leader: RunModel | None = None
    for model in models:
        # A model without the figure has no difference, not even from itself.
        if difference(model.scores, model.scores) is None:
            continue
        gap = difference(model.scores, leader.scores) if leader else None
        if leader is None or (gap is not None and sign * gap.value < 0):
            leader = model
    gaps = [difference(model.scores, leader.scores) if leader else None for model in models]
    if sum(gap is not None for gap in gaps) < 2:
        return [False] * len(models)
    return [gap is not None and sign * gap.value <= NOISE * gap.error for gap in gaps]


def independent(figure: Callable[[RunScores], Figure | None]) -> Difference:
    """The difference of figures as if their errors were independent. On the same text the true error is smaller."""

    def difference(this: RunScores, other: RunScores) -> Figure | None:
        mine, theirs = figure(this), figure(other)
        if mine is None or theirs is None:
            return None
        error = 0.0 if this is other else math.hypot(mine.error, theirs.error)
        return Figure(value=mine.value - theirs.value, error=error)

    return difference


def kld(this: RunScores, other: RunScores) -> Figure | None:
    """The difference of KLDs, nats per token. A pair that was compared token by token has the error of that."""
    return paired_kld(this, other) or independent(lambda scores: scores.kld)(this, other)


def paired_kld(this: RunScores, other: RunScores) -> Figure | None:
    """The difference of KLDs over the same tokens; None if the two were not compared token by token."""
    if this.paired and this.paired.sha256 == other.sha256 and this.paired.kld:
        return this.paired.kld
    if other.paired and other.paired.sha256 == this.sha256 and other.paired.kld:
        return Figure(value=-other.paired.kld.value, error=other.paired.kld.error)
    return None


def perplexity(this: RunScores, other: RunScores) -> Figure | None:
    """The difference of ln PPL. If both were paired with the base, the error of the base drops out."""
    if this.ln_ppl_ratio is not None and other.ln_ppl_ratio is not None:
        return independent(lambda scores: scores.ln_ppl_ratio)(this, other)
    return independent(lambda scores: scores.ppl)(this, other)


def task(name: str) -> Difference:
    """The difference of accuracies in a task, question by question if the answers were kept."""

    def difference(this: RunScores, other: RunScores) -> Figure | None:
        if name not in this.tasks or name not in other.tasks:
            return None
        pair = paired_task(this.tasks[name].right(), other.tasks[name].right())
        return pair.difference if pair else independent(lambda scores: scores.tasks[name].accuracy)(this, other)

    return difference


def tasks_average(this: RunScores, other: RunScores) -> Figure | None:
    """The difference of the mean accuracies over the five benchmarks, which are independent of each other."""
    gaps = {name: gap for name in FIVE if (gap := task(name)(this, other))}
    return average_of_five(gaps)


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """A rung that is worth its size, and a sentence on its quality."""

    model: RunModel
    when: str


def recommendations(rungs: Sequence[RunModel]) -> list[Recommendation]:
    """The rungs that are worth their size, smallest first, each with a sentence."""
    labels = worth_their_size([(rung.label, rung.scores) for rung in rungs])
    chosen = [rung for rung in sorted(rungs, key=lambda rung: rung.size_order) if rung.label in labels]
    return [Recommendation(rung, _when(rung.scores)) for rung in chosen]


def worth_their_size(rungs: Sequence[tuple[str, RunScores]]) -> list[str]:
    """The rungs with less KLD than every smaller one, by more than noise, smallest first.

    The noise is that of independent measurements. All share their text, so the true noise is smaller.
    """
    chosen: list[tuple[str, Figure]] = []
    for label, scores in by_size(rungs):
        if scores.kld is None:
            continue
        if not chosen or chosen[-1][1].value - scores.kld.value > NOISE * math.hypot(
            chosen[-1][1].error, scores.kld.error
        ):
            chosen.append((label, scores.kld))
    return [label for label, _ in chosen]


def by_size(rungs: Sequence[tuple[str, RunScores]]) -> list[tuple[str, RunScores]]:
    """Labelled scores from the smallest file to the largest."""
    return sorted(rungs, key=lambda rung: (rung[1].bytes, rung[0]))


def _when(scores: RunScores) -> str:
    """How near a file is to full precision, and how often greedy decoding takes the same token."""
    assert scores.kld is not None
    kld = scores.kld.value
    verdict = next((text for limit, text in LEVELS if kld <= limit), WORST)
    if scores.same_top_p is None:
        return f"{verdict}."
    return f"{verdict}: same next token {100 * scores.same_top_p.value:.1f} % of the time."
