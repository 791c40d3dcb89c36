"""Questions with choices, the benchmarks that they are from, llama-perplexity's file of them, and a model's answers."""

import dataclasses
import enum
import struct
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from bitladder.errors import BitladderError
from bitladder.evaluate.scores import Figure, SkippedRecord, TaskScore
from bitladder.evaluate.tasks.question_files import HubData, QuestionFile
from bitladder.evaluate.token_scores import average, share
from bitladder.units import number_of

MAX_CHOICES = 100  # the limit of llama-perplexity
# The benchmarks of the average. Other tasks are no part of it.
FIVE = ("arc", "hellaswag", "mmlu", "truthfulqa", "winogrande")


class TaskKind(enum.Enum):
    """How llama-perplexity draws and scores a task. The value is its option."""

    HELLASWAG = "hellaswag"
    WINOGRANDE = "winogrande"
    MULTIPLE_CHOICE = "multiple-choice"


@dataclasses.dataclass(frozen=True)
class Question:
    """A text and choices that continue it.

    Parameters:
        text: what comes before the choice; it can be empty if there is an `after`.
        choices: the choices. A choice follows the text after a space; with an `after`, it follows the text directly.
        correct: index of the right choice.
        after: what comes after the choice, as in WinoGrande.
    """

    text: str
    choices: tuple[str, ...]
    correct: int
    after: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """What the model reads: one whole text for each choice."""
        return tuple(f"{beginning}{self.after}" for beginning in self.beginnings)

    @property
    def beginnings(self) -> tuple[str, ...]:
        """The texts up to the end of the choice."""
        space = "" if self.after else " "
        return tuple(f"{self.text}{space}{choice}" for choice in self.choices)


def question(where: str, text: str, choices: list[str], correct: int, after: str = "") -> Question:
    """A checked question. Raises BitladderError that begins with `where` if the question cannot be answered."""
    if not text and not after:
        raise BitladderError(f"{where}: the question is empty")
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise BitladderError(f"{where}: {number_of(len(choices), 'choice')}; there must be 2 to {MAX_CHOICES}")
    for number, choice in enumerate(choices, 1):
        if not choice:
            raise BitladderError(f"{where}: choice {number} is empty")
    if not 0 <= correct < len(choices):
        raise BitladderError(f"{where}: the right answer is none of the {number_of(len(choices), 'choice')}")
    return Question(text, tuple(choices), correct, after)


def question_prompt(text: str) -> str:
    """A question in the form of ARC, MMLU and TruthfulQA. The answer follows after a space."""
    return f"Question: {text}\nAnswer:"


