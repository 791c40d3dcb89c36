"""Perplexity: how well a model predicts the second half of each chunk. Nothing else is needed than the model."""

import numpy as np
import numpy.typing as npt

from bitladder.engine.context import Context
from bitladder.evaluate.decode_chunks import Chunks, decode
from bitladder.evaluate.logit_rows import Workers, score_rows
from bitladder.progress import SILENT, Progress

Doubles = npt.NDArray[np.float64]


def token_nll(context: Context, chunks: Chunks, workers: Workers, progress: Progress = SILENT) -> Doubles:
    """Negative log-likelihood of every scored token, float64 [chunks × scored], in nats.

    Raises BitladderError if decoding fails or the logits are not finite.
    """
    name = context.model.path.name
    out = np.empty((len(chunks), chunks.scored))
    with progress.task(f"Perplexity of {name}", len(chunks)) as task:
        for chunk in range(len(chunks)):
            targets = chunks.targets(chunk)
            for start, logits in decode(context, chunks, chunk):
                stop = start + len(logits)
                out[chunk, start:stop] = score_rows(logits, targets[start:stop], workers, what=name).nll
            task.note(f"PPL {np.exp(min(out[: chunk + 1].mean(), 700)):.4f}")
            task.advance()
    return out.reshape(-1)
