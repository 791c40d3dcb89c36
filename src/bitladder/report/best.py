"""Which figures of a column are the best, as far as noise allows, and which files to choose."""

import math
from collections.abc import Callable, Sequence

from bitladder.evaluate import FIVE, SURE, Figure, RunScores, average_of_five, paired_task
from bitladder.report.finished_run import FinishedRun, RunModel

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
    """For each model, whether its figure is the best, or within SURE standard errors of the best.

    Parameters:
        models: the models of a column.
        difference: how two figures of the column differ.
        higher: whether the highest figure is the best; otherwise the lowest is.

    Returns:
        A flag for each model. No model is the best if there are fewer than two figures, or if all are within noise.
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
    marks = [gap is not None and sign * gap.value <= SURE * gap.error for gap in gaps]
    return [False] * len(models) if marks == [gap is not None for gap in gaps] else marks


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


# Memories that machines have, in GB.
MEMORIES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 512, 1024)
# Those of most readers, for which a rung is recommended.
USUAL_MEMORIES = (8, 16, 24)


def best_fitting(run: FinishedRun, memory: float) -> RunModel | None:
    """The best rung that fits into a memory, in GB, with the usual context; None if none does.

    It is the largest of those that are worth their size. If the memory of a context is not known, files alone count.
    """
    beside = run.beside[run.usual_context] if run.usual_context is not None else 0
    worth = worth_their_size([(rung.label, rung.scores) for rung in run.rungs])
    fitting = [rung for rung in run.rungs if rung.scores.bytes + beside <= memory * 10**9]
    return next((rung for rung in reversed(fitting) if rung.label in worth or not worth), None)


def recommended(run: FinishedRun) -> tuple[int, RunModel]:
    """The rung that commands name: the best one for the smallest usual memory, in GB, that has room for any rung."""
    larger = [memory for memory in MEMORIES if memory > USUAL_MEMORIES[-1]]
    fitting = ((memory, best_fitting(run, memory)) for memory in (*USUAL_MEMORIES, *larger))
    smallest = run.rungs[0]
    return next(((memory, rung) for memory, rung in fitting if rung), (smallest.scores.bytes // 10**9 + 1, smallest))


def by_memory(run: FinishedRun) -> list[tuple[int, RunModel]]:
    """The best rung for each memory that machines have, in GB. Memories that change nothing are left out."""
    choices: list[tuple[int, RunModel]] = []
    for memory in MEMORIES:
        rung = best_fitting(run, memory)
        if rung and (not choices or choices[-1][1] is not rung):
            choices.append((memory, rung))
    return choices


def in_a_sentence(rung: RunModel, rungs: Sequence[RunModel], preset: RunModel | None) -> str:
    """What a file is for: how near it is to full precision, and how it compares with smaller ones and the preset.

    Parameters:
        rung: the file.
        rungs: all rungs.
        preset: the preset by itself, if there is one.
    """
    mine = rung.scores
    if mine.kld is None:
        return "Not measured."
    verdict = next((text for limit, text in LEVELS if mine.kld.value <= limit), WORST)
    if mine.same_top_p is not None:
        verdict += f": same next token {100 * mine.same_top_p.value:.1f} % of the time"
    worth = worth_their_size([(other.label, other.scores) for other in rungs])
    if rung.label not in worth:
        smaller = [other for other in rungs if other.label in worth and other.size_order < rung.size_order]
        return f"{verdict}. {smaller[-1].label} is smaller and as good." if smaller else f"{verdict}."
    gap = kld(mine, preset.scores) if preset else None
    if preset and preset.scores.kld and gap and abs(gap.value) > SURE * gap.error:
        share = 100 * abs(gap.value) / preset.scores.kld.value
        verdict += f"; KLD {share:.0f} % {'below' if gap.value < 0 else 'above'} the preset's"
    return f"{verdict}."


def worth_their_size(rungs: Sequence[tuple[str, RunScores]]) -> list[str]:
    """The rungs with less KLD than every smaller one, by more than noise, smallest first.

    The noise is that of independent measurements. All share their text, so the true noise is smaller.
    """
    chosen: list[tuple[str, Figure]] = []
    for label, scores in by_size(rungs):
        if scores.kld is None:
            continue
        if not chosen or chosen[-1][1].value - scores.kld.value > SURE * math.hypot(
            chosen[-1][1].error, scores.kld.error
        ):
            chosen.append((label, scores.kld))
    return [label for label, _ in chosen]


def by_size(rungs: Sequence[tuple[str, RunScores]]) -> list[tuple[str, RunScores]]:
    """Labelled scores from the smallest file to the largest."""
    return sorted(rungs, key=lambda rung: (rung[1].bytes, rung[0]))
