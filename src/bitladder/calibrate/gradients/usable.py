"""Whether gradients of a model can be had: torch is installed, knows the model, and computes the library's logits."""

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from bitladder.calibrate.gradients.configuration import why_no_modules
from bitladder.engine import Tokens, logit_differences, sequence_logits, threads_available
from bitladder.errors import BitladderError, GradientsError
from bitladder.gguf import open_model

if TYPE_CHECKING:
    from bitladder.calibrate.gradients.forward import TorchModel

# Of the logits' range. The library rounds the inputs of F16 matrices, and its cache, to F16: on real models that leaves
# 0.002, and a rope of the wrong kind 0.4.
TOLERANCE = 0.03
# The share of positions that must be within it. Single positions can be so ill-conditioned that rounding alone moves
# them: the second token of a text that begins without BOS by 0.07, by 0.013 with weights in F32.
SHARE = 0.9


def require_torch() -> Any:
    """The torch module. Raises BitladderError that says how to install it."""
    try:
        import torch
    except ImportError:
        raise BitladderError("gradients need torch, which is not installed: pip install 'bitladder[torch]'") from None
    return torch


def has_half_products(device: str | None = None) -> bool:
    """Whether the CPU, or a device, has instructions for products in bfloat16. Without them they are slower than in
    float32."""
    if device == "cuda":
        return bool(require_torch().cuda.is_bf16_supported(including_emulation=False))
    if device == "mps":
        return False
    return bool(getattr(require_torch().cpu, "_is_avx512_bf16_supported", lambda: False)())


@contextlib.contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Inside the context torch computes with `threads` threads (None: every CPU that this process may use)."""
    torch = require_torch()
    before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_available())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def why_no_gradients(model: str | os.PathLike[str]) -> str | None:
    """Why there are no gradients of a model, in a few words; None if there should be. Only its header is read."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed (pip install 'bitladder[torch]')"
    with open_model(model) as file:
        return why_no_modules(file)


@dataclasses.dataclass(frozen=True)
class LogitAgreement:
    """How torch's logits compare with the library's.

    Differences are fractions of the range (largest minus smallest) of the library's logits at the same position.

    Parameters:
        positions: positions that were compared.
        rms: root mean square of the differences.
        typical: the largest difference at a position, which nine of ten positions do not exceed.
        largest: the largest difference of all.
        same_top: share of positions with the same most likely token.
    """

    positions: int
    rms: float
    typical: float
    largest: float
    same_top: float


def check_logits(
    path: str | os.PathLike[str],
    tokens: Tokens,
    *,
    tolerance: float = TOLERANCE,
    threads: int | None = None,
    ours: "TorchModel | None" = None,
) -> LogitAgreement:
    """Compares torch's logits with the library's at every position of a sequence.

    Parameters:
        path: the model.
        tokens: int32 [length].
        tolerance: the largest difference that is allowed at nine of ten positions, as a fraction of the logits' range.
        threads: threads of the CPU.
        ours: the torch model of the file, if it is open already.

    Raises:
        GradientsError: the logits differ by more.
    """
    require_torch()
    from bitladder.calibrate.gradients.forward import TorchModel

    expected = sequence_logits(path, tokens, threads=threads)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch_threads(threads))
        logits = (ours or stack.enter_context(TorchModel(path, threads=threads))).logits(tokens)
    difference = logit_differences(logits, expected)
    agreement = LogitAgreement(
        len(tokens),
        float(np.sqrt(np.mean(np.square(difference)))),
        float(np.quantile(difference.max(axis=1), SHARE)),
        float(difference.max()),
        float(np.mean(logits.argmax(axis=1) == expected.argmax(axis=1))),
    )
    if not agreement.typical <= tolerance:
        raise GradientsError(
            f"{pathlib.Path(path).name}: torch's logits differ from llama.cpp's by {agreement.typical:.3g} of their "
            f"range (tolerance {tolerance:g}); gradients of this model cannot be trusted"
        )
    return agreement
