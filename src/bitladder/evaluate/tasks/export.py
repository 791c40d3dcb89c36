"""Writing questions for llama-perplexity."""

import pathlib
from collections.abc import Callable

from bitladder.errors import BitladderError
from bitladder.evaluate.tasks import binary, hellaswag, winogrande
from bitladder.evaluate.tasks.summary import chosen
from bitladder.evaluate.tasks.task import Kind, Question, Task
from bitladder.files import PathLike, replacing

_WRITERS: dict[Kind, Callable[[list[Question]], bytes]] = {
    Kind.HELLASWAG: hellaswag.write_text,
    Kind.WINOGRANDE: winogrande.write_csv,
    Kind.MULTIPLE_CHOICE: binary.write,
}
_COMMANDS = {
    Kind.HELLASWAG: "--hellaswag --hellaswag-tasks {count} -f {path} --no-escape",
    Kind.WINOGRANDE: "--winogrande -f {path} --no-escape",
    Kind.MULTIPLE_CHOICE: "--multiple-choice -bf {path} --no-escape",
}


def export_task(task: Task, path: PathLike, count: int | None = None) -> None:
    """Write a task's questions in llama-perplexity's format: the `count` that would be drawn, or all for None.

    Raises BitladderError if a question does not fit the format.
    """
    try:
        data = _WRITERS[task.kind](chosen(task, count))
    except BitladderError as error:
        raise BitladderError(f"{task.source} cannot be written to {path}: {error}") from error
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def command_line(task: Task, path: PathLike, count: int) -> str:
    """The options that make llama-perplexity score all of a file written by `export_task`.

    Without --no-escape it turns every "\\n" of the file into a line break, inside the numbers of a binary file too.
    """
    return "llama-perplexity " + _COMMANDS[task.kind].format(path=pathlib.Path(path), count=count)
