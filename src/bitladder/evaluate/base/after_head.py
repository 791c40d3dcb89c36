"""What a model's graph does to the logits after the head: a bias, a factor, and a soft cap.

Source: src/models in llama.cpp. Cohere multiplies by `logit_scale`, Granite divides by it; Gemma 2 and others cap by
c · tanh(logit / c), c = `final_logit_softcapping`; Phi-2 and others add `output.bias`. The file does not say which of
them a graph does, so a base takes what fits the logits of the library.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from bitladder.evaluate.identity import Identity
from bitladder.gguf import GgufFile

Floats = npt.NDArray[np.float32]
BIAS = "output.bias"


@dataclasses.dataclass(frozen=True)
class AfterHead:
    """What is done to logits, in this order.

    Parameters:
        bias: what is added, float32 [vocabulary]; None for nothing.
        scale: the factor.
        cap: the soft cap; 0 for none.

    Example:
        >>> logits = np.array([[0.0, 40.0]], np.float32)
        >>> AfterHead(scale=0.5, cap=30.0).apply(logits, 0)
        >>> [round(float(logit), 2) for logit in logits[0]]
        [0.0, 17.48]
    """

    bias: Floats | None = None
    scale: float = 1.0
    cap: float = 0.0

    def apply(self, logits: Floats, start: int) -> None:
        """Changes logits in place: float32 [rows, block], the first of token `start`."""
        if self.bias is not None:
            logits += self.bias[start : start + logits.shape[1]]
        if self.scale != 1.0:
            logits *= np.float32(self.scale)
        if self.cap > 0:
            logits /= np.float32(self.cap)
            np.tanh(logits, out=logits)
            logits *= np.float32(self.cap)


def possible_after(model: Identity) -> list[AfterHead]:
    """What the graph of a model may do, by its metadata; no factor and no cap come first."""
    with GgufFile(model.path) as file:
        scale = _number(file, f"{model.architecture}.logit_scale")
        cap = _number(file, f"{model.architecture}.final_logit_softcapping")
        bias = _bias(file)
    scales = [1.0] if scale in (0.0, 1.0) else [1.0, scale, 1 / scale]
    caps = [0.0] if cap <= 0 else [0.0, cap]
    return [AfterHead(bias, factor, limit) for factor in scales for limit in caps]


def read_after(model: Identity, scale: float, cap: float) -> AfterHead:
    """A factor and a cap that are known, with the bias of the model file."""
    with GgufFile(model.path) as file:
        return AfterHead(_bias(file), scale, cap)


def _bias(file: GgufFile) -> Floats | None:
    tensor = file.tensors.get(BIAS)
    return file.read(tensor).reshape(-1).view(np.float32) if tensor and tensor.type.name == "f32" else None


def _number(file: GgufFile, key: str) -> float:
    """A finite number of the metadata; 0 if there is none."""
    value = file.get(key, 0.0)
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else 0.0
