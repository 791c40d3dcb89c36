"""The innermost loops of rounding to points of a grid, compiled by numba.

A few columns are chosen together: of all points and signs, the pair that makes |r − T v|² least. v is the signed point,
in units of the step. T is a lower triangle, a diagonal block of a factor of H: TᵀT is the part of H that belongs to
these columns alone, and r = T · the values that v should have.
"""

from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from bitladder.rounding.kernels import COMPILED, jit

fast = numba.njit(forceinline=True, **COMPILED, fastmath=True)  # finite numbers only

# Both signs are tried of columns that should be nearly 0, of so many columns at most.
AMBIGUOUS = 4


class Points(NamedTuple):
    """A grid, for kernels.

    `points` float32 [group, K]; `unit` columns are chosen together; `even`: with an even number of minuses. Both signs
    are tried of columns that should be nearer to 0 than `hold`. `costs` float32 [K] is scratch, `keys` int32 the same
    memory.
    """

    points: npt.NDArray[np.float32]
    unit: int
    even: bool
    hold: np.float32
    costs: npt.NDArray[np.float32]
    keys: npt.NDArray[np.int32]


@fast
def _costs_of_4(r, t, s, points, costs):
    """|r − T diag(s) p|² for each point p; points [4, K]."""
    r0, r1, r2, r3 = r[0], r[1], r[2], r[3]
    t00 = t[0, 0] * s[0]
    t10, t11 = t[1, 0] * s[0], t[1, 1] * s[1]
    t20, t21, t22 = t[2, 0] * s[0], t[2, 1] * s[1], t[2, 2] * s[2]
    t30, t31, t32, t33 = t[3, 0] * s[0], t[3, 1] * s[1], t[3, 2] * s[2], t[3, 3] * s[3]
    p0, p1, p2, p3 = points[0], points[1], points[2], points[3]
    for k in range(costs.size):
        a, b, c, d = p0[k], p1[k], p2[k], p3[k]
        e0 = r0 - t00 * a
        e1 = r1 - t10 * a - t11 * b
        e2 = r2 - t20 * a - t21 * b - t22 * c
        e3 = r3 - t30 * a - t31 * b - t32 * c - t33 * d
        costs[k] = e0 * e0 + e1 * e1 + e2 * e2 + e3 * e3


@fast
def _costs_of_8(r, t, s, points, costs):
    """The same for points [8, K]: the first four columns, then what they leave to each of the others."""
    _costs_of_4(r[:4], t[:4, :4], s[:4], points[:4], costs)
    p0, p1, p2, p3 = points[0], points[1], points[2], points[3]
    p4, p5, p6, p7 = points[4], points[5], points[6], points[7]
    s0, s1, s2, s3, s4, s5, s6, s7 = s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]
    r4, r5, r6, r7 = r[4], r[5], r[6], r[7]
    a0, a1, a2, a3, a4 = t[4, 0] * s0, t[4, 1] * s1, t[4, 2] * s2, t[4, 3] * s3, t[4, 4] * s4
    b0, b1, b2, b3, b4 = t[5, 0] * s0, t[5, 1] * s1, t[5, 2] * s2, t[5, 3] * s3, t[5, 4] * s4
    c0, c1, c2, c3, c4 = t[6, 0] * s0, t[6, 1] * s1, t[6, 2] * s2, t[6, 3] * s3, t[6, 4] * s4
    d0, d1, d2, d3, d4 = t[7, 0] * s0, t[7, 1] * s1, t[7, 2] * s2, t[7, 3] * s3, t[7, 4] * s4
    b5, c5, d5 = t[5, 5] * s5, t[6, 5] * s5, t[7, 5] * s5
    c6, d6, d7 = t[6, 6] * s6, t[7, 6] * s6, t[7, 7] * s7
    for k in range(costs.size):
        g0, g1, g2, g3, g4, g5, g6, g7 = p0[k], p1[k], p2[k], p3[k], p4[k], p5[k], p6[k], p7[k]
        e4 = r4 - a0 * g0 - a1 * g1 - a2 * g2 - a3 * g3 - a4 * g4
        e5 = r5 - b0 * g0 - b1 * g1 - b2 * g2 - b3 * g3 - b4 * g4 - b5 * g5
        e6 = r6 - c0 * g0 - c1 * g1 - c2 * g2 - c3 * g3 - c4 * g4 - c5 * g5 - c6 * g6
        e7 = r7 - d0 * g0 - d1 * g1 - d2 * g2 - d3 * g3 - d4 * g4 - d5 * g5 - d6 * g6 - d7 * g7
        costs[k] += e4 * e4 + e5 * e5 + e6 * e6 + e7 * e7


