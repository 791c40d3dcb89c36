"""How a model is measured: the options, the loaded model, and the decoding of a chunk as in llama-perplexity."""

import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bitladder.engine import Context, Decoding, Model, main_memory
from bitladder.evaluate.identity import parts
from bitladder.options import option
from bitladder.text import Chunks


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


Floats = npt.NDArray[np.float32]


def decode(context: Context, chunks: Chunks, chunk: int) -> Iterator[tuple[int, Floats]]:
    """Decodes a chunk from an empty context, in batches of the context's n_batch.

    Yields:
        For each batch with scored positions, the number of scored rows before it and its logits, float32
        [rows, n_vocab]. The logits are a view of native memory, valid until the next step.
    """
    context.clear()
    inputs = chunks.inputs(chunk)
    positions = np.arange(chunks.n_ctx, dtype=np.int32)
    outputs = (positions >= chunks.first) & (positions < chunks.n_ctx - 1)
    for start in range(0, chunks.n_ctx, context.n_batch):
        stop = min(start + context.n_batch, chunks.n_ctx)
        part = slice(start, stop)
        count = int(outputs[part].sum())
        context.decode(inputs[part], positions[part], np.zeros(stop - start, np.int32), outputs[part])
        if count:
            yield max(start - chunks.first, 0), context.logits()
