"""Draws questions of a task and has a model answer them."""

import collections
import dataclasses
from collections.abc import Iterator

import numpy as np

from bitladder.engine import MIN_CTX, Lanes, Model
from bitladder.errors import BitladderError
from bitladder.evaluate.identity import MeasureOptions
from bitladder.evaluate.tasks.scored_choices import TokenizedQuestion, batches, choice_means, tokenize_question
from bitladder.evaluate.tasks.task import Answer, Question, QuestionSet, Skipped, TaskKind, TaskResult
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress
from bitladder.units import number_of

TASKS: Algorithm = Algorithm("tasks", ("questions are drawn and scored as in llama-perplexity",))

MIN_SEQUENCES = 4  # the least -np of llama-perplexity; questions with more choices need more
_CELLS = 256  # the library rounds a context up to a multiple of this
_NAMED = 10  # skipped records that a warning names


@dataclasses.dataclass(frozen=True)
class QuestionSummary:
    """What a task's source holds.

    Parameters:
        task: the name of the task.
        source: name of the source, without folder.
        sha256: of the source's content.
        kind: the option of llama-perplexity that scores such questions.
        count: questions that are drawn.
        available: questions in the source.
        choices: number of drawn questions by their number of choices.
        chance: share that guessing gets.
    """

    task: str
    source: str
    sha256: str
    kind: str
    count: int
    available: int
    choices: dict[int, int]
    chance: float

    def __str__(self) -> str:
        choices = ", ".join(f"{number} with {number_of(size, 'choice')}" for size, number in self.choices.items())
        return (
            f"{self.task}: {self.count} of {number_of(self.available, 'question')} of {self.source}: {choices}; chance "
            f"{100 * self.chance:.2f} %"
        )


def drawn_questions(task: QuestionSet, count: int | None) -> list[Question]:
    """The questions that are drawn for `count`; None gives all in the order of the source."""
    if count is None:
        return list(task.items)
    return [task.items[index] for index in draw(task.kind, len(task.items), count)]


def summarize(task: QuestionSet, count: int | None = None) -> QuestionSummary:
    """What is asked if `count` questions of a task are drawn; None asks all."""
    questions = drawn_questions(task, count)
    sizes = collections.Counter(len(question.choices) for question in questions)
    return QuestionSummary(
        task=task.name,
        source=task.source,
        sha256=task.sha256,
        kind=task.kind.value,
        count=len(questions),
        available=len(task.items),
        choices=dict(sorted(sizes.items())),
        chance=sum(number / size for size, number in sizes.items()) / len(questions),
    )