@jit
def _least(keys):
    """The place of the least number. Costs are not negative: their bits, read as integers, have the same order."""
    best = keys[0]
    for k in range(keys.size):
        best = min(best, keys[k])
    for k in range(keys.size):
        if keys[k] == best:
            return k
    return 0


@jit
def search(r, t, grid, parity, values):
    """The best point and signs of one group; returns its index and its cost and writes `values`.

    r, values [group]; t [group, group]; parity: of the number of minuses, or −1 for any.
    """
    points, hold, costs, keys = grid.points, grid.hold, grid.costs, grid.keys
    group = r.size
    signs, aims = np.empty(group, np.float32), np.empty(group, np.float32)
    tried = np.empty(group, np.int64)
    minuses = 0
    for j in range(group):
        x = r[j]
        for i in range(j):
            x -= t[j, i] * aims[i]
        aims[j] = x / t[j, j]
        signs[j] = np.float32(-1) if aims[j] < 0 else np.float32(1)
        minuses += aims[j] < 0
    count = 0
    while count < min(group, AMBIGUOUS):
        least = -1
        for j in range(group):
            new = True
            for i in range(count):
                new &= tried[i] != j
            if new and (least < 0 or abs(aims[j]) < abs(aims[least])):
                least = j
        # A fixed parity needs a column or two that can give way.
        if abs(aims[least]) >= hold and not (parity >= 0 and count < 2):
            break
        tried[count] = least
        count += 1
    best, index, pattern, now = np.float32(np.inf), 0, 0, 0
    for step in range(1 << count):
        # One sign changes from each step to the next (Gray's code).
        if step > 0:
            bit = 0
            while not (step >> bit) & 1:
                bit += 1
            now ^= 1 << bit
            j = tried[bit]
            minuses += 1 if signs[j] > 0 else -1
            signs[j] = -signs[j]
        if parity >= 0 and (minuses & 1) != parity:
            continue
        if group == 4:
            _costs_of_4(r, t, signs, points, costs)
        else:
            _costs_of_8(r, t, signs, points, costs)
        k = _least(keys)
        if costs[k] < best:
            best, index, pattern = costs[k], k, now
    for bit in range(count):
        j = tried[bit]
        if ((pattern ^ now) >> bit) & 1:
            signs[j] = -signs[j]
    for j in range(group):
        values[j] = signs[j] * points[j, index]
    return index, best


@jit
def choose(r, t, grid, codes, values):
    """The best points and signs of the columns of a unit; returns the cost, writes codes and values.

    r, values [unit]; t [unit, unit]; codes [unit/group]. Two groups that share a parity are chosen one after the other,
    with either parity.
    """
    group = grid.points.shape[0]
    if r.size == group:
        index, cost = search(r, t, grid, 0 if grid.even else -1, values)
        codes[0] = index
        return cost
    best = np.float32(np.inf)
    rest, trial = np.empty(group, np.float32), np.empty(2 * group, np.float32)
    for parity in range(2):
        first, cost = search(r[:group], t[:group, :group], grid, parity, trial[:group])
        if cost >= best:
            continue
        for j in range(group):
            rest[j] = r[group + j]
            for i in range(group):
                rest[j] -= t[group + j, i] * trial[i]
        second, more = search(rest, t[group:, group:], grid, parity, trial[group:])
        if cost + more < best:
            best = cost + more
            codes[0], codes[1] = first, second
            values[:] = trial
    return best


@jit
def choose_block(aims, t, size, grid, bound, codes, values):
    """Chooses the points of a sub-block with a given step, unit by unit; returns the cost, or a number above `bound`.

    aims [sub] = T · what the weights should be; t [sub, sub]; codes [sub/group], values [sub] are written.
    """
    group, unit = grid.points.shape[0], grid.unit
    r = np.empty(unit, np.float32)
    total = np.float32(0)
    for at in range(0, aims.size, unit):
        for j in range(unit):
            x = aims[at + j] / size
            for k in range(at):
                x -= t[at + j, k] * values[k]
            r[j] = x
        stop = at + unit
        cost = choose(r, t[at:stop, at:stop], grid, codes[at // group : stop // group], values[at:stop])
        total += size * size * cost
        if total > bound:
            break
    return total
