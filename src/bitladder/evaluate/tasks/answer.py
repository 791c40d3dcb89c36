"""A model's answers to a task."""

from bitladder.engine.context import Context
from bitladder.engine.decoding import MIN_CTX
from bitladder.engine.model import Model
from bitladder.errors import BitladderError
from bitladder.evaluate.logit_rows import Workers
from bitladder.evaluate.settings import Settings
from bitladder.evaluate.tasks.batch import batches, choice_means
from bitladder.evaluate.tasks.draw import draw
from bitladder.evaluate.tasks.prepare import Prepared, prepare
from bitladder.evaluate.tasks.task import Answer, Skipped, Task, TaskResult
from bitladder.progress import SILENT, Progress

MIN_SEQUENCES = 4  # llama-perplexity's -np at the least; it needs a higher one for questions with more choices
_CELLS = 256  # the library rounds a context up to a multiple of this
_NAMED = 10  # skipped records that a warning names


def score_task(
    model: Model, task: Task, settings: Settings, *, count: int | None = None, progress: Progress = SILENT
) -> TaskResult:
    """Have a model answer `count` questions of a task (None: all), drawn and scored as llama-perplexity does.

    A question has room in -c tokens times the sequences, which are as many as the choices of the question with most
    of them, and at least four: what llama-perplexity has with -np of that number. Questions that have not, or that
    cannot be scored, are skipped and named in a warning. Raises BitladderError if none is left, if decoding fails or
    if the logits are not finite.
    """
    for note in task.notes:
        progress.info(f"{task.name}: {note}")
    drawn = draw(task.kind, len(task.items), count)
    made = {index + 1: prepare(model, task.kind, index + 1, task.items[index]) for index in drawn}
    skipped = [Skipped(record, reason) for record, reason in made.items() if isinstance(reason, str)]
    prepared = [question for question in made.values() if isinstance(question, Prepared)]
    n_seq = max([MIN_SEQUENCES, *(len(question.sequences) for question in prepared)])
    capacity = -(-n_seq * settings.n_ctx // _CELLS) * _CELLS
    skipped += [
        Skipped(question.record, f"needs {question.needed} tokens, the context has room for {capacity}")
        for question in prepared
        if question.needed > capacity
    ]
    fitting = [question for question in prepared if question.needed <= capacity]
    _report(task, skipped, len(drawn), progress)
    if not fitting:
        raise BitladderError(f"{task.name}: no question of {task.source} can be scored; {skipped[0].reason}")
    answers = _answer(model, task, fitting, n_seq, capacity, settings, progress)
    skipped.sort(key=lambda one: one.record)
    return TaskResult(task.name, task.source, task.sha256, settings.n_ctx, tuple(answers), tuple(skipped))


def _report(task: Task, skipped: list[Skipped], drawn: int, progress: Progress) -> None:
    if not skipped:
        return
    named = "; ".join(f"record {one.record} {one.reason}" for one in skipped[:_NAMED])
    more = f"; and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
    progress.warn(f"{task.name}: {len(skipped)} of {drawn} questions of {task.source} left out: {named}{more}")


def _answer(
    model: Model,
    task: Task,
    questions: list[Prepared],
    n_seq: int,
    capacity: int,
    settings: Settings,
    progress: Progress,
) -> list[Answer]:
    planned = list(batches(questions, capacity, n_seq))
    # Not the whole capacity: only the cells that the largest batch fills.
    most = max(sum(question.needed for question in batch) for batch in planned)
    answers: list[Answer] = []
    right = 0
    with (
        Context(
            model, settings.replace(n_ctx=max(-(-most // n_seq), MIN_CTX)), n_seq=n_seq, kv_unified=True
        ) as context,
        Workers(settings.threads) as workers,
        progress.task(f"{task.name} with {model.path.name}", len(questions)) as bar,
    ):
        for batch in planned:
            for question, means in zip(batch, choice_means(context, batch, workers), strict=True):
                chosen = question.take(means)
                answers.append(Answer(question.record, chosen, question.correct, len(means)))
                right += answers[-1].right
            bar.note(f"{right / len(answers):.1%}")
            bar.advance(len(batch))
    return answers