@TASKS.entry
def score_task(
    model: Model, task: QuestionSet, settings: MeasureOptions, *, count: int | None = None, progress: Progress = SILENT
) -> TaskResult:
    """Has a model answer questions of a task, drawn and scored as in llama-perplexity.

    The context has -c tokens for each sequence. There are as many sequences as the question with most choices has, and
    at least four, as in llama-perplexity with that -np. Questions that do not fit into the context or that cannot be
    scored are skipped, and a warning names them.

    Parameters:
        model: the loaded model.
        task: the questions.
        settings: how to decode.
        count: questions to draw; None asks all.
        progress: receives the progress.

    Raises:
        BitladderError: no question can be scored, decoding fails, or the logits are not finite.
    """
    for note in task.notes:
        progress.info(f"{task.name}: {note}")
    drawn = draw(task.kind, len(task.items), count)
    results = {index + 1: tokenize_question(model, task.kind, index + 1, task.items[index]) for index in drawn}
    skipped = [Skipped(record, reason) for record, reason in results.items() if isinstance(reason, str)]
    tokenized = [question for question in results.values() if isinstance(question, TokenizedQuestion)]
    n_seq = max([MIN_SEQUENCES, *(len(question.sequences) for question in tokenized)])
    capacity = -(-n_seq * settings.n_ctx // _CELLS) * _CELLS
    skipped += [
        Skipped(question.record, f"needs {number_of(question.needed, 'token')}, the context has room for {capacity}")
        for question in tokenized
        if question.needed > capacity
    ]
    fitting = [question for question in tokenized if question.needed <= capacity]
    _report(task, skipped, len(drawn), progress)
    if not fitting:
        raise BitladderError(f"{task.name}: no question of {task.source} can be scored; {skipped[0].reason}")
    answers = _answer(model, task, fitting, n_seq, capacity, settings, progress)
    skipped.sort(key=lambda skip: skip.record)
    return TaskResult(task.name, task.source, task.sha256, settings.n_ctx, tuple(answers), tuple(skipped))


def _report(task: QuestionSet, skipped: list[Skipped], drawn: int, progress: Progress) -> None:
    if not skipped:
        return
    named = "; ".join(f"record {skip.record} {skip.reason}" for skip in skipped[:_NAMED])
    more = f"; and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
    progress.warn(
        f"{task.name}: left out {len(skipped)} of {number_of(drawn, 'question')} of {task.source}: {named}{more}"
    )


def _answer(
    model: Model,
    task: QuestionSet,
    questions: list[TokenizedQuestion],
    n_seq: int,
    capacity: int,
    settings: MeasureOptions,
    progress: Progress,
) -> list[Answer]:
    planned = list(batches(questions, capacity, n_seq))
    # The context has the cells that the largest batch fills, which can be fewer than the capacity.
    most = max(sum(question.needed for question in batch) for batch in planned)
    answers: list[Answer] = []
    right = 0
    with (
        Lanes(model, settings.replace(n_ctx=max(-(-most // n_seq), MIN_CTX)), n_seq=n_seq, kv_unified=True) as lanes,
        progress.task(f"{task.name} with {model.name}", len(questions)) as bar,
    ):
        means_of_batches = lanes.each(
            len(planned), lambda lane, number: choice_means(lane.context, planned[number], lane.workers)
        )
        for batch, means_of_batch in zip(planned, means_of_batches, strict=True):
            for question, means in zip(batch, means_of_batch, strict=True):
                chosen = question.take(means)
                answers.append(Answer(question.record, chosen, question.correct, len(means)))
                right += answers[-1].right
            bar.note(f"{right / len(answers):.1%}")
            bar.advance(len(batch))
    return answers


SEED = 1
_BITS = 32


def draw(kind: TaskKind, available: int, count: int | None) -> list[int]:
    """Indices of the questions to score, in llama-perplexity's order.

    Parameters:
        kind: how the questions are drawn.
        available: number of questions.
        count: questions to draw; None or a larger number draws all.

    Example:
        >>> draw(TaskKind.MULTIPLE_CHOICE, 3, None)
        [0, 1, 2]
    """
    number = available if count is None else min(count, available)
    numbers = mersenne_twister(SEED)
    if kind is TaskKind.HELLASWAG:
        left = list(range(available))
        return [left.pop(below(len(left), numbers)) for _ in range(number)]
    if number == available:
        return list(range(available))
    return _draw_scaled(available, number, numbers)


def mersenne_twister(seed: int) -> Iterator[int]:
    """The endless numbers of std::mt19937(seed), 32 bits each."""
    state = np.random.RandomState(seed)  # has the seeding of C++, and its stream never changes (NEP 19)
    while True:
        yield from state.randint(0, 1 << _BITS, 1024, dtype=np.uint32).tolist()


def below(limit: int, numbers: Iterator[int]) -> int:
    """A whole number in 0 … limit−1 with equal probabilities, from 32-bit numbers (Lemire)."""
    threshold = (1 << _BITS) % limit
    while True:
        product = next(numbers) * limit
        if product % (1 << _BITS) >= threshold:
            return product >> _BITS


def _draw_scaled(available: int, count: int, numbers: Iterator[int]) -> list[int]:
    left, drawn = list(range(available)), []
    scale = np.float32(2.0**-_BITS)
    for _ in range(count):
        # Each product is rounded to float32, as in C++. It can round up to the length, which is beyond the last place.
        place = min(int(scale * np.float32(next(numbers)) * np.float32(len(left))), len(left) - 1)
        drawn.append(left[place])
        left[place] = left[-1]
        left.pop()
    return drawn