QuestionReader = Callable[[QuestionFile], Iterator[Question]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark: the names of its files, and how they are read.

    Parameters:
        name: as `--tasks` names it.
        meaning: what it measures, in two sentences for the card.
        kind: how its public formats are scored. A .bin file is always multiple choice.
        readers: the reader of each suffix.
        default: the suffix whose reader is used for a file with any other suffix.
        layouts: patterns of its files in a folder (see `question_files.find_files`).
        hub: where the data set is on the hub.
        note: says what of a file is not among the questions; None if all is.
    """

    name: str
    meaning: str
    kind: TaskKind
    readers: Mapping[str, QuestionReader]
    default: str
    layouts: tuple[tuple[str, ...], ...]
    hub: HubData
    note: Callable[[QuestionFile], str | None] | None = None


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """All questions of a source. Record n is `items[n − 1]`.

    Parameters:
        name: the task, as `--tasks` names it.
        source: name of the source, without folder.
        sha256: of the source's content, unpacked.
        kind: how the questions are drawn and scored.
        items: the questions.
        notes: what of the source is not among the questions, in words.
    """

    name: str
    source: str
    sha256: str
    kind: TaskKind
    items: tuple[Question, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer to a record, counted from 1: the index of the chosen choice, and that of the right one."""

    record: int
    chosen: int
    correct: int
    choices: int

    @property
    def right(self) -> bool:
        """Whether the answer is right."""
        return self.chosen == self.correct


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that was drawn but not scored, and the reason."""

    record: int
    reason: str


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A model's answers to questions of a task, in the order in which they were drawn. There is at least one."""

    name: str
    source: str
    sha256: str
    n_ctx: int
    answers: tuple[Answer, ...]
    skipped: tuple[Skipped, ...]

    @property
    def accuracy(self) -> Figure:
        """The share of right answers, ± sqrt(p(1−p)/(n−1))."""
        return share(np.array([answer.right for answer in self.answers]))

    @property
    def chance(self) -> float:
        """The share that guessing gets: the mean of 1/choices over the scored questions."""
        return sum(1 / answer.choices for answer in self.answers) / len(self.answers)

    def to_score(self) -> TaskScore:
        """The result as the Scores JSON keeps it."""
        return TaskScore(
            accuracy=self.accuracy,
            chance=self.chance,
            count=len(self.answers),
            skipped=len(self.skipped),
            source=self.source,
            sha256=self.sha256,
            n_ctx=self.n_ctx,
            skipped_records=tuple(SkippedRecord(record=skip.record, reason=skip.reason) for skip in self.skipped),
            answers=" ".join(f"{answer.record}:{answer.chosen}:{answer.correct}" for answer in self.answers),
        )


def average_of_five(figures: Mapping[str, Figure]) -> Figure | None:
    """The mean over the five benchmarks of accuracies, or of differences of accuracies, by the name of the task.

    Returns:
        The mean with its standard error; None if one of the five is missing.
    """
    if not set(FIVE) <= figures.keys():
        return None
    return average([figures[name] for name in FIVE])


def read_binary(file: QuestionFile) -> Iterator[Question]:
    """The questions of llama-perplexity's file of multiple-choice questions (--multiple-choice -bf).

    All numbers have 32 bits, little-endian. The file has the number of questions, the offset of each question, and the
    questions. A text is its length in bytes and its bytes. A question is its text and two lists of answers, one with a
    single right answer and one with several. A list is its length, its texts, and a label for each text, 1 for right.
    The second list is not scored: it is checked, and written empty.

    Raises:
        BitladderError: the file is truncated or a record is malformed; the error names the record, counted from 1.
    """
    table = _Reader(file.data, file.name, 0)
    count = table.number()
    if count == 0:
        raise BitladderError(f"{file.name}: no questions")
    if 4 * (count + 1) > len(file.data):
        raise BitladderError(
            f"{file.name}: ends before its table of {number_of(count, 'record')}: it is truncated, or not such a file"
        )
    bytes_read = 0
    for record in range(1, count + 1):
        where = f"{file.name}, record {record}"
        place = table.number()
        reader = _Reader(file.data, where, place)
        text = reader.text()
        choices, labels = reader.answers()
        reader.answers()
        # Many records at one place would be far more than the file.
        bytes_read += reader.offset - place
        if bytes_read > len(file.data):
            raise BitladderError(f"{where}: the records overlap: the file is damaged, or not such a file")
        if labels.count(1) != 1:
            raise BitladderError(f"{where}: {number_of(labels.count(1), 'right answer')}; there must be one")
        yield question(where, text, choices, labels.index(1))


def write_binary(questions: list[Question]) -> bytes:
    """The content of such a file with these questions (see `read_binary`)."""
    bodies = [_body(item) for item in questions]
    offset = 4 * (len(bodies) + 1)
    numbers = [len(bodies)]
    for body in bodies:
        numbers.append(offset)
        offset += len(body)
    return struct.pack(f"<{len(numbers)}I", *numbers) + b"".join(bodies)


def _body(item: Question) -> bytes:
    labels = [int(index == item.correct) for index in range(len(item.choices))]
    parts = [_text(item.text), struct.pack("<I", len(labels)), *map(_text, item.choices)]
    return b"".join([*parts, struct.pack(f"<{len(labels)}i", *labels), struct.pack("<I", 0)])


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<I", len(data)) + data


@dataclasses.dataclass
class _Reader:
    data: bytes
    where: str
    offset: int

    def take(self, size: int) -> bytes:
        start, self.offset = self.offset, self.offset + size
        if self.offset > len(self.data):
            raise BitladderError(f"{self.where}: ends beyond the end of the file: it is truncated, or not such a file")
        return self.data[start : self.offset]

    def number(self) -> int:
        (value,) = struct.unpack("<I", self.take(4))
        return int(value)

    def text(self) -> str:
        return self.take(self.number()).decode("utf-8", "surrogateescape")

    def answers(self) -> tuple[list[str], list[int]]:
        count = self.number()
        if count > MAX_CHOICES:
            raise BitladderError(f"{self.where}: {number_of(count, 'answer')}; there can be {MAX_CHOICES} at most")
        texts = [self.text() for _ in range(count)]
        return texts, list(struct.unpack(f"<{count}i", self.take(4 * count)))
