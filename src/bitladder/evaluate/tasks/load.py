"""Reads the questions of a task specification ("mmlu:mmlu-test.bin"), and writes them for llama-perplexity."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable

from bitladder.errors import BitladderError, UsageError, did_you_mean
from bitladder.evaluate.tasks import continuation, hellaswag, winogrande
from bitladder.evaluate.tasks.answer import drawn_questions
from bitladder.evaluate.tasks.arc import ARC
from bitladder.evaluate.tasks.hellaswag import HELLASWAG
from bitladder.evaluate.tasks.mmlu import MMLU
from bitladder.evaluate.tasks.question_files import QuestionFile, download, find_files, open_file
from bitladder.evaluate.tasks.task import Benchmark, Question, QuestionSet, TaskKind, read_binary, write_binary
from bitladder.evaluate.tasks.truthfulqa import TRUTHFULQA
from bitladder.evaluate.tasks.winogrande import WINOGRANDE
from bitladder.files import PathLike, replacing, sha256_bytes
from bitladder.units import number_of

# Every benchmark by name. A benchmark is added here; those of the average are named in `task.FIVE`.
BENCHMARKS = {benchmark.name: benchmark for benchmark in (ARC, HELLASWAG, MMLU, TRUTHFULQA, WINOGRANDE)}
_NAMED = 2  # files of a folder that are named one by one

_WRITERS: dict[TaskKind, Callable[[list[Question]], bytes]] = {
    TaskKind.HELLASWAG: hellaswag.write_text,
    TaskKind.WINOGRANDE: winogrande.write_csv,
    TaskKind.MULTIPLE_CHOICE: write_binary,
}
_COMMANDS = {
    TaskKind.HELLASWAG: "--hellaswag --hellaswag-tasks {count} -f {path} --no-escape",
    TaskKind.WINOGRANDE: "--winogrande -f {path} --no-escape",
    TaskKind.MULTIPLE_CHOICE: "--multiple-choice -bf {path} --no-escape",
}


def task_names() -> tuple[str, ...]:
    """The names of all tasks, as `--tasks` takes them."""
    return (*BENCHMARKS, continuation.NAME)


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """The name of a task and the place of its questions: a file, a folder, or None for the data set on the hub."""

    name: str
    source: str | None


def task_meanings() -> dict[str, str]:
    """What each task measures, in two sentences, by the name of the task."""
    meanings = {name: benchmark.meaning for name, benchmark in BENCHMARKS.items()}
    return meanings | {continuation.NAME: continuation.MEANING}


def parse_specs(text: str, option: str = "--tasks") -> list[TaskSpec]:
    """Reads a list of tasks such as "hellaswag:f.txt,mmlu:mmlu.bin".

    Parameters:
        text: the list.
        option: the option that has it, for errors; empty for an argument.

    Raises:
        UsageError: a name is unknown or comes twice, or a source is missing.
    """
    names, where = task_names(), f"{option}: " if option else ""
    specs: list[TaskSpec] = []
    for part in text.split(","):
        name, colon, source = part.strip().partition(":")
        if name not in names:
            close = did_you_mean(name, names, "there are")
            raise UsageError(f"{where}there is no task {name!r}{close}")
        if any(spec.name == name for spec in specs):
            raise UsageError(f"{where}{name} is named twice")
        if name == continuation.NAME and not source:
            raise UsageError(f"{where}{name} needs a text: {name}:FILE, or {name}:pydoc:test")
        if colon and not source:
            raise UsageError(f"{where}nothing after {name}: ; name a file or a folder, or leave the colon out")
        specs.append(TaskSpec(name, source or None))
    return specs


def load_task(spec: TaskSpec) -> QuestionSet:
    """Reads and checks all questions of a task.

    Raises:
        BitladderError: a file is missing or truncated, or a record is malformed; the error names file and record.
    """
    if spec.name == continuation.NAME:
        return continuation.load(spec.source or "")
    benchmark = BENCHMARKS[spec.name]
    if spec.source is None:
        return _from_files(benchmark, benchmark.hub.label, download(benchmark.hub, spec.name))
    path = pathlib.Path(spec.source)
    if path.is_dir():
        paths = find_files(path, benchmark.layouts)
        return _from_files(benchmark, _folder_label(path, paths), paths)
    return _from_files(benchmark, path.name, [path])


def _from_files(benchmark: Benchmark, label: str, paths: list[pathlib.Path]) -> QuestionSet:
    files = [open_file(path) for path in paths]
    items = tuple(question for file in files for question in _read(benchmark, file))
    if not items:
        raise BitladderError(f"{label}: no questions")
    digests = [sha256_bytes(file.data) for file in files]
    joined = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    all_binary = all(file.suffix == ".bin" for file in files)
    notes = [benchmark.note(file) for file in files] if benchmark.note else []
    return QuestionSet(
        name=benchmark.name,
        source=label,
        sha256=joined,
        kind=TaskKind.MULTIPLE_CHOICE if all_binary else benchmark.kind,
        items=items,
        notes=tuple(note for note in notes if note),
    )


def _read(benchmark: Benchmark, file: QuestionFile) -> list[Question]:
    reader = benchmark.readers.get(file.suffix) or benchmark.readers[benchmark.default]
    return list(reader(file))


def _folder_label(folder: pathlib.Path, paths: list[pathlib.Path]) -> str:
    """The folder and its files, such as "mmlu (57 files of test)", without the folders above."""
    names = [path.relative_to(folder).as_posix() for path in paths]
    if len(names) > _NAMED:
        inside = paths[0].parent.relative_to(folder).as_posix()
        names = [f"{number_of(len(names), 'file')}" + (f" of {inside}" if inside != "." else "")]
    return f"{folder.resolve().name} ({', '.join(names)})"


def export_task(task: QuestionSet, path: PathLike, count: int | None = None) -> None:
    """Writes questions of a task in llama-perplexity's format.

    Parameters:
        task: the questions.
        path: the file to write.
        count: questions to draw; None writes all.

    Raises:
        BitladderError: a question does not fit the format.
    """
    try:
        data = _WRITERS[task.kind](drawn_questions(task, count))
    except BitladderError as error:
        raise BitladderError(f"{task.source} cannot be written to {path}: {error}") from error
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def command_line(task: QuestionSet, path: PathLike, count: int) -> str:
    """The command by which llama-perplexity scores all questions of a file that `export_task` wrote.

    Without --no-escape llama-perplexity turns each "\\n" of the file into a line break, in binary files too.
    """
    return "llama-perplexity " + _COMMANDS[task.kind].format(path=pathlib.Path(path), count=count)


def is_task_file(path: pathlib.Path) -> bool:
    """Whether a file has questions in one of llama-perplexity's formats."""
    for read in (read_binary, hellaswag.read_text, winogrande.read_csv):
        with contextlib.suppress(BitladderError):
            if list(read(open_file(path))):
                return True
    return False
