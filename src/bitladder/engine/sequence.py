"""The logits of one sequence, and how far others are from them."""

import os

import numpy as np
import numpy.typing as npt

from bitladder.engine.context import Context
from bitladder.engine.model import Model, Tokens

Floats = npt.NDArray[np.float32]


def sequence_logits(path: str | os.PathLike[str], tokens: Tokens, *, threads: int | None = None) -> Floats:
    """Logits at every position of a sequence, float32 [positions, vocabulary].

    Parameters: tokens int32 [positions]. Raises BitladderError if the file cannot be loaded or decoding fails.
    """
    length = len(tokens)
    with (
        Model(path, repack=False) as model,
        Context(model, n_ctx=length, n_batch=length, n_ubatch=min(length, 512), threads=threads) as context,
    ):
        context.decode(tokens, np.arange(length, dtype=np.int32), np.zeros(length, np.int32), np.ones(length, np.bool_))
        return context.logits().copy()


def logit_differences(logits: Floats, expected: Floats) -> Floats:
    """The differences, as fractions of the range (largest minus smallest) of what was expected at that position."""
    spread = np.maximum(np.ptp(expected, axis=1), np.finfo(np.float32).tiny)
    return np.asarray(np.abs(logits - expected) / spread[:, None], np.float32)
