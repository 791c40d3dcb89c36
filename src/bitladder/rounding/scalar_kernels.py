"""Rounding of rows to types with an index for each weight: feedback, and descent on indices; see `kernels`.

H = U D Uᵀ with U unit upper triangular turns f into Σ_j D_j (delta_j + Σ_{k<j} delta_k U_kj)². Rounding column j to
t_j + Σ_{k<j} delta_k U_kj makes each term as small as it can be once the columns before it are settled (LDLQ,
arXiv 2307.13304, which is GPTQ, 2210.17323). `ut` is Uᵀ, so that what column j needs lies in one row.

Example:
    >>> nearest(np.float32(2.6), np.arange(-4, 4, dtype=np.float32), True, 0)
    7
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitladder.rounding.kernels import add_owed, entry, inlined, jit, moved
from bitladder.rounding.scalar_types import ScalarType


class Shape(NamedTuple):
    """A type, for kernels: `sub` columns share a scale, `per` sub-blocks a block.

    `levels` float32 [K] are consecutive integers if `uniform`, `middles` [K − 1] lie between them; the first index that
    is used is `lowest`. `sign` is of the offset. `limits` int64 [4]: least and greatest scale, least and greatest
    minimum; scales are moved by up to `reach` at once.
    """

    sub: int
    per: int
    levels: npt.NDArray[np.float32]
    middles: npt.NDArray[np.float32]
    uniform: bool
    lowest: int
    sign: np.float32
    limits: npt.NDArray[np.int64]
    reach: int


def shape_of(kind: ScalarType) -> Shape:
    """The shape of a type. With minimums, pairs near the present one are as many as lanes if scales move by 2."""
    limits = np.array([*kind.scales, *kind.minimums], np.int64)
    middles = ((kind.levels[1:] + kind.levels[:-1]) / 2).astype(np.float32)
    per, reach = kind.block // kind.sub, 2 if kind.sign else 3
    return Shape(
        kind.sub, per, kind.levels, middles, kind.uniform, kind.lowest, np.float32(kind.sign), limits, reach
    )  # fmt: skip


class Rows(NamedTuple):
    """Rows that are being rounded: the parts of `ScalarBlocks`, and delta [rows, n]; or one row of each."""

    d: npt.NDArray[np.float32]
    m: npt.NDArray[np.float32]
    scale: npt.NDArray[np.int16]
    minimum: npt.NDArray[np.int16]
    indices: npt.NDArray[np.uint8]
    delta: npt.NDArray[np.float32]


@inlined
def nearest(x, levels, uniform, lowest):
    """Index of the level nearest to x, not below `lowest`."""
    last = levels.size - 1
    if uniform:
        position = np.floor(x - levels[0] + np.float32(0.5))
        if not position > lowest:  # NaN too
            return lowest
        return last if position > last else int(position)
    low, high = lowest, last
    while high - low > 1:
        middle = (low + high) // 2
        if x < levels[middle]:
            high = middle
        else:
            low = middle
    return low if x - levels[low] <= levels[high] - x else high


@jit
def part_of(rows, row, start, stop, shape):
    """The columns start … stop−1 of one row of `Rows`."""
    sub, block = shape.sub, shape.sub * shape.per
    return Rows(
        rows.d[row, start // block : stop // block],
        rows.m[row, start // block : stop // block],
        rows.scale[row, start // sub : stop // sub],
        rows.minimum[row, start // sub : stop // sub],
        rows.indices[row, start:stop],
        rows.delta[row, start:stop],
    )


@inlined
def step_of(row, shape, block):
    """The distance of levels in a sub-block of a row, and the value of level 0."""
    whole = block // shape.per
    return (
        row.d[whole] * np.float32(row.scale[block]),
        shape.sign * (row.m[whole] * np.float32(row.minimum[block])),
    )


@jit
def feedback(targets, carried, ut, columns, shape, row, errors):
    """Rounds some columns of a row one after the other, each to what the errors before it ask for.

    columns [B] are their numbers, in the order of rounding; targets [B] what they should be; carried [B] what the
    errors of columns before these ask for; ut [B, B] belongs to these. Writes the indices of `row` and errors [B].
    """
    for place in range(columns.size):
        column = columns[place]
        aim = targets[place]
        pull = carried[place]
        factors = ut[place]
        for k in range(place):
            pull += factors[k] * errors[k]
        size, shift = step_of(row, shape, column // shape.sub)
        if size != 0:
            row.indices[column] = nearest((aim + pull - shift) / size, shape.levels, shape.uniform, shape.lowest)
        errors[place] = aim - (shape.levels[row.indices[column]] * size + shift)


@jit
def descend(h, shape, row, slope):
    """One pass of coordinate descent on a row's indices; returns how many changed. f never rises."""
    changed = 0
    for column in range(row.delta.size):
        size, shift = step_of(row, shape, column // shape.sub)
        weight = h[column, column]
        if size == 0 or weight <= 0:
            continue
        now = shape.levels[row.indices[column]] * size + shift
        index = nearest((now + slope[column] / weight - shift) / size, shape.levels, shape.uniform, shape.lowest)
        if index == row.indices[column]:
            continue
        change = shape.levels[index] * size + shift - now
        # Rounding may mislead: the level must really be better.
        if change * (change * weight - 2 * slope[column]) >= 0:
            continue
        row.indices[column] = index
        row.delta[column] -= change
        moved(h, column, change, slope)
        changed += 1
    return changed


@entry
def open_rows(weights, first_row, targets, carried, leading, ut, columns, shape, rows, errors):
    """Rounds some columns of the rows from `first_row` on for the first time, in place in `rows`.

    targets [group, B], carried [group, B] and columns [B] are as for `feedback`, leading [group, group] as in
    `method.round_in_groups`. Writes errors [group, B].
    """
    group, count = targets.shape
    deltas = np.empty((group, count), np.float32)
    for index in range(group):
        row = first_row + index
        target = targets[index]
        add_owed(leading, index, deltas, target)
        whole = part_of(rows, row, 0, rows.delta.shape[1], shape)
        feedback(target, carried[index], ut, columns, shape, whole, errors[index])
        for place in range(count):
            column = columns[place]
            deltas[index, place] = errors[index, place] - target[place] + weights[row, column]
            whole.delta[column] = deltas[index, place]
