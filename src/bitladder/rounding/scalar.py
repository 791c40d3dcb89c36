"""Rounding to the types that store an index per weight."""

import numpy as np
import numpy.typing as npt

from bitladder.rounding.blocks import Blocks, Bytes, Floats
from bitladder.rounding.factors import couplings, factor
from bitladder.rounding.formats import pack, unpack
from bitladder.rounding.rounder import round_rows

# −128 can be stored as Q8_0, but kernels that negate it in eight bits go wrong.
_FIRST = {"q8_0": 1}
# What the step of a block with an F16 step of its own is tried times.
_FACTORS = np.array([1, 0.95, 1.05, 0.9, 1.1], np.float32)
_SIGN = {"none": 0, "plus": 1, "minus": -1}


def round_scalar(
    weights: Floats,
    stock: Bytes,
    kind: str,
    inputs: npt.NDArray[np.floating],
    outputs: npt.NDArray[np.floating] | None,
    *,
    passes: int,
    scales: bool,
    damping: float,
    output_damping: float,
    by_importance: bool,
) -> tuple[Bytes, Floats, Floats]:
    """Blocks, and the errors weights − blocks of the library's and of these, float32 [rows, width]; see `method`."""
    rows, width = weights.shape
    start = unpack(kind, stock, width)
    form = start.format
    factors = factor(inputs, form.sub, damping, by_importance)
    leading, coupling = couplings(outputs, output_damping)
    ones = np.ones((rows, width // form.sub), np.int16)
    blocks = Blocks(
        form,
        start.indices.copy(),
        start.d.copy(),
        np.zeros_like(start.d) if start.dmin is None else start.dmin.copy(),
        ones if start.scale is None else start.scale.copy(),
        ones.copy() if start.minimum is None else start.minimum.copy(),
    )
    before = weights - start.values()
    delta = before.copy()
    limits = np.array([*(form.scales or (1, 1)), *(form.minimums or (1, 1))], np.int64)
    round_rows(
        weights,
        0,
        rows,
        leading,
        coupling,
        factors.h,
        factors.ut,
        factors.order,
        factors.local_ut,
        factors.local_d,
        factors.local_inverse,
        blocks.d,
        blocks.dmin,
        np.float32(_SIGN[form.offset]),
        blocks.scale,
        blocks.minimum,
        limits,
        form.sub,
        form.block // form.sub,
        form.levels,
        form.uniform,
        _FIRST.get(kind, 0),
        _FACTORS if form.scales is None else _FACTORS[:0],
        blocks.indices,
        delta,
        passes,
        scales,
    )
    if start.dmin is None:
        blocks.dmin = None
    if start.scale is None:
        blocks.scale = None
    if start.minimum is None:
        blocks.minimum = None
    # What the row kernels carried along has rounding errors of its own.
    return pack(blocks), before, weights - blocks.values()
