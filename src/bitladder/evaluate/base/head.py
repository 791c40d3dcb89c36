"""The head of a model applied to hidden states, a block of the vocabulary at a time.

The head is read from the file for every use and expanded block by block: neither it nor the logits of a whole chunk
are ever in memory, and reading from the system's file cache costs little beside the multiplication.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from bitladder.closing import Closing
from bitladder.engine.types import dequantize_into
from bitladder.evaluate.identity import Identity
from bitladder.gguf.reader import GgufFile

Floats = npt.NDArray[np.float32]

_WEIGHTS = 1 << 18  # weights in a block, about; together with the block's logits they should stay in a core's cache
_MIN_ROWS, _MAX_ROWS = 256, 4096  # fewer would be slow to multiply; more would not fit the scratch of `divergence`


class Head(Closing):
    """The output matrix of a model file, float32 logits = hidden states × its transpose."""

    def __init__(self, model: Identity) -> None:
        self.tensor = model.head
        self.n_vocab = model.head.rows
        self.n_embd = model.head.width
        self.step = min(self.n_vocab, max(_MIN_ROWS, min(_WEIGHTS // self.n_embd, _MAX_ROWS)))
        self._file = GgufFile(model.path)
        self._buffers: dict[tuple[str, int], Floats] = {}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def apply(self, hidden: Floats) -> "HeadLogits":
        """The logits of hidden states float32 [rows, n_embd]; nothing is computed yet."""
        return HeadLogits(self, np.ascontiguousarray(hidden))

    def block(self, hidden: Floats, index: int, slot: int) -> tuple[int, Floats]:
        """Block `index` of the logits of hidden states, see `HeadLogits.block`."""
        start = index * self.step
        stop = min(start + self.step, self.n_vocab)
        weights = self._buffer("weights", slot, stop - start, self.n_embd)
        dequantize_into(self._file.read(self.tensor, start, stop), self.tensor.type, weights)
        logits = self._buffer("logits", slot, len(hidden), stop - start)
        np.matmul(hidden, weights.T, out=logits)
        return start, logits

    def _buffer(self, kind: str, slot: int, rows: int, columns: int) -> Floats:
        buffer = self._buffers.get((kind, slot))
        if buffer is None or buffer.size < rows * columns:
            buffer = self._buffers[kind, slot] = np.empty(rows * columns, np.float32)
        return buffer[: rows * columns].reshape(rows, columns)


@dataclasses.dataclass(frozen=True)
class HeadLogits:
    """Logits of some hidden states, made when asked for (a `divergence.LogitBlocks`)."""

    head: Head
    hidden: Floats

    @property
    def count(self) -> int:
        """Blocks that make up the vocabulary."""
        return -(-self.head.n_vocab // self.head.step)

    def block(self, index: int, slot: int) -> tuple[int, Floats]:
        """The first token id of a block and its logits, float32 [rows, block].

        Threads may call at once if each has a `slot` of its own; the array may be written over and is valid until
        the next call with that slot.
        """
        return self.head.block(self.hidden, index, slot)
