"""How to measure."""

import dataclasses
import pathlib

from bitladder.engine.context import Context
from bitladder.engine.memory import main_memory
from bitladder.engine.model import Model
from bitladder.engine.observe import Observer
from bitladder.errors import UsageError
from bitladder.evaluate.identity import parts

MIN_CTX = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of a measurement.

    `n_ctx` tokens per chunk (-c); `chunks` at most so many (None: the whole text); `threads` (-t, None: all);
    `gpu_layers` (-ngl); `n_batch` tokens per decode (-b) and `n_ubatch` per computation (-ub).
    Raises UsageError for numbers that make no sense.
    """

    n_ctx: int = 512
    chunks: int | None = None
    threads: int | None = None
    gpu_layers: int = 0
    n_batch: int = 512
    n_ubatch: int = 512

    def __post_init__(self) -> None:
        if self.n_ctx < MIN_CTX:
            raise UsageError(f"--ctx-size is {self.n_ctx}; it must be at least {MIN_CTX}")
        if self.chunks is not None and self.chunks < 1:
            raise UsageError(f"--chunks is {self.chunks}; give a positive number, or leave it out for the whole text")
        for option, value in (("-b", self.n_batch), ("-ub", self.n_ubatch), ("-t", self.threads)):
            if value is not None and value < 1:
                raise UsageError(f"{option} is {value}; it must be at least 1")

    def limit(self, available: int) -> int:
        """Chunks to take of those there are."""
        return available if self.chunks is None else min(self.chunks, available)

    def load(self, path: pathlib.Path) -> Model:
        """Load a model in the way that takes least memory."""
        # Blocks that the CPU back end repacks would be there twice if the file were mapped too. Only what hardly fits
        # into memory had better be mapped, so that the system can drop pages of it.
        size = sum(part.stat().st_size for part in parts(path) if part.is_file())
        return Model(path, mmap=2 * size > main_memory(), gpu_layers=self.gpu_layers)

    def context(self, model: Model, observer: Observer | None = None) -> Context:
        """A context for one chunk at a time."""
        # One sequence: logits of several chunks at once would need several times the memory and no less time.
        return Context(
            model,
            n_ctx=self.n_ctx,
            n_batch=self.n_batch,
            n_ubatch=self.n_ubatch,
            threads=self.threads,
            observer=observer,
        )
