"""Blocks whose weights a quantization loses: smaller than the type's smallest scale, or without importance."""

import numpy as np
import numpy.typing as npt

from bitladder.engine import TensorType, dequantize_into, quantize_rows
from bitladder.underflow import lost_rows

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Types keep scales as F16 times small integers. No scale vanishes in a block with a larger weight than this.
_SAFE = 2.0**-8
# A block is lost if its squared error is more than this share of its squares, and more than twice that of the same
# block scaled to 1: then the type is not at fault, but its smallest scale.
_LOST = 0.25


def lost_units(weights: Floats, data: Bytes, kind: TensorType, importance: Floats | None) -> int:
    """How many blocks of a quantized type, or rows of a floating-point type, lose their weights.

    Parameters:
        weights: the weights, float32 [rows, width].
        data: the weights in the type, uint8 [rows, row bytes].
        kind: the type.
        importance: of the columns, float32 [width], or None.
    """
    if kind.name == "f32":
        return 0
    if not kind.quantized:
        stored = np.empty_like(weights)
        dequantize_into(np.ascontiguousarray(data), kind, stored)
        return lost_rows(weights, stored)
    blocks = weights.reshape(len(weights), -1, kind.block)
    largest = np.abs(blocks).max(axis=2)
    suspect: npt.NDArray[np.bool_] = np.asarray(largest < _SAFE)
    if importance is not None:
        suspect |= ~importance.reshape(-1, kind.block).any(axis=1)
    suspect &= largest > 0
    rows = np.flatnonzero(suspect.any(axis=1))
    if not len(rows):
        return 0
    # Powers of two, so that only the exponents change. Blocks do not depend on one another.
    exponent = np.frexp(largest[rows])[1][:, :, None]
    scaled = np.ldexp(blocks[rows], -exponent).astype(np.float32)
    stored = np.empty_like(weights[rows])
    dequantize_into(np.ascontiguousarray(data[rows]), kind, stored)
    now = np.ldexp(stored.reshape(scaled.shape).astype(np.float64), -exponent)
    flat = scaled.reshape(len(rows), -1)
    columns = _alike(np.ones(weights.shape[1], np.float32) if importance is None else importance, kind.block)
    dequantize_into(quantize_rows(flat, kind, columns), kind, stored)
    least = np.square(stored.reshape(scaled.shape) - scaled).sum(axis=2, dtype=np.float64)
    error = np.square(now - scaled).sum(axis=2, dtype=np.float64)
    squares = np.square(scaled).sum(axis=2, dtype=np.float64)
    lost = (error > _LOST * squares) & (error > 2 * least)
    return int(np.count_nonzero(np.take(suspect, rows, axis=0) & lost))


def _alike(importance: Floats, block: int) -> Floats:
    """The importance with 1 in blocks where it is 0 throughout."""
    blocks = importance.reshape(-1, block)
    known = np.asarray(blocks.any(axis=1))
    return np.where(known[:, None], blocks, np.float32(1)).reshape(-1)
