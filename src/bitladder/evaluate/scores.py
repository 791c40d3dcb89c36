"""The Scores JSON: what was measured of a model, with standard errors. Probabilities are fractions of 1.

`Scores` is what `eval --json` prints. `RunScores` is what a run keeps of each of its models in scores/NAME.json.
Writers and readers use these classes and no others. docs/run.md describes the layout.
"""

import pathlib
from typing import Any, Literal, Self, TypeVar

import pydantic

from bitladder.errors import BitladderError
from bitladder.keys import Algorithm

SCORES = Algorithm(
    "scores",
    (
        "the figures of a model, with its tasks",
        "the speeds are put in from a file of their own",
        "a rung has its paired difference from the preset",
        "a rung says how its weights were rounded, and whether it is smoothed and tuned",
        "with several texts the figures on each, and their means",
    ),
)

Role = Literal["base", "rung", "naive", "third-party"]


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Figure(_Part):
    """A measured figure and its standard error, in the unit of the value."""

    value: float
    error: float


class NamedFile(_Part):
    """A file by its name (without folder) and the SHA-256 of its content."""

    name: str
    sha256: str


class BaseModelName(_Part):
    """The full-precision model that a quant was compared with, or the file of log-probabilities."""

    model: str
    sha256: str


class Divergence(Figure):
    """Kullback-Leibler divergence from the base, nats per token: mean with its standard error, and percentiles."""

    max: float
    p999: float
    p99: float
    p95: float
    p90: float
    median: float
    p10: float
    p05: float
    p01: float
    p001: float
    min: float


class DeltaP(_Part):
    """Change of the probability of the token that follows: mean and root mean square, and percentiles."""

    mean: Figure
    rms: Figure
    max: float
    p999: float
    p99: float
    p95: float
    p90: float
    p75: float
    median: float
    p25: float
    p10: float
    p05: float
    p01: float
    p001: float
    min: float


class SkippedRecord(_Part):
    """A question that was drawn but could not be scored: its record in the source, counted from 1, and the reason."""

    record: int
    reason: str


class TaskScore(_Part):
    """What a model scored in a task.

    Parameters:
        accuracy: share of questions that were answered right.
        chance: share that guessing gets.
        count: questions that were scored.
        skipped: questions that were drawn and not scored.
        source: the file or data set.
        sha256: of the source's content.
        n_ctx: tokens of context (-c).
        skipped_records: which questions were skipped, and why.
        answers: "record:chosen:correct" for each question in the order of scoring, with blanks between; records count
            from 1, choices from 0. Two models are compared question by question from them.
    """

    accuracy: Figure
    chance: float
    count: int
    skipped: int = 0
    source: str | None = None
    sha256: str | None = None
    n_ctx: int | None = None
    skipped_records: tuple[SkippedRecord, ...] = ()
    answers: str = pydantic.Field("", pattern=r"^(\s*\d+:\d+:\d+)*\s*$")

    def right(self) -> dict[int, bool]:
        """Whether each scored record was answered right."""
        parts = [answer.split(":") for answer in self.answers.split()]
        return {int(record): chosen == correct for record, chosen, correct in parts}


class BenchRow(_Part):
    """A speed test ("pp512", "tg128", "pp512+tg128 @ d1024"), its tokens per second, and how it was measured.

    The error is that of the mean over `repetitions`; `stddev` is their standard deviation, the ± of llama-bench. The
    options are llama-bench's: -p, -n, -d, -b, -ub, -t, -ngl, -fa.
    """

    test: str
    tokens_per_second: Figure
    stddev: float
    repetitions: int
    n_prompt: int
    n_gen: int
    n_depth: int
    n_batch: int
    n_ubatch: int
    threads: int
    gpu_layers: int
    flash_attn: str
    backend: str
    cpu: str


class NoiseFigure(Figure):
    """Divergence of the full-precision model from itself, nats per token."""

    max: float


class Noise(_Part):
    """The noise floor over the first `chunks` chunks (see `noise.noise_floor`).

    From the base: `batch` with -ub `n_ubatch`, `activations` with inputs of weights rounded to Q8_0, `activations_k` to
    Q8_K. From the same rounding without -ub `n_ubatch`: `activations_batch` and `activations_k_batch`. None where no
    width can hold a type whose kernel rounds so, or where inputs cannot be rounded so; `left_out` then says why.
    """

    chunks: int
    n_ubatch: int
    batch: NoiseFigure
    activations: NoiseFigure | None = None
    activations_batch: NoiseFigure | None = None
    activations_k: NoiseFigure | None = None
    activations_k_batch: NoiseFigure | None = None
    left_out: str | None = None


class PairedTask(_Part):
    """Two models on the same questions: the difference of their accuracies.

    `only_this` and `only_other` count the questions that only one of them answered right; `p_value` is that of
    McNemar's exact test.
    """

    difference: Figure
    only_this: int
    only_other: int
    p_value: float


class Paired(_Part):
    """This model less another one on the same tokens and questions. Negative is better, except in tasks.

    `per` is the unit that the errors take as independent: "chunk", or "token" where there are too few chunks.
    """

    model: str
    sha256: str
    per: str | None = None
    ppl: Figure | None = None
    ln_ppl: Figure | None = None
    kld: Figure | None = None
    tasks: dict[str, PairedTask] | None = None
    tasks_average: Figure | None = None


