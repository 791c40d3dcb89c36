"""Questions as tokens, several in one batch, and the log-probabilities of their choices, as in llama-perplexity."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.engine import Context, Model, Tokens, Workers
from bitladder.evaluate.divergence import score_rows
from bitladder.evaluate.tasks.task import Question, TaskKind

Integers = npt.NDArray[np.int64]

_WHOLE_TAIL = 3  # WinoGrande: the choice is scored too if there are no more own tokens than this
Doubles = npt.NDArray[np.float64]


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


def batches(questions: Sequence[TokenizedQuestion], capacity: int, sequences: int) -> Iterator[list[TokenizedQuestion]]:
    """Groups questions, in order, into batches.

    These are llama-perplexity's batches. What is computed together decides the last digits.

    Parameters:
        questions: the questions.
        capacity: most tokens of a batch.
        sequences: most sequences of a batch.
    """
    batch: list[TokenizedQuestion] = []
    tokens = used = 0
    for question in questions:
        count = len(question.sequences)
        if batch and (tokens + question.needed > capacity or used + count > sequences):
            yield batch
            batch, tokens, used = [], 0, 0
        batch.append(question)
        tokens += question.needed
        used += count
    if batch:
        yield batch


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The arguments of `Context.decode`, and the first row of each question in the batch's rows of logits."""

    tokens: list[int]
    positions: list[int]
    sequences: list[tuple[int, ...]]
    outputs: npt.NDArray[np.bool_]
    first_rows: list[int]


def _lay_out(batch: list[TokenizedQuestion]) -> _Layout:
    tokens: list[int] = []
    positions: list[int] = []
    sequences: list[tuple[int, ...]] = []
    outputs: list[bool] = []
    first_rows: list[int] = []
    used = 0
    for question in batch:
        first_rows.append(sum(outputs))
        numbers = tuple(range(used, used + len(question.sequences)))
        used += len(numbers)
        prefix = question.prefix
        parts = [(numbers, question.sequences[0], 0, prefix)]
        parts += [((n,), own, prefix, len(own)) for n, own in zip(numbers, question.sequences, strict=True)]
        for shared_by, ids, start, stop in parts:
            tokens += ids[start:stop].tolist()
            positions += range(start, stop)
            sequences += [shared_by] * (stop - start)
            own_part = start > 0
            outputs += [own_part] * (stop - start - 1) + [not own_part or question.with_last]
    return _Layout(tokens, positions, sequences, np.array(outputs), first_rows)


def choice_means(context: Context, batch: list[TokenizedQuestion], workers: Workers) -> list[list[float]]:
    """The mean log-probability of each choice of each question, nats.

    Raises:
        BitladderError: decoding fails, or the logits are not finite.
    """
    layout = _lay_out(batch)
    scored = [
        (first + choice.rows, choice.targets)
        for first, question in zip(layout.first_rows, batch, strict=True)
        for choice in question.choices
    ]
    rows = np.concatenate([rows for rows, _ in scored])
    logs = _log_probabilities(context, layout, rows, np.concatenate([targets for _, targets in scored]), workers)
    ends = np.cumsum([len(targets) for _, targets in scored])[:-1]
    means = iter([float(part.mean()) for part in np.split(logs, ends)])
    return [[next(means) for _ in question.choices] for question in batch]


def _log_probabilities(
    context: Context, layout: _Layout, rows: npt.NDArray[np.int64], targets: npt.NDArray[np.int32], workers: Workers
) -> Doubles:
    """Log-probabilities of targets, each in its row of the batch's logits.

    Parameters:
        rows: row of each target, int64 [n].
        targets: token ids, int32 [n].

    Returns:
        float64 [n], nats.
    """
    result = np.empty(len(rows))
    context.clear()
    first = 0
    for start in range(0, len(layout.tokens), context.n_batch):
        part = slice(start, start + context.n_batch)
        context.decode(layout.tokens[part], layout.positions[part], layout.sequences[part], layout.outputs[part])
        logits = context.logits()
        here = (rows >= first) & (rows < first + len(logits))
        used, places = np.unique(rows[here] - first, return_inverse=True)
        if len(used):
            scored = logits if len(used) == len(logits) else logits[used]
            # ln Σ exp of a row is computed once, with token 0 as target, because a row can have several targets.
            nll = score_rows(scored, np.zeros(len(used), np.int32), workers, what=context.model.name).nll
            result[here] = scored[places, targets[here]] - (nll + scored[:, 0])[places]
        first += len(logits)
    return result
