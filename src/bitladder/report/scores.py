"""Scores files as the report reads them: all that is shown, nothing that it does not need.

Keys that are not known are passed over, and most may be absent, so that a directory of an older or a newer bitladder
can still be shown. docs/run.md has the layout.
"""

import pathlib
from typing import Literal, TypeVar

import pydantic

from bitladder.errors import BitladderError
from bitladder.report.numbers import Figure

Model = TypeVar("Model", bound=pydantic.BaseModel)
Role = Literal["base", "rung", "naive", "third-party"]

PERCENTILES = ("min", "p001", "p01", "p05", "p10", "median", "p90", "p95", "p99", "p999", "max")


class Divergence(Figure):
    """KLD in nats per token: mean ±, and the percentiles that were kept."""

    min: float | None = None
    p001: float | None = None
    p01: float | None = None
    p05: float | None = None
    p10: float | None = None
    median: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None


class DeltaP(pydantic.BaseModel):
    """The part of Δp that is reported."""

    rms: Figure


class TextMeasured(pydantic.BaseModel):
    """The text of a measurement."""

    name: str
    sha256: str


class TaskScore(pydantic.BaseModel):
    """The part of a benchmark's score that is reported; `answers` as evaluate.scores.TaskScore has them."""

    accuracy: Figure
    chance: float
    count: int
    source: str | None = None
    answers: str = pydantic.Field("", pattern=r"^(\s*\d+:\d+:\d+)*\s*$")

    def right(self) -> dict[int, bool]:
        """Whether each record was answered right."""
        parts = (answer.split(":") for answer in self.answers.split())
        return {int(record): chosen == correct for record, chosen, correct in parts}


class BenchRow(pydantic.BaseModel):
    """A speed: the test's name ("pp512"), tokens per second, and what it was measured with."""

    test: str
    tokens_per_second: Figure
    threads: int | None = None
    gpu_layers: int | None = None
    backend: str | None = None
    cpu: str | None = None


class Paired(pydantic.BaseModel):
    """This model less another on the same tokens: negative is better."""

    model: str
    sha256: str
    ppl: Figure | None = None
    ln_ppl: Figure | None = None
    kld: Figure | None = None


class Scores(pydantic.BaseModel):
    """The part of the Scores JSON that a report shows; without a base there is only `ppl`.

    `role` … `paired` are what a run adds (docs/run.md).
    """

    model: str
    sha256: str
    bytes: int = pydantic.Field(gt=0)
    bpw: float
    text: TextMeasured
    n_ctx: int
    chunks: int
    tokens_scored: int
    ppl: Figure
    ln_ppl_ratio: Figure | None = None
    rho_ppl: float | None = None
    kld: Divergence | None = None
    delta_p: DeltaP | None = None
    same_top_p: Figure | None = None
    tasks: dict[str, TaskScore] = {}
    tasks_average: float | None = None
    tasks_average_error: float | None = None
    bench: list[BenchRow] = []
    paired: Paired | None = None
    role: Role | None = None
    rung: str | None = None
    mode: str | None = None
    rounding: str | None = None
    smoothed: bool = False
    tuned: bool = False
    predicted_kld: float | None = None
    source: str | None = None
    doubts: list[str] = []
    versions: dict[str, str]

    def average(self) -> Figure | None:
        """The mean accuracy of the benchmarks."""
        if self.tasks_average is None:
            return None
        return Figure(value=self.tasks_average, error=self.tasks_average_error or 0)

    def speed(self, test: str) -> Figure | None:
        """Tokens per second of a test; None if it was not measured."""
        return next((row.tokens_per_second for row in self.bench if row.test == test), None)


def read_scores(path: pathlib.Path) -> Scores:
    """Read one scores file. Raises BitladderError if it is missing or not as `eval` writes it."""
    return read_model(path, Scores)


def read_model(path: pathlib.Path, kind: type[Model]) -> Model:
    """Read a JSON file. Raises BitladderError that names it, and the key that is missing or wrong."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise BitladderError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
