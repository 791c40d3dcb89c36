"""Inner loops that change scales and indices together; see rowkernels for what the arrays mean.

Seen from one sub-block, with all others as they are, f is (t' − v)ᵀ H_b (t' − v) plus a constant, with
t' = v + H_b⁻¹ slope_b. That is a small rounding problem of its own, which is solved for each scale that is tried.
"""

import numpy as np

from bitladder.rounding.rowkernels import half, jit, local_cost, local_feedback, moved

# A scale must be better by this share, or rounding errors might go round in circles.
LESS = np.float32(1 - 1e-5)
# A step with which a block costs more than this times the best is not fitted any further.
WORTH = np.float32(1.5)


@jit
def _replace(h, start, before, after, delta, slope):
    for j in range(before.size):
        change = after[j] - before[j]
        if change != 0:
            delta[start + j] -= change
            moved(h, start + j, change, slope)


@jit
def refine_scaled(
    h, hut, hd, hinverse, d, m, sign, scale, minimum, limits, sub, per, levels, uniform, first, indices, delta, slope
):
    """Try other integer scales for each sub-block of a row, with new indices; returns how many changed.

    hut, hinverse [n/sub, sub, sub], hd [n/sub, sub]: factors and inverses of H's diagonal blocks. d, m [n/block];
    scale, minimum [n/sub]; limits (lowest and highest scale, lowest and highest minimum). A scale is moved by one as
    long as that helps, the minimum too; where there are negative ones, the sign is tried as well.
    """
    changed = 0
    target, before, after = np.empty(sub, np.float32), np.empty(sub, np.float32), np.empty(sub, np.float32)
    errors = np.empty(sub, np.float32)
    trial, best_indices = np.empty(sub, np.uint8), np.empty(sub, np.uint8)
    for block in range(scale.size):
        start = block * sub
        dd, mm = d[block // per], sign * m[block // per]
        if dd == 0:
            continue
        size, shift = dd * np.float32(scale[block]), mm * np.float32(minimum[block])
        inverse = hinverse[block]
        for j in range(sub):
            before[j] = levels[indices[start + j]] * size + shift
            amount = np.float32(0)
            for k in range(sub):
                amount += inverse[j, k] * slope[start + k]
            target[j] = before[j] + amount
            errors[j] = amount
            best_indices[j] = indices[start + j]
        best = local_cost(hut[block], hd[block], errors)
        best_scale, best_minimum = scale[block], minimum[block]
        center_scale, center_minimum = best_scale, best_minimum
        improved = False
        for step in range(6):
            moves = 0
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
                    target, hut[block], hd[block], dd * np.float32(s), mm * np.float32(o), levels, uniform, first,
                    trial, errors, best * LESS,
                )  # fmt: skip
                if cost < best * LESS:
                    best, best_scale, best_minimum = cost, s, o
                    best_indices[:] = trial
                    improved = True
                    moves += 1
            if best_scale == center_scale and best_minimum == center_minimum:
                break
            center_scale, center_minimum = best_scale, best_minimum
        if improved:
            size, shift = dd * np.float32(best_scale), mm * np.float32(best_minimum)
            for j in range(sub):
                after[j] = levels[best_indices[j]] * size + shift
                indices[start + j] = best_indices[j]
            scale[block], minimum[block] = best_scale, best_minimum
            _replace(h, start, before, after, delta, slope)
            changed += 1
    return changed


@jit
def _products(h, start, a, out):
    """out = H_s a over one block."""
    for j in range(a.size):
        row = h[start + j]
        total = np.float32(0)
        for k in range(a.size):
            total += row[start + k] * a[k]
        out[j] = total


@jit
def refit(h, d, m, sign, scale, minimum, sub, per, levels, indices, delta, slope):
    """Best d (and m) of each block of a row for its indices and integer scales; returns how many changed.

    A change of d by x and of m by y changes f by a quadratic form in (x, y), whose least point is taken, rounded to
    F16, if f falls there.
    """
    changed = 0
    width = sub * per
    a, b = np.empty(width, np.float32), np.empty(width, np.float32)
    ha, hb = np.empty(width, np.float32), np.empty(width, np.float32)
    before, after = np.empty(width, np.float32), np.empty(width, np.float32)
    for block in range(d.size):
        start = block * width
        aa, ab, bb, ga, gb = 0.0, 0.0, 0.0, 0.0, 0.0
        for j in range(width):
            part = (start + j) // sub
            a[j] = levels[indices[start + j]] * np.float32(scale[part])
            b[j] = sign * np.float32(minimum[part])
        _products(h, start, a, ha)
        if sign != 0:
            _products(h, start, b, hb)
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
        if sign == 0 and aa > 0:
            x = ga / aa
        new_d, new_m = half(d[block] + np.float32(x)), half(m[block] + np.float32(y))
        if sign < 0 and new_m < 0:
            new_m = np.float32(0)  # kernels take it for a number of its own, but stock files have none below 0
        x, y = float(new_d) - float(d[block]), float(new_m) - float(m[block])
        if x == 0 and y == 0:
            continue
        if x * x * aa + 2 * x * y * ab + y * y * bb - 2 * (x * ga + y * gb) >= -1e-9 * abs(x * ga + y * gb):
            continue
        for j in range(width):
            part = (start + j) // sub
            before[j] = levels[indices[start + j]] * (d[block] * np.float32(scale[part])) + sign * (
                m[block] * np.float32(minimum[part])
            )
            after[j] = levels[indices[start + j]] * (new_d * np.float32(scale[part])) + sign * (
                new_m * np.float32(minimum[part])
            )
        d[block], m[block] = new_d, new_m
        _replace(h, start, before, after, delta, slope)
        changed += 1
    return changed


@jit
def refine_plain(h, hut, hd, hinverse, d, m, sign, factors, sub, levels, uniform, first, indices, delta, slope):
    """Try other steps for each block of a row that has a d (and m) of its own; returns how many changed.

    Each factor · d is rounded to with feedback, then d (and m) are fitted to the indices, then rounded to again.
    """
    changed = 0
    target, before, after = np.empty(sub, np.float32), np.empty(sub, np.float32), np.empty(sub, np.float32)
    errors, a = np.empty(sub, np.float32), np.empty(sub, np.float32)
    trial, best_indices = np.empty(sub, np.uint8), np.empty(sub, np.uint8)
    for block in range(d.size):
        start = block * sub
        if d[block] == 0:
            continue
        inverse = hinverse[block]
        local = h[start : start + sub, start : start + sub]
        for j in range(sub):
            before[j] = levels[indices[start + j]] * d[block] + sign * m[block]
            amount = np.float32(0)
            for k in range(sub):
                amount += inverse[j, k] * slope[start + k]
            target[j] = before[j] + amount
            errors[j] = amount
            best_indices[j] = indices[start + j]
        best = local_cost(hut[block], hd[block], errors)
        best_d, best_m = d[block], m[block]
        improved = False
        for factor in factors:
            size, shift = half(d[block] * factor), m[block]
            for turn in range(3):
                cost = local_feedback(
                    target, hut[block], hd[block], size, sign * shift, levels, uniform, first, trial, errors,
                    best * WORTH,
                )  # fmt: skip
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
            _replace(h, start, before, after, delta, slope)
            changed += 1
    return changed
