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


class TaskScore(_Part):
    """A benchmark: share of tasks solved, share that guessing would solve, tasks scored and tasks left out."""

    accuracy: Figure
    chance: float
    count: int
    skipped: int = 0


class BenchRow(_Part):
    """A speed test ("pp512", "tg128") and its tokens per second."""

    test: str
    tokens_per_second: Figure


class Scores(_Part):
    """Everything measured of one model file; what was not measured is None and absent from the JSON.

    `bpw` is bits per weight over all tensors, `chunks` and `tokens_scored` count what the figures are means over,
    `seconds` is wall time.
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
    bench: list[BenchRow] | None = None
    versions: dict[str, str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As a value for `json.dump`, without what was not measured."""
        return self.model_dump(exclude_none=True)
