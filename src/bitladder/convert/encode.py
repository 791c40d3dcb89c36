"""Weights from the checkpoint's number format to the GGUF's, with nothing lost unsaid."""

from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from bitladder.convert.checkpoint import Raw
from bitladder.errors import BitladderError

Type = gguf.GGMLQuantizationType

# The largest finite value of each type; anything beyond would become infinite.
LARGEST = {Type.F32: float(np.finfo(np.float32).max), Type.F16: 65504.0, Type.BF16: float.fromhex("0x1.fep127")}
STORED: dict[Any, np.dtype[Any]] = {
    Type.F32: np.dtype(np.float32),
    Type.F16: np.dtype(np.float16),
    Type.BF16: np.dtype(np.uint16),
}
# Work goes in slabs of this many weights, so that the float32 in between stays small.
SLAB = 1 << 22


def check_finite(name: str, raw: Raw) -> None:
    """Raise BitladderError naming the first NaN or infinite weight of a tensor, with its index."""
    for start, slab in _slabs(raw):
        bad = ~np.isfinite(slab)
        if bad.any():
            first = int(bad.argmax())
            index = [int(i) for i in np.unravel_index(start + first, raw.shape)]
            raise BitladderError(
                f"tensor {name} has the value {slab[first]} at index {index}; the checkpoint is damaged"
            )


def encode(name: str, raw: Raw, target: Type) -> NDArray[Any]:
    """A tensor in the format of `target` (F32, F16 or BF16), same shape; BF16 as its bits in uint16.

    Rounds to nearest, ties to even. Raises BitladderError if a weight is too large for `target`.
    """
    out = np.empty(raw.size, STORED[target])
    for start, slab in _slabs(raw):
        largest = np.abs(slab).argmax() if slab.size else 0
        if slab.size and abs(slab[largest]) > LARGEST[target]:
            raise BitladderError(
                f"tensor {name} has the weight {slab[largest]:g}, which {target.name} cannot hold (at most"
                f" {LARGEST[target]:g}); use --outtype {'bf16' if target == Type.F16 else 'f32'}"
            )
        out[start : start + slab.size] = _bfloat16(slab) if target == Type.BF16 else slab
    return out.reshape(raw.shape)


def _slabs(raw: Raw) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(position, weights as float32) of each slab of the flattened tensor."""
    flat = raw.reshape(-1)
    for start in range(0, flat.size, SLAB):
        slab = flat[start : start + SLAB]
        if slab.dtype == np.uint16:
            yield start, (slab.astype(np.uint32) << 16).view(np.float32)
        else:
            yield start, slab.astype(np.float32)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite float32 values, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
