"""From what a user asks for ("mmlu:mmlu-test.bin") to questions."""

import dataclasses
import hashlib
import pathlib

from bitladder.errors import BitladderError, UsageError
from bitladder.evaluate.tasks import continuation, hub_data, winogrande
from bitladder.evaluate.tasks.arc import ARC
from bitladder.evaluate.tasks.benchmark import Benchmark
from bitladder.evaluate.tasks.hellaswag import HELLASWAG
from bitladder.evaluate.tasks.mmlu import MMLU
from bitladder.evaluate.tasks.source import File, find_files, open_file
from bitladder.evaluate.tasks.task import Kind, Question, Task
from bitladder.evaluate.tasks.truthfulqa import TRUTHFULQA
from bitladder.evaluate.tasks.winogrande import WINOGRANDE
from bitladder.files import sha256_bytes

_BENCHMARKS = {one.name: one for one in (ARC, HELLASWAG, MMLU, TRUTHFULQA, WINOGRANDE)}
FIVE: tuple[str, ...] = tuple(_BENCHMARKS)
TASKS: tuple[str, ...] = (*FIVE, continuation.NAME)
_NAMED = 2  # files of a folder that are named


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """A task by name, and where its questions are: a file, a folder, or None for the data set on the hub."""

    name: str
    source: str | None


def parse_specs(text: str) -> list[TaskSpec]:
    """Read "hellaswag:f.txt,mmlu:mmlu.bin".

    Raises UsageError for a name that is unknown or comes twice, and for a source that is missing.
    """
    specs: list[TaskSpec] = []
    for part in text.split(","):
        name, colon, source = part.strip().partition(":")
        if name not in TASKS:
            raise UsageError(f"--tasks: there is no task {name!r}; there are {', '.join(TASKS)} (NAME:FILE,NAME:FILE)")
        if any(spec.name == name for spec in specs):
            raise UsageError(f"--tasks names {name} twice")
        if name == continuation.NAME and not source:
            raise UsageError(f"--tasks: {name} needs a text: {name}:FILE, or {name}:pydoc:test")
        if colon and not source:
            raise UsageError(f"--tasks: nothing after {name}: ; name a file or a folder, or leave the colon away")
        specs.append(TaskSpec(name, source or None))
    return specs


def load_task(spec: TaskSpec) -> Task:
    """Read and check all questions of a task.

    Raises BitladderError that names the file and the record: no such file, a malformed record, a truncated file.
    """
    if spec.name == continuation.NAME:
        return continuation.load(spec.source or "")
    benchmark = _BENCHMARKS[spec.name]
    if spec.source is None:
        return _from_files(benchmark, benchmark.hub.label, hub_data.download(benchmark.hub, spec.name))
    path = pathlib.Path(spec.source)
    if path.is_dir():
        paths = find_files(path, benchmark.layouts)
        return _from_files(benchmark, _folder_label(path, paths), paths)
    return _from_files(benchmark, path.name, [path])


def _from_files(benchmark: Benchmark, label: str, paths: list[pathlib.Path]) -> Task:
    files = [open_file(path) for path in paths]
    items = tuple(one for file in files for one in _read(benchmark, file))
    if not items:
        raise BitladderError(f"{label}: no questions")
    digests = [sha256_bytes(file.data) for file in files]
    joined = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    binary = all(file.suffix == ".bin" for file in files)
    notes = [winogrande.unseen(file) for file in files if benchmark is WINOGRANDE and file.suffix == ".csv"]
    return Task(
        name=benchmark.name,
        source=label,
        sha256=joined,
        kind=Kind.MULTIPLE_CHOICE if binary else benchmark.kind,
        items=items,
        notes=tuple(note for note in notes if note),
    )


def _read(benchmark: Benchmark, file: File) -> list[Question]:
    reader = benchmark.readers.get(file.suffix) or benchmark.readers[benchmark.default]
    return list(reader(file))


def _folder_label(folder: pathlib.Path, paths: list[pathlib.Path]) -> str:
    """Such as "mmlu (57 files of test)" or "arc (ARC-Easy-Test.jsonl, ARC-Challenge-Test.jsonl)"; nothing above it."""
    names = [path.relative_to(folder).as_posix() for path in paths]
    if len(names) > _NAMED:
        inside = paths[0].parent.relative_to(folder).as_posix()
        names = [f"{len(names)} files" + (f" of {inside}" if inside != "." else "")]
    return f"{folder.resolve().name} ({', '.join(names)})"
