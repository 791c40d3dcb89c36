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

from bitladder.rounding.kernels import add_owed, inlined, jit, moved


class Shape(NamedTuple):
    """A type, for kernels: `sub` columns share a scale, `per` sub-blocks a block.

    `levels` float32 [K] are consecutive integers if `uniform`; the first index that is used is `lowest`. `sign` is of
    the offset. `limits` int64 [4]: least and greatest scale, least and greatest minimum.
    """

    sub: int
    per: int
    levels: npt.NDArray[np.float32]
    uniform: bool
    lowest: int
    sign: np.float32
    limits: npt.NDArray[np.int64]


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
def row_of(rows, row):
    """One row of `Rows`."""
    return Rows(rows.d[row], rows.m[row], rows.scale[row], rows.minimum[row], rows.indices[row], rows.delta[row])


@jit
def set_steps(row, shape, step, offset):
    """Writes the distance of levels and the value of level 0, [n/sub] each, of a row."""
    for block in range(step.size):
        step[block] = row.d[block // shape.per] * np.float32(row.scale[block])
        offset[block] = shape.sign * (row.m[block // shape.per] * np.float32(row.minimum[block]))


@jit
def feedback(target, ut, order, step, offset, shape, row):
    """Rounds a row column by column in the given order, each to what the errors before it ask for.

    target [n]; ut [n, n] and the errors handed on are in the order of `order`; step, offset [n/sub]. Writes indices and
    delta.
    """
    n = target.size
    errors = np.empty(n, np.float32)
    for place in range(n):
        column = order[place]
        aim = target[column]
        carried = np.float32(0)
        factors = ut[place]
        for k in range(place):
            carried += factors[k] * errors[k]
        block = column // shape.sub
        size = step[block]
        if size != 0:
            row.indices[column] = nearest(
                (aim + carried - offset[block]) / size, shape.levels, shape.uniform, shape.lowest
            )
        value = shape.levels[row.indices[column]] * size + offset[block]
        errors[place] = aim - value
        row.delta[column] = aim - value


@jit
def descend(h, step, offset, shape, row, slope):
    """One pass of coordinate descent on a row's indices; returns how many changed. f never rises."""
    changed = 0
    for column in range(row.delta.size):
        block = column // shape.sub
        size = step[block]
        weight = h[column, column]
        if size == 0 or weight <= 0:
            continue
        now = shape.levels[row.indices[column]] * size + offset[block]
        index = nearest(
            (now + slope[column] / weight - offset[block]) / size, shape.levels, shape.uniform, shape.lowest
        )
        if index == row.indices[column]:
            continue
        change = shape.levels[index] * size + offset[block] - now
        # Rounding may mislead: the level must really be better.
        if change * (change * weight - 2 * slope[column]) >= 0:
            continue
        row.indices[column] = index
        row.delta[column] -= change
        moved(h, column, change, slope)
        changed += 1
    return changed


@jit
def open_rows(weights, first_row, targets, leading, ut, order, shape, rows):
    """Rounds rows from `first_row` on for the first time, in place in the indices and delta of `rows`.

    targets [group, n] and leading [group, group] are those of `method.round_in_groups`.
    """
    step, offset = np.empty(rows.scale.shape[1], np.float32), np.empty(rows.scale.shape[1], np.float32)
    for index in range(targets.shape[0]):
        target = targets[index]
        row = row_of(rows, first_row + index)
        add_owed(leading, index, rows.delta[first_row:], target)
        set_steps(row, shape, step, offset)
        feedback(target, ut, order, step, offset, shape, row)
        for j in range(target.size):
            row.delta[j] -= target[j] - weights[first_row + index, j]
