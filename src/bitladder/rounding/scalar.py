"""Rounding to the types that store an index per weight."""

import numpy as np
import numpy.typing as npt

from bitladder.rounding.blocks import Blocks, Bytes, Floats, Format
from bitladder.rounding.factors import couplings, factor
from bitladder.rounding.formats import pack, unpack
from bitladder.rounding.passes import round_in_groups
from bitladder.rounding.rounder import open_rows, pass_rows

# −128 can be stored as Q8_0, but kernels that negate it in eight bits go wrong.
_FIRST = {"q8_0": 1}
# What the step of a block with an F16 step of its own is tried times, and where one end of the levels is farther from 0
# than the other, and no offset makes up for that: the largest weight may be at either.
_FACTORS = np.array([1, 0.95, 1.05, 0.9, 1.1], np.float32)
_TURNED = np.array([-0.9, -1, -1.1], np.float32)
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
    lowest = _FIRST.get(kind, 0)
    tried = _factors(form, lowest)
    limits = np.array([*(form.scales or (1, 1)), *(form.minimums or (1, 1))], np.int64)
    sign = np.float32(_SIGN[form.offset])
    shape = (form.sub, form.block // form.sub, form.levels, form.uniform, lowest)

    def opening(first: int, targets: Floats, leading: Floats) -> None:
        open_rows(
            weights, first, targets, leading, factors.ut, factors.order, blocks.d, blocks.dmin, sign, blocks.scale,
            blocks.minimum, *shape, blocks.indices, delta,
        )  # fmt: skip

    def one_pass(first: int, slopes: Floats, coupling: Floats) -> Floats:
        shifts = np.empty_like(slopes)
        pass_rows(
            first, slopes, coupling, shifts, factors.h, factors.local_ut, factors.local_d, factors.local_inverse,
            blocks.d, blocks.dmin, sign, blocks.scale, blocks.minimum, limits, *shape, tried, blocks.indices, delta,
            scales,
        )  # fmt: skip
        return shifts

    round_in_groups(weights, delta, factors.h, leading, coupling, passes, opening, one_pass)
    if start.dmin is None:
        blocks.dmin = None
    if start.scale is None:
        blocks.scale = None
    if start.minimum is None:
        blocks.minimum = None
    # What the row kernels carried along has rounding errors of its own.
    return pack(blocks), before, weights - blocks.values()


def _factors(form: Format, lowest: int) -> Floats:
    if form.scales is not None:
        return _FACTORS[:0]
    if form.offset != "none" or form.levels[lowest] == -form.levels[-1]:
        return _FACTORS
    return np.concatenate([_FACTORS, _TURNED])
