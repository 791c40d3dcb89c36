"""Rounding rows to points of a grid: feedback, descent and scales, and groups of rows.

As in rowkernels, f = (t − v)ᵀ H (t − v) is lowered for each row, `delta` is t − v and `slope` H · delta. `values` are
points with their signs, float32 [n]; the weights are values times steps. `kit` is handed down to vectorkernels.settle;
`scales` are multipliers, how far a scale may go, columns of a sub-block, and sub-blocks of a block.
"""

import numpy as np

from bitladder.rounding.refinekernels import LESS
from bitladder.rounding.rounder import owed
from bitladder.rounding.rowkernels import half, jit, moved
from bitladder.rounding.vectorkernels import fit_block, settle


@jit
def _replace(h, start, before, after, delta, slope):
    for j in range(before.size):
        change = after[j] - before[j]
        if change != 0:
            delta[start + j] -= change
            moved(h, start + j, change, slope)


@jit
def choose_scale(aims, t, d, scale, multipliers, moves, kit, best, codes, values, trial, trial_values):
    """Settle a sub-block with the scale given and with those next to it, as long as that helps.

    `best` is the cost to beat, which codes and values stand for; they are overwritten if it is beaten. At most `moves`
    steps from `scale`. Returns cost and scale.
    """
    start = scale
    for way in range(3):
        # As given, then downwards, then (if that was no good) upwards.
        if way == 2 and scale < start:
            break
        s = start + (0, -1, 1)[way]
        for _ in range(moves if way else 1):
            if s < 0 or s >= multipliers.size:
                break
            cost = fit_block(aims, t, d * multipliers[s], kit, best * LESS, trial, trial_values)
            if not cost < best * LESS:
                break
            best, scale = cost, s
            codes[:] = trial
            values[:] = trial_values
            s += (0, -1, 1)[way]
    return best, scale


