"""How a speed was measured, and what came out."""

import dataclasses
import math
import statistics

from bitladder.engine.context import FLASH_ATTN
from bitladder.errors import UsageError
from bitladder.evaluate.scores import BenchRow, Figure
from bitladder.evaluate.speed_tests import SpeedTest


@dataclasses.dataclass(frozen=True)
class SpeedSettings:
    """Options of a speed measurement, with llama-bench's defaults.

    `threads` (-t, None: all); `gpu_layers` (-ngl, −1: all); `n_batch` (-b); `n_ubatch` (-ub); `flash_attn` (-fa);
    `warmup` (--no-warmup). Raises UsageError for values that make no sense.
    """

    threads: int | None = None
    gpu_layers: int = -1
    n_batch: int = 2048
    n_ubatch: int = 512
    flash_attn: str = "auto"
    warmup: bool = True

    def __post_init__(self) -> None:
        for option, value in (("-b", self.n_batch), ("-ub", self.n_ubatch), ("-t", self.threads)):
            if value is not None and value < 1:
                raise UsageError(f"{option} is {value}; it must be at least 1")
        if self.flash_attn not in FLASH_ATTN:
            raise UsageError(f"-fa is {self.flash_attn!r}; it must be one of {', '.join(FLASH_ATTN)}")


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """One model's samples of one test.

    `model` is the file's name, `model_type` the library's description of it, `size` bytes of all tensors, `n_params`
    weights; `threads` as used; `samples_ns` wall time of each repetition; `test_time` when the test began (RFC 3339).
    """

    model: str
    model_type: str
    size: int
    n_params: int
    test: SpeedTest
    settings: SpeedSettings
    threads: int
    backend: str
    cpu: str
    gpu: str
    test_time: str
    samples_ns: tuple[int, ...]

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [1e9 * self.test.tokens / sample for sample in self.samples_ns]

    @property
    def mean(self) -> float:
        """Mean of the repetitions' tokens per second."""
        return statistics.fmean(self.samples_ts)

    @property
    def stddev(self) -> float:
        """Their sample standard deviation, llama-bench's ±; 0 of a single one."""
        return statistics.stdev(self.samples_ts) if len(self.samples_ns) > 1 else 0.0

    def bench_row(self) -> BenchRow:
        """The row as `Scores.bench` keeps it; its error is that of the mean, σ/√n."""
        count, settings, test = len(self.samples_ns), self.settings, self.test
        return BenchRow(
            test=test.name,
            tokens_per_second=Figure(value=self.mean, error=self.stddev / math.sqrt(count)),
            stddev=self.stddev,
            repetitions=count,
            n_prompt=test.n_prompt,
            n_gen=test.n_gen,
            n_depth=test.n_depth,
            n_batch=settings.n_batch,
            n_ubatch=settings.n_ubatch,
            threads=self.threads,
            gpu_layers=settings.gpu_layers,
            flash_attn=settings.flash_attn,
            backend=self.backend,
            cpu=self.cpu,
        )
