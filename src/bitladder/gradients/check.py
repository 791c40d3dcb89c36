"""Is the torch forward pass the library's? Asked before any gradient is used."""

import contextlib
import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from bitladder.engine.context import Context
from bitladder.engine.model import Model, Tokens
from bitladder.errors import BitladderError
from bitladder.gradients.needs import require_torch, torch_threads

if TYPE_CHECKING:
    from bitladder.gradients.model import TorchModel

# Of the logits' range. The library rounds the inputs of F16 matrices, and its cache, to F16: on real models that leaves
# 0.001 at most, and a rope of the wrong kind 0.4.
TOLERANCE = 0.03


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How torch's logits compare with the library's over some positions.

    `rms` and `largest` difference are fractions of the range (largest minus smallest) of the library's logits at the
    same position; `same_top` is the share of positions with the same most likely token.
    """

    positions: int
    rms: float
    largest: float
    same_top: float


def check(
    path: str | os.PathLike[str],
    tokens: Tokens,
    *,
    tolerance: float = TOLERANCE,
    threads: int | None = None,
    ours: "TorchModel | None" = None,
) -> Agreement:
    """Compare the logits of one sequence, int32 [length], with the library's at every position.

    `ours` is the file's torch model if it is open already. Raises BitladderError if they differ somewhere by more than
    `tolerance` × the range of the logits there.
    """
    require_torch()
    from bitladder.gradients.model import TorchModel

    length = len(tokens)
    with (
        Model(path) as model,
        Context(model, n_ctx=length, n_batch=length, n_ubatch=min(length, 512), threads=threads) as context,
    ):
        context.decode(tokens, np.arange(length, dtype=np.int32), np.zeros(length, np.int32), np.ones(length, np.bool_))
        expected = context.logits().copy()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        logits = (ours or stack.enter_context(TorchModel(path, threads=threads))).logits(tokens)
    spread = expected.max(axis=1) - expected.min(axis=1)
    difference = np.abs(logits - expected) / np.maximum(spread, np.finfo(np.float32).tiny)[:, None]
    agreement = Agreement(
        length,
        float(np.sqrt(np.mean(np.square(difference)))),
        float(difference.max()),
        float(np.mean(logits.argmax(axis=1) == expected.argmax(axis=1))),
    )
    if not agreement.largest <= tolerance:
        raise BitladderError(
            f"{pathlib.Path(path).name}: torch's logits differ from llama.cpp's by {agreement.largest:.3g} of their "
            f"range (tolerance {tolerance:g}); gradients of this model cannot be trusted"
        )
    return agreement