@jit
def open_row(target, ut, order, roots, triangles, d, scale, scales, kit, codes, values, delta):
    """Feedback: sub-blocks of a row in the given order, each aiming at what the errors before it ask for.

    order [n/sub]; ut [n, n], roots [n] (of D) and triangles [n/sub, sub, sub] are in that order. Writes codes, scale,
    values and delta.
    """
    multipliers, moves, sub, per = scales
    group = kit[0].shape[0]
    errors, aims = np.empty(target.size, np.float32), np.empty(sub, np.float32)
    trial, trial_values = np.empty(sub // group, np.uint16), np.empty(sub, np.float32)
    for turn in range(order.size):
        block, place = order[turn], turn * sub
        start = block * sub
        for j in range(sub):
            row = ut[place + j]
            x = np.float32(0)
            for k in range(place):
                x += row[k] * errors[k]
            for i in range(j + 1):
                x += row[place + i] * target[start + i]
            aims[j] = roots[place + j] * x
        size = d[block // per]
        if size != 0:
            _, scale[block] = choose_scale(
                aims, triangles[turn], size, scale[block], multipliers, moves, kit, np.float32(np.inf),
                codes[start // group : (start + sub) // group], values[start : start + sub], trial, trial_values,
            )  # fmt: skip
        size *= multipliers[scale[block]]
        for j in range(sub):
            error = target[start + j] - values[start + j] * size
            errors[place + j] = error
            delta[start + j] = error


@jit
def descend_points(h, triangles, inverses, d, scale, scales, kit, codes, values, delta, slope):
    """One pass over a row that chooses each unit anew, all others as they are; returns how many changed.

    triangles, inverses [n/unit, unit, unit]: factors and inverses of H's diagonal blocks.
    """
    multipliers, _, sub, per = scales
    group, unit = kit[0].shape[0], kit[1]
    changed = 0
    move, r = np.empty(unit, np.float32), np.empty(unit, np.float32)
    before, after = np.empty(unit, np.float32), np.empty(unit, np.float32)
    trial, trial_values = np.empty(unit // group, np.uint16), np.empty(unit, np.float32)
    for part in range(triangles.shape[0]):
        start = part * unit
        size = d[start // (sub * per)] * multipliers[scale[start // sub]]
        if size == 0:
            continue
        t = triangles[part][0:unit, 0:unit]  # laid out as in fit_block: one compilation less
        now = np.float32(0)
        for j in range(unit):
            x = np.float32(0)
            for k in range(unit):
                x += inverses[part, j, k] * slope[start + k]
            move[j] = x / size
        for j in range(unit):
            x, y = np.float32(0), np.float32(0)
            for k in range(j + 1):
                x += t[j, k] * move[k]
                y += t[j, k] * values[start + k]
            now += x * x
            r[j] = x + y
        cost = settle(r, t, kit, trial, trial_values)
        if not cost < now * LESS:
            continue
        for j in range(unit):
            before[j] = values[start + j] * size
            after[j] = trial_values[j] * size
            values[start + j] = trial_values[j]
        codes[start // group : (start + unit) // group] = trial
        _replace(h, start, before, after, delta, slope)
        changed += 1
    return changed


@jit
def refine_points(h, triangles, inverses, d, scale, scales, kit, codes, values, delta, slope):
    """Try other scales for each sub-block of a row, with new points; returns how many sub-blocks changed.

    triangles, inverses [n/sub, sub, sub] belong to H's diagonal blocks of sub-blocks.
    """
    multipliers, moves, sub, per = scales
    group = kit[0].shape[0]
    changed = 0
    aims, move = np.empty(sub, np.float32), np.empty(sub, np.float32)
    before, after = np.empty(sub, np.float32), np.empty(sub, np.float32)
    best_codes, best_values = np.empty(sub // group, np.uint16), np.empty(sub, np.float32)
    trial, trial_values = np.empty(sub // group, np.uint16), np.empty(sub, np.float32)
    for block in range(scale.size):
        start = block * sub
        size = d[block // per] * multipliers[scale[block]]
        if size == 0:
            continue
        t = triangles[block]
        now = np.float32(0)
        for j in range(sub):
            x = np.float32(0)
            for k in range(sub):
                x += inverses[block, j, k] * slope[start + k]
            move[j] = x
            before[j] = values[start + j] * size
        for j in range(sub):
            x, y = np.float32(0), np.float32(0)
            for k in range(j + 1):
                x += t[j, k] * move[k]
                y += t[j, k] * before[k]
            now += x * x
            aims[j] = x + y
        cost, best_scale = choose_scale(
            aims, t, d[block // per], scale[block], multipliers, moves, kit, now, best_codes, best_values, trial,
            trial_values,
        )  # fmt: skip
        if not cost < now * LESS:
            continue
        scale[block] = best_scale
        size = d[block // per] * multipliers[best_scale]
        for j in range(sub):
            after[j] = best_values[j] * size
            values[start + j] = best_values[j]
        codes[start // group : (start + sub) // group] = best_codes
        _replace(h, start, before, after, delta, slope)
        changed += 1
    return changed


@jit
def refit_points(h, d, scale, scales, values, delta, slope):
    """Best d of each block of a row for its points and scales; returns how many changed."""
    multipliers, _, sub, per = scales
    changed = 0
    width = sub * per
    a, before, after = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for block in range(d.size):
        start = block * width
        aa, ga = 0.0, 0.0
        for j in range(width):
            a[j] = values[start + j] * multipliers[scale[(start + j) // sub]]
        for j in range(width):
            row = h[start + j]
            x = np.float32(0)
            for k in range(width):
                x += row[start + k] * a[k]
            aa += a[j] * x
            ga += a[j] * slope[start + j]
        if aa <= 0:
            continue
        new = half(d[block] + np.float32(ga / aa))
        x = float(new) - float(d[block])
        if new == 0 or x == 0 or x * (x * aa - 2 * ga) >= -1e-9 * abs(x * ga):
            continue
        for j in range(width):
            before[j], after[j] = a[j] * d[block], a[j] * new
        d[block] = new
        _replace(h, start, before, after, delta, slope)
        changed += 1
    return changed


@jit
def open_points(
    weights, first_row, targets, leading, ut, order, roots, opening, d, scale, scales, kit, codes, values, delta
):
    """Round rows from `first_row` on for the first time, in place in codes, values, scale and delta [rows, n].

    targets [group, n] and leading [group, group] as `passes.round_in_groups` gives them.
    """
    for index in range(targets.shape[0]):
        row, target = first_row + index, targets[index]
        owed(leading, index, delta[first_row:], target)
        open_row(
            target, ut, order, roots, opening, d[row], scale[row], scales, kit, codes[row], values[row], delta[row]
        )
        for j in range(target.size):
            delta[row, j] -= target[j] - weights[row, j]


@jit
def pass_points(
    first_row, slopes, coupling, shifts, h, unit_t, unit_inverse, sub_t, sub_inverse, d, scale, scales, kit, codes,
    values, delta, refine,
):  # fmt: skip
    """Change rows from `first_row` on, in place in codes, values, d, scale and delta [rows, n].

    slopes [group, n] and coupling [group, group] as `passes.round_in_groups` gives them; `shifts` [group, n] is by how
    much each row's own changes moved its slope. `refine`: whether scales change too.
    """
    for index in range(slopes.shape[0]):
        row, slope = first_row + index, slopes[index]
        owed(coupling, index, shifts, slope)
        shifts[index] = slope
        if refine:
            refine_points(
                h, sub_t, sub_inverse, d[row], scale[row], scales, kit, codes[row], values[row], delta[row], slope
            )  # fmt: skip
            refit_points(h, d[row], scale[row], scales, values[row], delta[row], slope)
        descend_points(
            h, unit_t, unit_inverse, d[row], scale[row], scales, kit, codes[row], values[row], delta[row], slope
        )  # fmt: skip
        for j in range(slope.size):
            shifts[index, j] = slope[j] - shifts[index, j]
