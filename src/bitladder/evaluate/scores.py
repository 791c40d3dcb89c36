"""The Scores JSON: what is measured of a model, with standard errors. Probabilities are fractions of 1."""

from typing import Any

import pydantic


class _Part(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Figure(_Part):
    """A measured figure and its standard error."""

    value: float
    error: float


class Named(_Part):
    """A file by its name (without folder) and the SHA-256 of its content."""

    name: str
    sha256: str


class BaseModelName(_Part):
    """The full-precision model that a quant was compared with."""

    model: str
    sha256: str


class Divergence(_Part):
    """Kullback-Leibler divergence from the base, nats per token: mean ± and percentiles."""

    value: float
    error: float
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
    """Change of the probability of the token that follows: mean and root mean square ±, and percentiles."""

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
    """A record of a benchmark's source, counted from 1, that was drawn but could not be scored, and why."""

    record: int
    reason: str


class TaskScore(_Part):
    """A benchmark: share of questions answered right, share that guessing would get, questions scored and left out.

    `source` is the file or data set and `sha256` of its content; `n_ctx` the context (-c); `answers` has, for each
    question in the order of scoring, "record:chosen:correct" (record counted from 1, choices from 0), parted by
    blanks, so that two models' answers can be compared question by question.
    """

    accuracy: Figure
    chance: float
    count: int
    skipped: int = 0
    source: str | None = None
    sha256: str | None = None
    n_ctx: int | None = None
    skipped_records: tuple[SkippedRecord, ...] = ()
    answers: str = ""

    def right(self) -> dict[int, bool]:
        """Whether each scored record was answered right."""
        parts = [answer.split(":") for answer in self.answers.split()]
        return {int(record): chosen == correct for record, chosen, correct in parts}


class BenchRow(_Part):
    """A speed test ("pp512", "tg128", "pp512+tg128 @ d1024"), its tokens per second, and how it was measured.

    The error is that of the mean over `repetitions`; `stddev` is their spread, the ± of llama-bench. Options are
    llama-bench's: -p, -n, -d, -b, -ub, -t, -ngl, -fa.
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


class NoiseFigure(_Part):
    """Divergence of the full-precision model from itself, nats per token."""

    value: float
    error: float
    max: float


class Noise(_Part):
    """The noise floor over the first `chunks` chunks (see `noise.noise_floor`).

    From the base: `batch` with -ub `n_ubatch`, `activations` with inputs of weights rounded to Q8_0, `activations_k` to
    Q8_K. From the same rounding without -ub `n_ubatch`: `activations_batch` and `activations_k_batch`. None where no
    width can hold a type whose kernel rounds so.
    """

    chunks: int
    n_ubatch: int
    batch: NoiseFigure
    activations: NoiseFigure | None = None
    activations_batch: NoiseFigure | None = None
    activations_k: NoiseFigure | None = None
    activations_k_batch: NoiseFigure | None = None


class PairedTask(_Part):
    """Two models on the same questions: the difference of their accuracies, and what it rests on.

    `only_this` and `only_other` count questions that only one of them got right; `p_value` is McNemar's exact test's.
    """

    difference: Figure
    only_this: int
    only_other: int
    p_value: float


class Paired(_Part):
    """This model less another on the same tokens and questions; negative is better but for `tasks`.

    `per` is what the ± takes as independent: "chunk", or "token" where there are too few chunks.
    """

    model: str
    sha256: str
    per: str | None = None
    ppl: Figure | None = None
    ln_ppl: Figure | None = None
    kld: Figure | None = None
    tasks: dict[str, PairedTask] | None = None
    tasks_average: Figure | None = None


class Scores(_Part):
    """Everything measured of one model file; what was not measured is None and absent from the JSON.

    `bpw` is bits per weight over all tensors, `chunks` and `tokens_scored` count what the figures are means over,
    `seconds` is wall time. `tasks_average` is the plain mean of the tasks' accuracies.
    """

    model: str
    sha256: str
    bytes: int
    bpw: float
    base: BaseModelName | None = None
    text: Named | None = None
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
    tasks: dict[str, TaskScore] | None = None
    tasks_average: float | None = None
    tasks_average_error: float | None = None
    bench: list[BenchRow] | None = None
    noise: Noise | None = None
    paired: Paired | None = None
    versions: dict[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As a value for `json.dump`, without what was not measured."""
        return self.model_dump(exclude_none=True)
