"""Which figures of a column are the best, as far as noise lets them be told apart."""

import math
from collections.abc import Callable, Sequence

from bitladder.evaluate.paired import paired_task
from bitladder.report.numbers import Figure
from bitladder.report.rundir import Measured
from bitladder.report.scores import Scores

# Differences under so many standard errors are not called differences.
NOISE = 2.0

# One model's figure less another's, in the order (this, other); None if one of them was not measured.
Difference = Callable[[Scores, Scores], Figure | None]


def best(models: Sequence[Measured], difference: Difference, *, higher: bool = False) -> list[bool]:
    """For each model whether its figure is the best, or less than NOISE standard errors behind it.

    The best has the lowest figure (with `higher` the highest). With fewer than two figures nothing is the best.
    """
    sign = -1.0 if higher else 1.0
    leader: Measured | None = None
    for one in models:
        # A model without the figure has no difference, not even from itself.
        if difference(one.scores, one.scores) is None:
            continue
        gap = difference(one.scores, leader.scores) if leader else None
        if leader is None or (gap is not None and sign * gap.value < 0):
            leader = one
    gaps = [difference(one.scores, leader.scores) if leader else None for one in models]
    if sum(gap is not None for gap in gaps) < 2:
        return [False] * len(models)
    return [gap is not None and sign * gap.value <= NOISE * gap.error for gap in gaps]


def independent(figure: Callable[[Scores], Figure | None]) -> Difference:
    """The difference of figures as if their errors were independent: on the same text that is on the careful side."""

    def difference(this: Scores, other: Scores) -> Figure | None:
        one, two = figure(this), figure(other)
        if one is None or two is None:
            return None
        return Figure(value=one.value - two.value, error=0 if this is other else math.hypot(one.error, two.error))

    return difference


def kld(this: Scores, other: Scores) -> Figure | None:
    """Difference of KLDs, nats per token; of a pair that was compared token by token, with that ±."""
    return paired_kld(this, other) or independent(lambda scores: scores.kld)(this, other)


def paired_kld(this: Scores, other: Scores) -> Figure | None:
    """Difference of KLDs over the same tokens; None if the two were not compared so."""
    if this.paired and this.paired.sha256 == other.sha256 and this.paired.kld:
        return this.paired.kld
    if other.paired and other.paired.sha256 == this.sha256 and other.paired.kld:
        return Figure(value=-other.paired.kld.value, error=other.paired.kld.error)
    return None


def perplexity(this: Scores, other: Scores) -> Figure | None:
    """Difference of ln PPL. Both were paired with the base, whose ± drops out: far surer than the ± of PPL itself."""
    if this.ln_ppl_ratio is not None and other.ln_ppl_ratio is not None:
        return independent(lambda scores: scores.ln_ppl_ratio)(this, other)
    return independent(lambda scores: scores.ppl)(this, other)


def task(name: str) -> Difference:
    """Difference of accuracies in a benchmark; question by question where the answers were kept."""

    def difference(this: Scores, other: Scores) -> Figure | None:
        if name not in this.tasks or name not in other.tasks:
            return None
        paired = paired_task(this.tasks[name].right(), other.tasks[name].right())
        if paired is None:
            return independent(lambda scores: scores.tasks[name].accuracy)(this, other)
        return Figure(value=paired.difference.value, error=paired.difference.error)

    return difference


def tasks_average(this: Scores, other: Scores) -> Figure | None:
    """Difference of the mean accuracies over benchmarks, which are independent of each other."""
    if this.average() is None or other.average() is None or this.tasks.keys() != other.tasks.keys():
        return None
    gaps = [gap for name in this.tasks if (gap := task(name)(this, other))]
    error = math.sqrt(sum(gap.error**2 for gap in gaps)) / len(gaps)
    return Figure(value=sum(gap.value for gap in gaps) / len(gaps), error=error)
