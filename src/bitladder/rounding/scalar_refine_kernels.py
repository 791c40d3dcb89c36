"""Inner loops that change scales and indices together; see `kernels` and `scalar_kernels` for what the arrays mean.

Seen from one sub-block, with all others as they are, f is (t' − v)ᵀ H_b (t' − v) plus a constant, with
t' = v + H_b⁻¹ slope_b. That is a small rounding problem of its own, which is solved for each scale that is tried.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitladder.rounding.kernels import (
    LESS,
    add_owed,
    best_move,
    block_product,
    entry,
    half,
    inlined,
    jit,
    replace_block,
)
from bitladder.rounding.lane_kernels import LANES, dot_lanes, half_lanes, new_lanes, quadratic_lanes, round_lanes
from bitladder.rounding.scalar_kernels import descend, nearest, part_of

ROUNDS = 6  # of moves of a scale
TURNS = 2  # of rounding and fitting of a step


class Hessian(NamedTuple):
    """h [B, B] of some columns; of its diagonal blocks Uᵀ [B/sub, sub, sub], D [B/sub, sub] and inverses [B/sub, sub,
    sub]; and sums [B/sub, B] of the rows that belong to a block."""

    h: npt.NDArray[np.float32]
    ut: npt.NDArray[np.float32]
    d: npt.NDArray[np.float32]
    inverse: npt.NDArray[np.float32]
    sums: npt.NDArray[np.float32]


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
def cheapest(lanes):
    """The number of the lane of least cost."""
    best = 0
    for lane in range(LANES):
        if lanes.cost[lane] < lanes.cost[best]:
            best = lane
    return best


@inlined
def keep_levels(lanes, lane, values):
    """Copies the levels of a lane to values [sub]."""
    for j in range(values.size):
        values[j] = lanes.level[j * LANES + lane]


@inlined
def new_values(kept, size, shift, shape, indices, values):
    """Writes the indices of levels kept [sub], and what they stand for."""
    for j in range(kept.size):
        indices[j] = nearest(kept[j], shape.levels, shape.uniform, 0)
        values[j] = kept[j] * size + shift


@inlined
def set_candidates(scale, minimum, dd, mm, shape, lanes):
    """Scales and minimums near a pair: writes size and shift of each lane. Without minimums, scales of the other sign
    are among them: the other end of the levels for the largest weight."""
    limits, count = shape.limits, 0
    for way in range(2 * shape.reach + 1):
        offset = (way + 1) // 2 if way % 2 else -(way // 2)
        for turn in range(3):
            s, o = scale + offset, minimum
            if mm != 0:
                o += (0, 1, -1)[turn]
            elif turn == 1:
                s = -s
            elif turn == 2:
                continue
            if limits[0] <= s <= limits[1] and s != 0 and limits[2] <= o <= limits[3]:
                lanes.scale[count], lanes.minimum[count] = s, o
                count += 1
    for lane in range(LANES):
        if lane >= count:
            lanes.scale[lane], lanes.minimum[lane] = lanes.scale[0], lanes.minimum[0]
        lanes.size[lane] = dd * np.float32(lanes.scale[lane])
        lanes.shift[lane] = mm * np.float32(lanes.minimum[lane])


@jit
def refine_scaled(hessian, shape, row, slope, lanes):
    """Tries other integer scales for each sub-block of a row, with new indices; returns how many changed.

    Scales near the present one are tried, minimums too; as long as the best of them lies at the edge of what was
    tried, those near it are next.
    """
    sub, per, levels = shape.sub, shape.per, shape.levels
    d, m, scale, minimum, indices = row.d, row.m, row.scale, row.minimum, row.indices
    changed = 0
    target, before, after = np.empty(sub, np.float32), np.empty(sub, np.float32), np.empty(sub, np.float32)
    errors, kept = np.empty(sub, np.float32), np.empty(sub, np.float32)
    for block in range(scale.size):
        start = block * sub
        dd, mm = d[block // per], shape.sign * m[block // per]
        if dd == 0:
            continue
        size, shift = dd * np.float32(scale[block]), mm * np.float32(minimum[block])
        best_move(hessian.inverse[block], slope, start, errors)
        for j in range(sub):
            before[j] = levels[indices[start + j]] * size + shift
            target[j] = before[j] + errors[j]
        best = local_cost(hessian.ut[block], hessian.d[block], errors)
        best_scale, best_minimum = scale[block], minimum[block]
        improved = False
        for _ in range(ROUNDS):
            center_scale, center_minimum = best_scale, best_minimum
            set_candidates(center_scale, center_minimum, dd, mm, shape, lanes)
            round_lanes(target, hessian.ut[block], hessian.d[block], shape, lanes)
            lane = cheapest(lanes)
            if not lanes.cost[lane] < best * LESS:
                break
            improved = True
            best, best_scale, best_minimum = lanes.cost[lane], lanes.scale[lane], lanes.minimum[lane]
            keep_levels(lanes, lane, kept)
            if abs(abs(best_scale) - abs(center_scale)) < shape.reach and best_minimum == center_minimum:
                break
        if improved:
            size, shift = dd * np.float32(best_scale), mm * np.float32(best_minimum)
            new_values(kept, size, shift, shape, indices[start : start + sub], after)
            scale[block], minimum[block] = best_scale, best_minimum
            replace_block(hessian.h, start, before, after, row.delta, slope)
            changed += 1
    return changed


@inlined
def fit_lanes(local, h_target, sums, total, shape, lanes):
    """The best size (and shift) for the levels in each lane, rounded to F16, as the next ones to try.

    local [sub, sub] is H_b, sums [sub] what its rows add up to, total what these do, h_target [sub] H_b times the
    target. A lane whose levels say nothing keeps what it has.
    """
    quadratic_lanes(local, lanes)
    target_total = np.float32(0)
    for j in range(sums.size):
        target_total += h_target[j]
    dot_lanes(h_target, lanes, lanes.with_target)
    dot_lanes(sums, lanes, lanes.with_ones)
    for lane in range(LANES):
        aa, ta, ab = lanes.square[lane], lanes.with_target[lane], lanes.with_ones[lane]
        size, shift = lanes.size[lane], lanes.shift[lane]
        if shape.sign != 0:
            determinant = aa * total - ab * ab
            if determinant > np.float32(1e-6) * aa * total:
                size = (ta * total - target_total * ab) / determinant
                shift = (target_total * aa - ta * ab) / determinant
        elif aa > 0:
            size = ta / aa
        lanes.square[lane], lanes.with_target[lane] = size, shift
    half_lanes(lanes.square)
    half_lanes(lanes.with_target)
    for lane in range(LANES):
        if lanes.square[lane] != 0:
            lanes.size[lane], lanes.shift[lane] = lanes.square[lane], lanes.with_target[lane]


@jit
def refine_plain(hessian, shape, row, factors, slope, lanes):
    """Tries other steps for each block of a row that has a d (and m) of its own; returns how many changed.

    For each factor · d: round with feedback, fit d (and m) to the indices, and round again.
    """
    sub, sign, levels = shape.sub, shape.sign, shape.levels
    d, m, indices = row.d, row.m, row.indices
    changed = 0
    target, before, after = np.empty(sub, np.float32), np.empty(sub, np.float32), np.empty(sub, np.float32)
    errors, kept, h_target = np.empty(sub, np.float32), np.empty(sub, np.float32), np.empty(sub, np.float32)
    for block in range(d.size):
        start = block * sub
        if d[block] == 0:
            continue
        local = hessian.h[start : start + sub, start : start + sub]
        sums = hessian.sums[block, start : start + sub]
        total = np.float32(0)
        for j in range(sub):
            total += sums[j]
        best_move(hessian.inverse[block], slope, start, errors)
        for j in range(sub):
            before[j] = levels[indices[start + j]] * d[block] + sign * m[block]
            target[j] = before[j] + errors[j]
        block_product(hessian.h, start, target, h_target)
        best = local_cost(hessian.ut[block], hessian.d[block], errors)
        best_d, best_shift = d[block], sign * m[block]
        improved = False
        for first in range(0, factors.size, LANES):
            for lane in range(LANES):
                factor = factors[first + lane] if first + lane < factors.size else factors[first]
                lanes.size[lane], lanes.shift[lane] = d[block] * factor, sign * m[block]
            half_lanes(lanes.size)
            for lane in range(LANES):
                if lanes.size[lane] == 0:
                    lanes.size[lane] = d[block]
            for turn in range(TURNS):
                if turn:
                    fit_lanes(local, h_target, sums, total, shape, lanes)
                round_lanes(target, hessian.ut[block], hessian.d[block], shape, lanes)
                lane = cheapest(lanes)
                if lanes.cost[lane] < best * LESS:
                    best, best_d, best_shift = lanes.cost[lane], lanes.size[lane], lanes.shift[lane]
                    keep_levels(lanes, lane, kept)
                    improved = True
        if improved:
            new_values(kept, best_d, best_shift, shape, indices[start : start + sub], after)
            d[block], m[block] = best_d, sign * best_shift
            replace_block(hessian.h, start, before, after, row.delta, slope)
            changed += 1
    return changed


@jit
def refit(hessian, shape, row, slope):
    """Fits d (and m) of each block of a row to its indices and integer scales; returns how many changed.

    A change of d by x and of m by y changes f by a quadratic form in (x, y). Its least point, rounded to F16, is used
    if f falls there.
    """
    sign, sub, per, levels = shape.sign, shape.sub, shape.per, shape.levels
    d, m, scale, minimum, indices = row.d, row.m, row.scale, row.minimum, row.indices
    changed = 0
    width = sub * per
    a, b = np.empty(width, np.float32), np.zeros(width, np.float32)
    ha, hb = np.empty(width, np.float32), np.zeros(width, np.float32)
    before, after = np.empty(width, np.float32), np.empty(width, np.float32)
    for block in range(d.size):
        start = block * width
        aa, ab, bb, ga, gb = 0.0, 0.0, 0.0, 0.0, 0.0
        hb[:] = 0
        for part in range(per):
            at, times = part * sub, np.float32(scale[block * per + part])
            for j in range(at, at + sub):
                a[j] = levels[indices[start + j]] * times
            if sign != 0:
                amount = sign * np.float32(minimum[block * per + part])
                sums = hessian.sums[block * per + part, start : start + width]
                b[at : at + sub] = amount
                for j in range(width):
                    hb[j] += amount * sums[j]
        block_product(hessian.h, start, a, ha)
        for j in range(width):
            aa += a[j] * ha[j]
            ga += a[j] * slope[start + j]
        x, y = 0.0, 0.0
        if sign != 0:
            for j in range(width):
                ab += a[j] * hb[j]
                bb += b[j] * hb[j]
                gb += b[j] * slope[start + j]
        determinant = aa * bb - ab * ab
        if sign != 0 and determinant > 1e-6 * aa * bb:
            x = (ga * bb - gb * ab) / determinant
            y = (gb * aa - ga * ab) / determinant
        elif aa > 0:
            x = ga / aa
        new_d, new_m = half(d[block] + np.float32(x)), half(m[block] + np.float32(y))
        if sign < 0 and new_m < 0:
            new_m = np.float32(0)  # kernels accept a negative number, but no stock file has one
        x, y = float(new_d) - float(d[block]), float(new_m) - float(m[block])
        if x == 0 and y == 0:
            continue
        if x * x * aa + 2 * x * y * ab + y * y * bb - 2 * (x * ga + y * gb) >= -1e-9 * abs(x * ga + y * gb):
            continue
        for part in range(per):
            times, amount = np.float32(scale[block * per + part]), sign * np.float32(minimum[block * per + part])
            for j in range(part * sub, part * sub + sub):
                level = levels[indices[start + j]]
                before[j] = level * (d[block] * times) + m[block] * amount
                after[j] = level * (new_d * times) + new_m * amount
        if width == slope.size:
            for j in range(width):
                row.delta[j] -= after[j] - before[j]
                slope[j] -= np.float32(x) * ha[j] + np.float32(y) * hb[j]
        else:
            replace_block(hessian.h, start, before, after, row.delta, slope)
        d[block], m[block] = new_d, new_m
        changed += 1
    return changed


@entry
def change_rows(first_row, start, slopes, coupling, shifts, hessian, shape, factors, rows, refine, fit):
    """Changes columns of the rows from `first_row` on, in place in `rows`: those from `start` on.

    slopes [group, B] and coupling [group, group] are those of `method.round_in_groups`; `hessian` belongs to these B
    columns. shifts [group, B] is scratch. `factors` are of steps that are tried, for types without scales. `refine`:
    whether scales or steps are tried; `fit`: whether F16 numbers are fitted.
    """
    group, count = slopes.shape
    lanes = new_lanes(shape.sub)
    for index in range(group):
        row = part_of(rows, first_row + index, start, start + count, shape)
        slope, shift = slopes[index], shifts[index]
        add_owed(coupling, index, shifts, slope)
        shift[:] = slope
        if refine and factors.size:
            refine_plain(hessian, shape, row, factors, slope, lanes)
        elif refine:
            refine_scaled(hessian, shape, row, slope, lanes)
        if fit:
            refit(hessian, shape, row, slope)
        descend(hessian.h, shape, row, slope)
        for j in range(count):
            shift[j] = slope[j] - shift[j]
