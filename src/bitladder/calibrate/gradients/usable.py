"""Is the torch forward pass the library's? Asked before any gradient is used."""

import contextlib
import dataclasses
import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from bitladder.calibrate.gradients.needs import require_torch, torch_threads
from bitladder.engine.context import logit_differences, sequence_logits
from bitladder.engine.model import Tokens
from bitladder.errors import BitladderError

if TYPE_CHECKING:
    from bitladder.calibrate.gradients.forward import TorchModel

# Of the logits' range. The library rounds the inputs of F16 matrices, and its cache, to F16: on real models that leaves
# 0.002, and a rope of the wrong kind 0.4.
TOLERANCE = 0.03
# What this share of the positions does not exceed is judged. Single positions can be so ill-conditioned that rounding
# alone moves them: the second token of a text that begins without BOS by 0.07, by 0.013 with weights in F32.
MOST = 0.9


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How torch's logits compare with the library's over some positions.

    `rms`, `typical` and `largest` difference are fractions of the range (largest minus smallest) of the library's
    logits at the same position; nine of ten positions have no larger one than `typical`. `same_top` is the share of
    positions with the same most likely token.
    """

    positions: int
    rms: float
    typical: float
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

    `ours` is the file's torch model if it is open already. Raises BitladderError if they differ by more than
    `tolerance` × the range of the logits at more than a tenth of the positions.
    """
    require_torch()
    from bitladder.calibrate.gradients.forward import TorchModel

    expected = sequence_logits(path, tokens, threads=threads)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        logits = (ours or stack.enter_context(TorchModel(path, threads=threads))).logits(tokens)
    difference = logit_differences(logits, expected)
    agreement = Agreement(
        len(tokens),
        float(np.sqrt(np.mean(np.square(difference)))),
        float(np.quantile(difference.max(axis=1), MOST)),
        float(difference.max()),
        float(np.mean(logits.argmax(axis=1) == expected.argmax(axis=1))),
    )
    if not agreement.typical <= tolerance:
        raise BitladderError(
            f"{pathlib.Path(path).name}: torch's logits differ from llama.cpp's by {agreement.typical:.3g} of their "
            f"range (tolerance {tolerance:g}); gradients of this model cannot be trusted"
        )
    return agreement
