"""What a benchmark is made of, and what a model's answers to it are."""

import dataclasses
import enum

import numpy as np

from bitladder.errors import BitladderError
from bitladder.evaluate.figures import share
from bitladder.evaluate.scores import Figure, SkippedRecord, TaskScore

MAX_CHOICES = 100  # as many as llama-perplexity takes


class Kind(enum.Enum):
    """How llama-perplexity draws and scores a task; the value is the option that asks it to."""

    HELLASWAG = "hellaswag"
    WINOGRANDE = "winogrande"
    MULTIPLE_CHOICE = "multiple-choice"


@dataclasses.dataclass(frozen=True)
class Question:
    """A text and the choices to go on with, of which the one with index `correct` is right.

    A choice follows the text after a space; where there is an `after`, as in WinoGrande, it stands directly between
    `text` (which may be empty then) and `after`.
    """

    text: str
    choices: tuple[str, ...]
    correct: int
    after: str = ""

    @property
    def texts(self) -> tuple[str, ...]:
        """What the model is shown: one whole text per choice."""
        return tuple(f"{beginning}{self.after}" for beginning in self.beginnings)

    @property
    def beginnings(self) -> tuple[str, ...]:
        """The texts up to and with the choice."""
        space = "" if self.after else " "
        return tuple(f"{self.text}{space}{choice}" for choice in self.choices)


def question(where: str, text: str, choices: list[str], correct: int, after: str = "") -> Question:
    """A checked question. Raises BitladderError, beginning with `where`, if nobody could answer it."""
    if not text and not after:
        raise BitladderError(f"{where}: the question is empty")
    if not 2 <= len(choices) <= MAX_CHOICES:
        raise BitladderError(f"{where}: {len(choices)} choices; there must be 2 to {MAX_CHOICES}")
    for number, choice in enumerate(choices, 1):
        if not choice:
            raise BitladderError(f"{where}: choice {number} is empty")
    if not 0 <= correct < len(choices):
        raise BitladderError(f"{where}: the right answer is none of the {len(choices)} choices")
    return Question(text, tuple(choices), correct, after)


@dataclasses.dataclass(frozen=True)
class Task:
    """All questions of a source. Record n is `items[n − 1]`.

    `source` names the source without folder, `sha256` is of its content (unpacked), `notes` say what of it is not
    among the items.
    """

    name: str
    source: str
    sha256: str
    kind: Kind
    items: tuple[Question, ...]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer to record `record` (the first is 1): indices of the choice taken and of the right one."""

    record: int
    chosen: int
    correct: int
    choices: int

    @property
    def right(self) -> bool:
        """Whether the right choice was taken."""
        return self.chosen == self.correct


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A record that was drawn but not scored, and why."""

    record: int
    reason: str


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A model's answers to the questions drawn from a task, in the order they were drawn; at least one."""

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
        """What guessing would get: the mean of 1/choices over the questions scored."""
        return sum(1 / answer.choices for answer in self.answers) / len(self.answers)

    def to_score(self) -> TaskScore:
        """As it is kept in the Scores JSON."""
        return TaskScore(
            accuracy=self.accuracy,
            chance=self.chance,
            count=len(self.answers),
            skipped=len(self.skipped),
            source=self.source,
            sha256=self.sha256,
            n_ctx=self.n_ctx,
            skipped_records=tuple(SkippedRecord(record=one.record, reason=one.reason) for one in self.skipped),
            answers=" ".join(f"{one.record}:{one.chosen}:{one.correct}" for one in self.answers),
        )
