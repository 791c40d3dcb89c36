"""Several questions in one batch: each choice is a sequence, and the common prefix of a question is decoded once."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.engine import Context
from bitladder.evaluate.logit_rows import Workers, score_rows
from bitladder.evaluate.tasks.tokenized import TokenizedQuestion

Doubles = npt.NDArray[np.float64]


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
