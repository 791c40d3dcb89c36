"""How to measure."""

import dataclasses
import pathlib

from bitladder.engine.context import Context
from bitladder.engine.decoding import Decoding
from bitladder.engine.devices import main_memory
from bitladder.engine.model import Model
from bitladder.engine.observe import Observer
from bitladder.evaluate.identity import parts
from bitladder.options import option


@dataclasses.dataclass(frozen=True)
class Settings(Decoding):
    """How a model is measured: how it is decoded, and on how much of a text.

    Raises UsageError for numbers that make no sense.
    """

    n_batch: int = option(
        512, "-b", "--batch-size", least=1, decides=False, metavar="TOKENS", help="Tokens decoded by one call."
    )
    chunks: int | None = option(
        None, "--chunks", least=1, metavar="N", help="Chunks of the text that are measured.", unset="all"
    )

    def deciding(self) -> dict[str, object]:
        """As of `Decoding`, and the number of chunks."""
        return {**super().deciding(), "chunks": self.chunks}

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
        return Context(model, self, observer=observer)
