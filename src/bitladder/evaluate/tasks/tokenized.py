"""Questions as tokens, and the predictions by which their choices are scored, as in llama-perplexity."""

import dataclasses

import numpy as np
import numpy.typing as npt

from bitladder.engine import Model, Tokens
from bitladder.evaluate.tasks.task import Question, TaskKind

Integers = npt.NDArray[np.int64]

_WHOLE_TAIL = 3  # WinoGrande: the choice is scored too if there are no more own tokens than this


@dataclasses.dataclass(frozen=True)
class ScoredChoice:
    """The rows of a question's logits that score a choice, and the token of each row; both [n]."""

    rows: Integers
    targets: Tokens


@dataclasses.dataclass(frozen=True)
class TokenizedQuestion:
    """A tokenized question.

    The rows of its logits are, in this order: that of the last common token, then for each choice those of its own
    tokens. The last token of a choice has a row only if `with_last`.

    Parameters:
        record: the record of the source, counted from 1.
        correct: index of the right choice.
        kind: how it is scored.
        sequences: the tokens of each text, one text for each choice.
        prefix: number of first tokens that all texts share.
        choices: how each choice is scored.
    """

    record: int
    correct: int
    kind: TaskKind
    sequences: tuple[Tokens, ...]
    prefix: int
    choices: tuple[ScoredChoice, ...]

    @property
    def with_last(self) -> bool:
        """Whether the last token of each choice has a row."""
        return self.kind is TaskKind.WINOGRANDE

    @property
    def needed(self) -> int:
        """Tokens to decode."""
        return self.prefix + sum(len(sequence) - self.prefix for sequence in self.sequences)

    def take(self, means: list[float]) -> int:
        """The index of the choice with the highest mean log-probability.

        Of equal ones it is the first, in WinoGrande the second.
        """
        if self.kind is TaskKind.WINOGRANDE:
            return 0 if means[0] > means[1] else 1
        return int(np.argmax(means))


def tokenize_question(model: Model, kind: TaskKind, record: int, question: Question) -> TokenizedQuestion | str:
    """Tokenizes a question. Returns the reason, in words, if the question cannot be scored."""
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
            return "the tokens of its choices do not end where the sentence continues"
    else:
        choices = _tails(sequences, prefix)
    return TokenizedQuestion(record, question.correct, kind, sequences, prefix, choices)


def common_prefix(sequences: tuple[Tokens, ...]) -> int:
    """The number of first tokens that all sequences share."""
    shortest = min(map(len, sequences))
    same = np.all([sequence[:shortest] == sequences[0][:shortest] for sequence in sequences], axis=0)
    return shortest if same.all() else int(same.argmin())


def _tails(sequences: tuple[Tokens, ...], prefix: int) -> tuple[ScoredChoice, ...]:
    """HellaSwag and multiple choice: every token after the common prefix."""
    choices, first = [], 1
    for sequence in sequences:
        own = len(sequence) - prefix
        rows = np.array([0, *range(first, first + own - 1)])
        choices.append(ScoredChoice(rows, sequence[prefix:]))
        first += own - 1
    return tuple(choices)


def _winogrande(sequences: tuple[Tokens, ...], prefix: int, known: tuple[int, ...]) -> tuple[ScoredChoice, ...] | None:
    """WinoGrande: the tokens after the choice, without the last one (a full stop) unless it is the only one.

    If the own part is so short that the choice is scored too, llama-perplexity reads the first token of the second
    choice from the row of the last token of the first choice. The same row is used here, so that the answers agree.

    Parameters:
        sequences: the tokens of each text.
        prefix: number of first tokens that all texts share.
        known: number of tokens up to the end of each choice.
    """
    after_choice = all(len(sequence) - prefix > _WHOLE_TAIL for sequence in sequences)
    choices, offset = [], 0
    for sequence, beginning in zip(sequences, known, strict=True):
        start = beginning if after_choice else prefix
        stop = len(sequence) - (1 if len(sequence) - start > 1 else 0)
        if not prefix <= start < stop:
            return None
        choices.append(ScoredChoice(np.arange(start, stop) - prefix + offset, sequence[start:stop]))
        offset += len(sequence) - prefix
    return tuple(choices)
