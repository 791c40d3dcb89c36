"""Inner loops that change scales and indices together; see `kernels` and `scalar_kernels` for what the arrays mean.

Seen from one sub-block, with all others as they are, f is (t' − v)ᵀ H_b (t' − v) plus a constant, with
t' = v + H_b⁻¹ slope_b. That is a small rounding problem of its own, which is solved for each scale that is tried.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitladder.rounding.kernels import LESS, add_owed, best_move, block_product, half, inlined, jit, replace_block
from bitladder.rounding.scalar_kernels import descend, nearest, part_of

# A step with which a block costs more than this times the best is not fitted any further.
WORTH = np.float32(1.5)
ROUNDS = 6  # of moves of a scale by one


class Hessian(NamedTuple):
    """h [n, n] and of its diagonal blocks: Uᵀ [n/sub, sub, sub], D [n/sub, sub], inverses [n/sub, sub, sub]."""

    h: npt.NDArray[np.float32]
    ut: npt.NDArray[np.float32]
    d: npt.NDArray[np.float32]
    inverse: npt.NDArray[np.float32]


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
def local_feedback(target, ut, d, size, shift, shape, indices, errors, bound):
    """Feedback within one sub-block: fills indices and errors; returns the cost, or a number above `bound`."""
    total = np.float32(0)
    for j in range(target.size):
        carried = np.float32(0)
        for k in range(j):
            carried += errors[k] * ut[j, k]
        index = nearest((target[j] + carried - shift) / size, shape.levels, shape.uniform, shape.lowest)
        error = target[j] - (shape.levels[index] * size + shift)
        indices[j] = index
        errors[j] = error
        total += d[j] * (error + carried) ** 2
        if total > bound:
            return total
    return total


@jit
def refine_scaled(hessian, shape, row, slope):
    """Tries other integer scales for each sub-block of a row, with new indices; returns how many changed.

    A scale is moved by one as long as that helps, the minimum too; where there are negative scales, the sign is tried
    as well.
    """
    sub, per, limits, levels = shape.sub, shape.per, shape.limits, shape.levels
    d, m, scale, minimum, indices = row.d, row.m, row.scale, row.minimum, row.indices
    changed = 0
    target, before, after = np.empty(sub, np.float32), np.empty(sub, np.float32), np.empty(sub, np.float32)
    errors = np.empty(sub, np.float32)
    trial, best_indices = np.empty(sub, np.uint8), np.empty(sub, np.uint8)
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
            best_indices[j] = indices[start + j]
        best = local_cost(hessian.ut[block], hessian.d[block], errors)
        best_scale, best_minimum = scale[block], minimum[block]
        center_scale, center_minimum = best_scale, best_minimum
        improved = False
        for step in range(ROUNDS):
            for way in range(12):
                if step > 0 and (way == 4 or way > 8):
                    continue
                if way < 9:
                    s, o = center_scale + way // 3 - 1, center_minimum + way % 3 - 1
                    if mm == 0 and way % 3 != 1:
                        continue
                else:  # the other end of the levels for the largest weight
                    s, o = -(center_scale + way - 10), center_minimum
                if s < limits[0] or s > limits[1] or s == 0 or o < limits[2] or o > limits[3]:
                    continue
                cost = local_feedback(
                    target, hessian.ut[block], hessian.d[block], dd * np.float32(s), mm * np.float32(o), shape, trial,
                    errors, best * LESS,
                )  # fmt: skip
                if cost < best * LESS:
                    best, best_scale, best_minimum = cost, s, o
                    best_indices[:] = trial
                    improved = True
            if best_scale == center_scale and best_minimum == center_minimum:
                break
            center_scale, center_minimum = best_scale, best_minimum
        if improved:
            size, shift = dd * np.float32(best_scale), mm * np.float32(best_minimum)
            for j in range(sub):
                after[j] = levels[best_indices[j]] * size + shift
                indices[start + j] = best_indices[j]
            scale[block], minimum[block] = best_scale, best_minimum
            replace_block(hessian.h, start, before, after, row.delta, slope)
            changed += 1
    return changed


@jit
def refine_plain(hessian, shape, row, factors, slope):
    """Tries other steps for each block of a row that has a d (and m) of its own; returns how many changed.

    For each factor · d: round with feedback, fit d (and m) to the indices, and round again.
    """
    sub, sign, levels = shape.sub, shape.sign, shape.levels
    d, m, indices = row.d, row.m, row.indices
    changed = 0
    target, before, after = np.empty(sub, np.float32), np.empty(sub, np.float32), np.empty(sub, np.float32)
    errors, a = np.empty(sub, np.float32), np.empty(sub, np.float32)
    trial, best_indices = np.empty(sub, np.uint8), np.empty(sub, np.uint8)
    for block in range(d.size):
        start = block * sub
        if d[block] == 0:
            continue
        local = hessian.h[start : start + sub, start : start + sub]
        best_move(hessian.inverse[block], slope, start, errors)
        for j in range(sub):
            before[j] = levels[indices[start + j]] * d[block] + sign * m[block]
            target[j] = before[j] + errors[j]
            best_indices[j] = indices[start + j]
        best = local_cost(hessian.ut[block], hessian.d[block], errors)
        best_d, best_m = d[block], m[block]
        improved = False
        for factor in factors:
            size, shift = half(d[block] * factor), m[block]
            for turn in range(3):
                cost = local_feedback(
                    target, hessian.ut[block], hessian.d[block], size, sign * shift, shape, trial, errors, best * WORTH
                )
                if cost > best * WORTH:
                    break
                if cost < best * LESS:
                    best, best_d, best_m = cost, size, shift
                    best_indices[:] = trial
                    improved = True
                if turn == 2:
                    break
                # The best d and m for these indices.
                aa, ab, bb, ta, tb = 0.0, 0.0, 0.0, 0.0, 0.0
                for j in range(sub):
                    a[j] = levels[trial[j]]
                for j in range(sub):
                    ha, hb, ht = 0.0, 0.0, 0.0
                    for k in range(sub):
                        ha += local[j, k] * a[k]
                        hb += local[j, k]
                        ht += local[j, k] * target[k]
                    aa += a[j] * ha
                    ab += a[j] * hb
                    bb += hb
                    ta += a[j] * ht
                    tb += ht
                if aa <= 0:
                    break
                if sign != 0:
                    determinant = aa * bb - ab * ab
                    if determinant <= 1e-6 * aa * bb:
                        break
                    new, other = (ta * bb - tb * ab) / determinant, (tb * aa - ta * ab) / determinant
                else:
                    new, other = ta / aa, 0.0
                new_size, new_shift = half(np.float32(new)), half(np.float32(sign * other))
                if new_size == 0 or (new_size == size and new_shift == shift):
                    break
                size, shift = new_size, new_shift
        if improved:
            for j in range(sub):
                after[j] = levels[best_indices[j]] * best_d + sign * best_m
                indices[start + j] = best_indices[j]
            d[block], m[block] = best_d, best_m
            replace_block(hessian.h, start, before, after, row.delta, slope)
            changed += 1
    return changed


@jit
def refit(h, shape, row, slope):
    """Fits d (and m) of each block of a row to its indices and integer scales; returns how many changed.

    A change of d by x and of m by y changes f by a quadratic form in (x, y). Its least point, rounded to F16, is used
    if f falls there.
    """
    sign = shape.sign
    d, m, scale, minimum, indices = row.d, row.m, row.scale, row.minimum, row.indices
    changed = 0
    width = shape.sub * shape.per
    a, b = np.empty(width, np.float32), np.empty(width, np.float32)
    ha, hb = np.empty(width, np.float32), np.empty(width, np.float32)
    before, after = np.empty(width, np.float32), np.empty(width, np.float32)
    for block in range(d.size):
        start = block * width
        aa, ab, bb, ga, gb = 0.0, 0.0, 0.0, 0.0, 0.0
        for j in range(width):
            part = (start + j) // shape.sub
            a[j] = shape.levels[indices[start + j]] * np.float32(scale[part])
            b[j] = sign * np.float32(minimum[part])
        block_product(h, start, a, ha)
        if sign != 0:
            block_product(h, start, b, hb)
        for j in range(width):
            aa += a[j] * ha[j]
            ga += a[j] * slope[start + j]
            if sign != 0:
                ab += a[j] * hb[j]
                bb += b[j] * hb[j]
                gb += b[j] * slope[start + j]
        x, y = 0.0, 0.0
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
        for j in range(width):
            part = (start + j) // shape.sub
            before[j] = shape.levels[indices[start + j]] * (d[block] * np.float32(scale[part])) + sign * (
                m[block] * np.float32(minimum[part])
            )
            after[j] = shape.levels[indices[start + j]] * (new_d * np.float32(scale[part])) + sign * (
                new_m * np.float32(minimum[part])
            )
        d[block], m[block] = new_d, new_m
        replace_block(h, start, before, after, row.delta, slope)
        changed += 1
    return changed


@jit
def change_rows(first_row, start, slopes, coupling, shifts, hessian, shape, factors, rows, scales):
    """Changes columns of the rows from `first_row` on, in place in `rows`: those from `start` on.

    slopes [group, B] and coupling [group, group] are those of `method.round_in_groups`; `hessian` belongs to these B
    columns. shifts [group, B] is scratch. `factors` are of steps that are tried, for types without scales. `scales`:
    whether more than indices change.
    """
    group, count = slopes.shape
    for index in range(group):
        row = part_of(rows, first_row + index, start, start + count, shape)
        slope, shift = slopes[index], shifts[index]
        add_owed(coupling, index, shifts, slope)
        shift[:] = slope
        if scales:
            if factors.size:
                refine_plain(hessian, shape, row, factors, slope)
            else:
                refine_scaled(hessian, shape, row, slope)
            refit(hessian.h, shape, row, slope)
        descend(hessian.h, shape, row, slope)
        for j in range(count):
            shift[j] = slope[j] - shift[j]
