"""The figures of a run, read from its directory, and the rows that tables are made of."""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import pydantic

from bitladder.errors import BitladderError
from bitladder.report.numbers import Figure, gigabytes, percent, with_error

# Differences under so many standard errors are not called differences.
NOISE = 2.0
DASH = "–"


class DeltaP(pydantic.BaseModel):
    """The part of Δp that is reported."""

    rms: Figure


class TextMeasured(pydantic.BaseModel):
    """The text of a measurement."""

    name: str
    sha256: str


class TaskScore(pydantic.BaseModel):
    """The part of a benchmark's score that is reported."""

    accuracy: Figure
    chance: float
    count: int
    source: str | None = None


class Scores(pydantic.BaseModel):
    """The part of the Scores JSON that a report shows; without a base there is only `ppl`."""

    model: str
    sha256: str
    bytes: int
    bpw: float
    text: TextMeasured
    n_ctx: int
    chunks: int
    tokens_scored: int
    ppl: Figure
    rho_ppl: float | None = None
    kld: Figure | None = None
    delta_p: DeltaP | None = None
    same_top_p: Figure | None = None
    tasks: dict[str, TaskScore] = {}
    tasks_average: float | None = None
    tasks_average_error: float | None = None
    versions: dict[str, str]


def read_scores(path: pathlib.Path) -> Scores:
    """Read one scores file. Raises BitladderError if it is missing or not as `eval` writes it."""
    try:
        return Scores.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise BitladderError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of a table, every field as it is shown."""

    label: str
    file: str
    size: str
    bpw: str
    ppl: str
    rho: str
    kld: str
    rms: str
    same_top: str


def row(label: str, scores: Scores) -> Row:
    """A model's figures as text; what was not measured is a dash."""
    return Row(
        label=label,
        file=scores.model,
        size=gigabytes(scores.bytes),
        bpw=f"{scores.bpw:.2f}",
        ppl=with_error(scores.ppl),
        rho=percent(scores.rho_ppl) if scores.rho_ppl is not None else DASH,
        kld=with_error(scores.kld) if scores.kld else DASH,
        rms=f"{with_error(scores.delta_p.rms, 100)} %" if scores.delta_p else DASH,
        same_top=f"{with_error(scores.same_top_p, 100)} %" if scores.same_top_p else DASH,
    )


def task_rows(models: Sequence[tuple[str, Scores]]) -> list[tuple[str, list[str]]]:
    """A row of accuracies for each model, in the order of the first one's tasks; then their average, if known."""
    names = list(models[0][1].tasks)
    rows = []
    for label, scores in models:
        cells = [
            f"{with_error(scores.tasks[name].accuracy, 100)} %" if name in scores.tasks else DASH for name in names
        ]
        if scores.tasks_average is not None:
            average = Figure(value=scores.tasks_average, error=scores.tasks_average_error or 0)
            cells.append(f"{with_error(average, 100)} %")
        rows.append((label, cells))
    return rows


def rows_of(measured: Sequence[dict[str, Any]], labels: Sequence[str]) -> list[Row]:
    """Rows for Scores JSON values: the first (full precision), then the others from the smallest file to the largest.

    `labels` name them in the same order.
    """
    parsed = [(label, Scores.model_validate(one)) for label, one in zip(labels, measured, strict=True)]
    return [row(label, one) for label, one in [parsed[0], *by_size(parsed[1:])]]


def by_size(rungs: Sequence[tuple[str, Scores]]) -> list[tuple[str, Scores]]:
    """Rungs from the smallest file to the largest."""
    return sorted(rungs, key=lambda rung: (rung[1].bytes, rung[0]))


def worth_their_size(rungs: Sequence[tuple[str, Scores]]) -> list[str]:
    """The rungs whose divergence is lower than that of every smaller one, by more than noise, smallest first.

    The noise is taken as if the measurements were independent. They share their text, so this is on the careful side.
    """
    chosen: list[tuple[str, Figure]] = []
    for label, scores in by_size(rungs):
        if scores.kld is None:
            continue
        if not chosen or chosen[-1][1].value - scores.kld.value > NOISE * math.hypot(
            chosen[-1][1].error, scores.kld.error
        ):
            chosen.append((label, scores.kld))
    return [label for label, _ in chosen]
