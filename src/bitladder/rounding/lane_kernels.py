"""Feedback within a sub-block for many steps at once: a lane for each, so that vector instructions do all of them.

H_b = U D Uᵀ of the sub-block. Lane l has its own distance of levels size_l and value of level 0 shift_l, and rounds the
same target to its levels, one column after the other. After column k the others learn of its error:
x_jl += U_kj e_kl for all j > k.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitladder.rounding.kernels import jit
from bitladder.rounding.simd import (
    LANES,
    add_where_greater,
    eleven_bits,
    floor,
    integer,
    larger,
    load,
    multiply,
    multiply_add,
    smaller,
    splat,
    store,
    subtract,
)


class Lanes(NamedTuple):
    """What is tried, a lane for each, and what comes of it: [LANES] each, `level` and `rest` [sub · LANES].

    `scale` and `minimum` are the integers of size and shift; `level` is the level of each column, `cost` what errors
    cost; `square`, `with_target` and `with_ones` are products of levels in H_b. `rest` is scratch.
    """

    scale: npt.NDArray[np.int64]
    minimum: npt.NDArray[np.int64]
    size: npt.NDArray[np.float32]
    shift: npt.NDArray[np.float32]
    cost: npt.NDArray[np.float32]
    square: npt.NDArray[np.float32]
    with_target: npt.NDArray[np.float32]
    with_ones: npt.NDArray[np.float32]
    level: npt.NDArray[np.float32]
    rest: npt.NDArray[np.float32]


@jit
def new_lanes(sub):
    """Lanes for sub-blocks of `sub` columns."""
    return Lanes(
        np.ones(LANES, np.int64),
        np.zeros(LANES, np.int64),
        np.ones(LANES, np.float32),
        np.zeros(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(sub * LANES, np.float32),
        np.empty(sub * LANES, np.float32),
    )


@jit
def round_lanes(target, ut, d, shape, lanes):
    """Rounds target [sub] in every lane by feedback with ut [sub, sub] and d [sub]; writes level and cost."""
    rest, level = lanes.rest, lanes.level
    levels, middles = shape.levels, shape.middles
    for lane in range(LANES):
        lanes.cost[lane] = np.float32(1) / lanes.size[lane]
    inverse, size, shift = load(lanes.cost, 0), load(lanes.size, 0), load(lanes.shift, 0)
    first, half = splat(levels[0]), splat(np.float32(0.5) - levels[0])
    least, most = splat(np.float32(shape.lowest)), splat(np.float32(levels.size - 1))
    cost = splat(np.float32(0))
    for j in range(target.size):
        store(rest, j * LANES, subtract(splat(target[j]), shift))
    for j in range(target.size):
        aim = load(rest, j * LANES)
        if shape.uniform:
            place = floor(multiply_add(aim, inverse, half))
            rounded = subtract(smaller(larger(place, least), most), splat(-levels[0]))
        else:
            scaled = multiply(aim, inverse)
            rounded = first
            for k in range(middles.size):
                gap = splat(levels[k] - levels[k + 1])
                rounded = subtract(rounded, add_where_greater(scaled, splat(middles[k]), gap))
        store(level, j * LANES, rounded)
        value = multiply(rounded, size)
        miss = subtract(aim, value)
        cost = multiply_add(multiply(miss, miss), splat(d[j]), cost)
        error = subtract(subtract(splat(target[j]), shift), value)
        for k in range(j + 1, target.size):
            store(rest, k * LANES, multiply_add(splat(ut[k, j]), error, load(rest, k * LANES)))
    store(lanes.cost, 0, cost)


@jit
def quadratic_lanes(h, lanes):
    """Writes `square`, aᵀ H a of the levels a of each lane; h [sub, sub]."""
    level, total = lanes.level, splat(np.float32(0))
    for j in range(h.shape[0]):
        part = splat(np.float32(0))
        for k in range(j):
            part = multiply_add(splat(h[j, k]), load(level, k * LANES), part)
        own = load(level, j * LANES)
        part = multiply_add(splat(np.float32(0.5) * h[j, j]), own, part)
        total = multiply_add(multiply(splat(np.float32(2)), own), part, total)
    store(lanes.square, 0, total)


@jit
def dot_lanes(vector, lanes, out):
    """Writes out [LANES], the products of a vector [sub] with the levels of each lane."""
    total = splat(np.float32(0))
    for j in range(vector.size):
        total = multiply_add(splat(vector[j]), load(lanes.level, j * LANES), total)
    store(out, 0, total)


@jit
def half_lanes(numbers):
    """Rounds sixteen numbers to F16, the nearest; beyond its range to the largest that F16 has."""
    x = smaller(larger(load(numbers, 0), splat(np.float32(-65504))), splat(np.float32(65504)))
    normal = eleven_bits(x)
    fine = multiply(integer(multiply(x, splat(np.float32(2.0**24)))), splat(np.float32(2.0**-24)))
    size, least = larger(x, subtract(splat(np.float32(0)), x)), splat(np.float32(2.0**-14))
    store(numbers, 0, subtract(normal, add_where_greater(least, size, subtract(normal, fine))))
