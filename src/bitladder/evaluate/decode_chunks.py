"""The decoding of a chunk, as in llama-perplexity."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bitladder.engine import Context
from bitladder.text import Chunks

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
