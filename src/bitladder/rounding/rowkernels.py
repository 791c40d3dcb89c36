"""The inner loops of rounding, one row at a time, compiled by numba.

All of them lower f = (t − v)ᵀ H (t − v) for one row: t what it should be, v what the format can say, H the second
moments of the input. `delta` is t − v and `slope` is H · delta, half of −∂f/∂v. Later passes only ever move the two
along with v, and their delta may be w − v, where t is the weight w and what the row owes to others.

H = U D Uᵀ with U unit upper triangular turns f into Σ_j D_j (delta_j + Σ_{k<j} delta_k U_kj)²: rounding column j to
t_j + Σ_{k<j} delta_k U_kj makes each term as small as it can be once the columns before it are settled (LDLQ,
arXiv 2307.13304, which is GPTQ, 2210.17323). `ut` is Uᵀ, so that what column j needs lies in one row.
"""

from typing import Any

import numba
import numpy as np

_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
jit = numba.njit(**_OPTIONS)
inlined = numba.njit(inline="always", **_OPTIONS)


@inlined
def nearest(x, levels, uniform, first):
    """Index of the level next to x, not below `first`."""
    last = levels.size - 1
    if uniform:
        position = np.floor(x - levels[0] + np.float32(0.5))
        if not position > first:  # NaN too
            return first
        return last if position > last else int(position)
    low, high = first, last
    while high - low > 1:
        middle = (low + high) // 2
        if x < levels[middle]:
            high = middle
        else:
            low = middle
    return low if x - levels[low] <= levels[high] - x else high


@jit
def half(x):
    """x rounded to F16, as float32; beyond its range the largest number there is."""
    size = abs(x)
    if size < 6.103515625e-05:
        return np.float32(np.rint(x * 16777216.0) / 16777216.0)
    if size >= 65504.0:
        return np.float32(np.copysign(65504.0, x))
    exponent = np.floor(np.log2(size))
    unit = 2.0 ** (exponent - 10)
    if size / unit < 1024.0:  # log2 was a little too high
        unit *= 0.5
    return np.float32(np.rint(x / unit) * unit)


@jit
def feedback(target, ut, order, step, offset, sub, levels, uniform, first, indices, delta):
    """Round a row column by column in the given order, each to what the errors before it ask for.

    target, delta [n]; ut [n, n] and the errors handed on are in the order of `order`; step, offset [n/sub].
    Writes `indices` and `delta`.
    """
    n = target.size
    errors = np.empty(n, np.float32)
    for place in range(n):
        column = order[place]
        wanted = target[column]
        carried = np.float32(0)
        row = ut[place]
        for k in range(place):
            carried += row[k] * errors[k]
        block = column // sub
        size = step[block]
        if size != 0:
            indices[column] = nearest((wanted + carried - offset[block]) / size, levels, uniform, first)
        value = levels[indices[column]] * size + offset[block]
        errors[place] = wanted - value
        delta[column] = wanted - value


@inlined
def moved(h, column, change, slope):
    """The slope after v_column has grown by `change`."""
    row = h[column]
    for j in range(slope.size):
        slope[j] -= change * row[j]


@jit
def descend(h, step, offset, sub, levels, uniform, first, indices, delta, slope):
    """One pass of coordinate descent on a row's indices; returns how many changed. f never rises."""
    changed = 0
    for column in range(delta.size):
        block = column // sub
        size = step[block]
        weight = h[column, column]
        if size == 0 or weight <= 0:
            continue
        now = levels[indices[column]] * size + offset[block]
        index = nearest((now + slope[column] / weight - offset[block]) / size, levels, uniform, first)
        if index == indices[column]:
            continue
        change = levels[index] * size + offset[block] - now
        # Rounding may lie: the level must really be better.
        if change * (change * weight - 2 * slope[column]) >= 0:
            continue
        indices[column] = index
        delta[column] -= change
        moved(h, column, change, slope)
        changed += 1
    return changed


@inlined
def local_cost(ut, d, errors):
    """eᵀ H e of one sub-block through its factors: ut [sub, sub], d [sub]."""
    total = np.float32(0)
    for j in range(errors.size):
        part = errors[j]
        for k in range(j):
            part += errors[k] * ut[j, k]
        total += d[j] * part * part
    return total


@inlined
def local_feedback(target, ut, d, size, shift, levels, uniform, first, indices, errors, bound):
    """Feedback within one sub-block: fills indices and errors; returns the cost, or a number above `bound`."""
    total = np.float32(0)
    for j in range(target.size):
        carried = np.float32(0)
        for k in range(j):
            carried += errors[k] * ut[j, k]
        index = nearest((target[j] + carried - shift) / size, levels, uniform, first)
        error = target[j] - (levels[index] * size + shift)
        indices[j] = index
        errors[j] = error
        total += d[j] * (error + carried) ** 2
        if total > bound:
            return total
    return total
