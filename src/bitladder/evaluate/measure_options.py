"""How a model is measured."""

import dataclasses
import pathlib

from bitladder.engine import Context, Decoding, Model, Observer, main_memory
from bitladder.evaluate.identity import parts
from bitladder.options import option


@dataclasses.dataclass(frozen=True)
class MeasureOptions(Decoding):
    """How a model is measured: how it is decoded, and on how much of a text.

    Raises:
        UsageError: a number is outside its limits.
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
        """The number of chunks to measure of those that are available."""
        return available if self.chunks is None else min(self.chunks, available)

    def load(self, path: pathlib.Path) -> Model:
        """Loads a model in the way that needs least memory."""
        # The CPU back end repacks blocks. If the file is mapped, such blocks are in memory twice. A model that hardly
        # fits into memory is mapped nevertheless, so that the system can drop its pages.
        size = sum(part.stat().st_size for part in parts(path) if part.is_file())
        return Model(path, mmap=2 * size > main_memory(), gpu_layers=self.gpu_layers)

    def context(self, model: Model, observer: Observer | None = None) -> Context:
        """A context for one chunk at a time."""
        # Logits of several chunks at once need several times the memory and save no time: one sequence is enough.
        return Context(model, self, observer=observer)
