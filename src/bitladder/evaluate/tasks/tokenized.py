"""A question as tokens, and which predictions its choices are scored by; all as llama-perplexity has it."""

import dataclasses

import numpy as np
import numpy.typing as npt

from bitladder.engine.model import Model, Tokens
from bitladder.evaluate.tasks.task import Question, TaskKind

Integers = npt.NDArray[np.int64]

_WHOLE_TAIL = 3  # WinoGrande: tails of no more tokens than this are scored with the choice itself


@dataclasses.dataclass(frozen=True)
class ScoredChoice:
    """Of one choice: the rows of the question's logits that are read, and the token looked up in each."""

    rows: Integers
    targets: Tokens


@dataclasses.dataclass(frozen=True)
class TokenizedQuestion:
    """A tokenized question.

    `sequences` are its texts' tokens, one per choice, which begin with the same `prefix` tokens. The question's
    logits are rows in this order: the last common token's, then for each choice those of its own tokens (without the
    last one's, which predicts nothing, unless `with_last`).
    """

    record: int
    correct: int
    kind: TaskKind
    sequences: tuple[Tokens, ...]
    prefix: int
    choices: tuple[ScoredChoice, ...]

    @property
    def with_last(self) -> bool:
        """Whether each choice's last token has a row."""
        return self.kind is TaskKind.WINOGRANDE

    @property
    def needed(self) -> int:
        """Tokens to decode."""
        return self.prefix + sum(len(sequence) - self.prefix for sequence in self.sequences)

    def take(self, means: list[float]) -> int:
        """The choice with the highest mean log-probability; of equal ones the first, in WinoGrande the second."""
        if self.kind is TaskKind.WINOGRANDE:
            return 0 if means[0] > means[1] else 1
        return int(np.argmax(means))


def tokenize_question(model: Model, kind: TaskKind, record: int, question: Question) -> TokenizedQuestion | str:
    """Tokenize a question; what makes it impossible to score, in words, if something does."""
    sequences = tuple(model.tokenize(text) for text in question.texts)
    prefix = common_prefix(sequences)
    if prefix == 0:
        return "its choices have no common beginning"
    if min(map(len, sequences)) == prefix:
        return "one choice is the beginning of the others: it has nothing of its own to score"
    if kind is TaskKind.WINOGRANDE:
        known = tuple(len(model.tokenize(beginning)) for beginning in question.beginnings)
        choices = _winogrande(sequences, prefix, known)
        if choices is None:
            return "the tokens of its choices do not end where the sentence goes on"
    else:
        choices = _tails(sequences, prefix)
    return TokenizedQuestion(record, question.correct, kind, sequences, prefix, choices)


def common_prefix(sequences: tuple[Tokens, ...]) -> int:
    """How many first tokens all sequences share."""
    shortest = min(map(len, sequences))
    same = np.all([sequence[:shortest] == sequences[0][:shortest] for sequence in sequences], axis=0)
    return shortest if same.all() else int(same.argmin())


def _tails(sequences: tuple[Tokens, ...], prefix: int) -> tuple[ScoredChoice, ...]:
    """HellaSwag and multiple choice: every token after the common prefix."""
    found, first = [], 1
    for sequence in sequences:
        own = len(sequence) - prefix
        rows = np.array([0, *range(first, first + own - 1)])
        found.append(ScoredChoice(rows, sequence[prefix:]))
        first += own - 1
    return tuple(found)


def _winogrande(sequences: tuple[Tokens, ...], prefix: int, known: tuple[int, ...]) -> tuple[ScoredChoice, ...] | None:
    """The tokens after the choice, without the last one (a full stop) unless it is the only one.

    `known` is the number of tokens up to and with each choice. Where an own part is so short that the choice must be
    scored too, llama-perplexity looks up the second choice's first token in the row before its own, which is that
    of the first choice's last token; so do we, or else the answers would differ.
    """
    after_choice = all(len(sequence) - prefix > _WHOLE_TAIL for sequence in sequences)
    found, offset = [], 0
    for sequence, beginning in zip(sequences, known, strict=True):
        start = beginning if after_choice else prefix
        stop = len(sequence) - (1 if len(sequence) - start > 1 else 0)
        if not prefix <= start < stop:
            return None
        found.append(ScoredChoice(np.arange(start, stop) - prefix + offset, sequence[start:stop]))
        offset += len(sequence) - prefix
    return tuple(found)