class _ModelFile(_Part):
    model: str
    sha256: str
    bytes: int = pydantic.Field(gt=0)
    bpw: float
    base: BaseModelName | None = None


class TextScores(_Part):
    """What was measured of a model on one text, or the mean over several texts, each of which counts alike.

    Parameters:
        text: the text; of several, their names, and the hash of their hashes.
        chunks: chunks that the figures are means over, of `n_ctx` tokens each.
        tokens_scored: tokens that the figures are means over.
        paired: how the model differs from another one on the same tokens.
    """

    text: NamedFile | None = None
    n_ctx: int | None = None
    chunks: int | None = None
    tokens_scored: int | None = None
    ppl: Figure | None = None
    ppl_base: Figure | None = None
    ppl_ratio: Figure | None = None
    ln_ppl_ratio: Figure | None = None
    rho_ppl: float | None = None
    kld: Divergence | None = None
    delta_p: DeltaP | None = None
    same_top_p: Figure | None = None
    paired: Paired | None = None


class Scores(TextScores, _ModelFile):
    """Everything that was measured of one model file.

    What was not measured is None or empty, and absent from the JSON.

    Parameters:
        model: the file's name, without folder.
        sha256: of the file's content.
        bytes: the file's size.
        bpw: bits per weight over all tensors.
        texts: with several texts, the figures on each. The figures beside it are then their means.
        tasks: scores by the name of the task.
        tasks_average: mean accuracy of the five benchmarks, where all five were scored; `tasks_average_error` is its
            standard error.
        noise: the noise floor of the base, on the first text.
    """

    texts: tuple[TextScores, ...] = ()
    tasks: dict[str, TaskScore] = {}
    tasks_average: float | None = None
    tasks_average_error: float | None = None
    bench: list[BenchRow] = []
    noise: Noise | None = None
    versions: dict[str, str]

    @property
    def texts_used(self) -> tuple[NamedFile, ...]:
        """The texts that the model was measured on."""
        return tuple(part.text for part in (self.texts or (self,)) if part.text)

    def on(self, index: int) -> Self:
        """The same scores with the figures on one of several texts in place of their means, and without tasks."""
        fields = {name: getattr(self.texts[index], name) for name in TextScores.model_fields}
        return self.model_copy(update={**fields, "texts": (), "tasks": {}, "tasks_average": None})

    def to_json(self) -> dict[str, Any]:
        """The scores as a value for `json.dump`, without what was not measured and what does not hold."""
        values = self.model_dump(mode="json", exclude_none=True)
        return {name: value for name, value in values.items() if value is not False and value not in ({}, [])}

    def average(self) -> Figure | None:
        """The mean accuracy of the five benchmarks; None if not all five were scored."""
        if self.tasks_average is None:
            return None
        return Figure(value=self.tasks_average, error=self.tasks_average_error or 0.0)

    def speed(self, test: str) -> Figure | None:
        """Tokens per second of a speed test; None if it was not measured."""
        return next((row.tokens_per_second for row in self.bench if row.test == test), None)


class RunScores(Scores):
    """The scores of a model of a run, with its place in the run. All models of a run have a text and a perplexity.

    Parameters:
        role: what the model is in the run; None: the base in base.json, otherwise a rung.
        rung: of a preset by itself ("naive"), the rung that it stands beside.
        mode: how the types of a rung were chosen.
        predicted_kld: what the plan predicted, nats per token.
        rounding: how weights were rounded; None: by llama.cpp's own kernels.
        smoothed: the rung was made of the smoothed model.
        tuned: the scales of the rung were tuned.
        source: the hub repository of somebody else's file.
        doubts: signs that somebody else's file is of another checkpoint, a sentence each.
    """

    text: NamedFile
    n_ctx: int
    chunks: int
    tokens_scored: int
    ppl: Figure
    role: Role | None = None
    rung: str | None = None
    mode: Literal["quality", "size", "naive"] | None = None
    predicted_kld: float | None = None
    source: str | None = None
    doubts: tuple[str, ...] = ()
    rounding: str | None = None
    tuned: bool = False
    smoothed: bool = False

    @classmethod
    def of(cls, scores: Scores, **place: Any) -> Self:
        """The scores with the model's place in the run: fields of this class by name."""
        return cls(**(dict(scores) | place))


S = TypeVar("S", bound=pydantic.BaseModel)


def read_scores(path: pathlib.Path) -> RunScores:
    """Reads a file of scores that a run wrote.

    Raises:
        BitladderError: the file is missing, or a key is missing, unknown or of a wrong type.
    """
    return read_document(path, RunScores)


def read_document(path: pathlib.Path, kind: type[S]) -> S:
    """Reads a JSON file that must have the form of a class.

    Raises:
        BitladderError: the file is missing, or a key is missing or wrong; the error names the file and the key.
    """
    try:
        return kind.model_validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise BitladderError(f"{path}: {place}: {first['msg']}") from error
