"""Rounding of rows to points of a grid: feedback, descent and scales; see `kernels`.

`values` are points with their signs, float32 [n]; the weights are values times steps.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bitladder.rounding.kernels import LESS, add_owed, best_move, block_product, entry, half, jit, replace_block
from bitladder.rounding.point_kernels import choose, choose_block


class Scales(NamedTuple):
    """What d is multiplied by for each scale, float32 [16]; how far a scale may move in a pass; columns of a sub-block,
    and sub-blocks of a block."""

    multipliers: npt.NDArray[np.float32]
    moves: int
    sub: int
    per: int


class PointOpening(NamedTuple):
    """H = U D Uᵀ in the order of rounding, of some columns: ut [B, B], order [B/sub] of their sub-blocks, roots [B] of
    D, and triangles [B/sub, sub, sub], the diagonal blocks of √D Uᵀ."""

    ut: npt.NDArray[np.float32]
    order: npt.NDArray[np.int64]
    roots: npt.NDArray[np.float32]
    triangles: npt.NDArray[np.float32]


class LocalArrays(NamedTuple):
    """H's diagonal blocks of a width: T with TᵀT = H_b, and inverses, [n/width, width, width] each."""

    triangles: npt.NDArray[np.float32]
    inverses: npt.NDArray[np.float32]


class PointRows(NamedTuple):
    """Rows that are being rounded: the parts of `VectorBlocks`, values and delta [rows, n]; or one row of each."""

    d: npt.NDArray[np.float32]
    scale: npt.NDArray[np.int16]
    codes: npt.NDArray[np.uint16]
    values: npt.NDArray[np.float32]
    delta: npt.NDArray[np.float32]


@jit
def part_of_points(rows, row, start, stop, scales, group):
    """The columns start … stop−1 of one row of `PointRows`; group: columns of a point."""
    sub, block = scales.sub, scales.sub * scales.per
    return PointRows(
        rows.d[row, start // block : stop // block],
        rows.scale[row, start // sub : stop // sub],
        rows.codes[row, start // group : stop // group],
        rows.values[row, start:stop],
        rows.delta[row, start:stop],
    )


@jit
def choose_scale(aims, t, d, scale, scales, grid, best, codes, values, trial, trial_values):
    """Chooses the points of a sub-block with the scale given and with those next to it, as long as that helps.

    `best` is the cost of codes and values, which are overwritten if a lower cost is reached. `trial` and `trial_values`
    are scratch. Returns cost and scale.
    """
    multipliers, start = scales.multipliers, scale
    for way in range(3):
        # As given, then downwards, then (if that did not help) upwards.
        if way == 2 and scale < start:
            break
        s = start + (0, -1, 1)[way]
        for _ in range(scales.moves if way else 1):
            if s < 0 or s >= multipliers.size:
                break
            cost = choose_block(aims, t, d * multipliers[s], grid, best * LESS, trial, trial_values)
            if not cost < best * LESS:
                break
            best, scale = cost, s
            codes[:] = trial
            values[:] = trial_values
            s += (0, -1, 1)[way]
    return best, scale


@jit
def open_row(targets, carried, opening, scales, grid, row, errors):
    """Feedback: sub-blocks of a row in the given order, each aiming at what the errors before it ask for.

    targets [B] is what the columns should be, in the order of rounding, carried [B] what the errors of columns before
    these ask for. Writes codes, scale and values of `row`, and errors [B].
    """
    multipliers, sub = scales.multipliers, scales.sub
    codes, values, scale = row.codes, row.values, row.scale
    group = grid.points.shape[0]
    aims = np.empty(sub, np.float32)
    trial, trial_values = np.empty(sub // group, np.uint16), np.empty(sub, np.float32)
    for turn in range(opening.order.size):
        block, place = opening.order[turn], turn * sub
        start = block * sub
        for j in range(sub):
            factors = opening.ut[place + j]
            x = carried[place + j]
            for k in range(place):
                x += factors[k] * errors[k]
            for i in range(j + 1):
                x += factors[place + i] * targets[place + i]
            aims[j] = opening.roots[place + j] * x
        size = row.d[block // scales.per]
        if size != 0:
            _, scale[block] = choose_scale(
                aims, opening.triangles[turn], size, scale[block], scales, grid, np.float32(np.inf),
                codes[start // group : (start + sub) // group], values[start : start + sub], trial, trial_values,
            )  # fmt: skip
        size *= multipliers[scale[block]]
        for j in range(sub):
            errors[place + j] = targets[place + j] - values[start + j] * size


@jit
def descend_points(h, units, scales, grid, row, slope):
    """One pass over a row that chooses each unit again, all others as they are; returns how many changed.

    units: `LocalArrays` of H's diagonal blocks of units.
    """
    multipliers, sub, per = scales.multipliers, scales.sub, scales.per
    group, unit = grid.points.shape[0], grid.unit
    d, scale, codes, values = row.d, row.scale, row.codes, row.values
    changed = 0
    move, r = np.empty(unit, np.float32), np.empty(unit, np.float32)
    before, after = np.empty(unit, np.float32), np.empty(unit, np.float32)
    trial, trial_values = np.empty(unit // group, np.uint16), np.empty(unit, np.float32)
    for part in range(units.triangles.shape[0]):
        start = part * unit
        size = d[start // (sub * per)] * multipliers[scale[start // sub]]
        if size == 0:
            continue
        t = units.triangles[part][0:unit, 0:unit]  # laid out as in choose_block: one compilation less
        now = np.float32(0)
        best_move(units.inverses[part], slope, start, move)
        for j in range(unit):
            move[j] = move[j] / size
        for j in range(unit):
            x, y = np.float32(0), np.float32(0)
            for k in range(j + 1):
                x += t[j, k] * move[k]
                y += t[j, k] * values[start + k]
            now += x * x
            r[j] = x + y
        cost = choose(r, t, grid, trial, trial_values)
        if not cost < now * LESS:
            continue
        for j in range(unit):
            before[j] = values[start + j] * size
            after[j] = trial_values[j] * size
            values[start + j] = trial_values[j]
        codes[start // group : (start + unit) // group] = trial
        replace_block(h, start, before, after, row.delta, slope)
        changed += 1
    return changed


@jit
def refine_points(h, subs, scales, grid, row, slope):
    """Tries other scales for each sub-block of a row, with new points; returns how many sub-blocks changed.

    subs: `LocalArrays` of H's diagonal blocks of sub-blocks.
    """
    multipliers, sub, per = scales.multipliers, scales.sub, scales.per
    group = grid.points.shape[0]
    d, scale, codes, values = row.d, row.scale, row.codes, row.values
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
        t = subs.triangles[block]
        now = np.float32(0)
        best_move(subs.inverses[block], slope, start, move)
        for j in range(sub):
            before[j] = values[start + j] * size
        for j in range(sub):
            x, y = np.float32(0), np.float32(0)
            for k in range(j + 1):
                x += t[j, k] * move[k]
                y += t[j, k] * before[k]
            now += x * x
            aims[j] = x + y
        cost, best_scale = choose_scale(
            aims, t, d[block // per], scale[block], scales, grid, now, best_codes, best_values, trial, trial_values
        )  # fmt: skip
        if not cost < now * LESS:
            continue
        scale[block] = best_scale
        size = d[block // per] * multipliers[best_scale]
        for j in range(sub):
            after[j] = best_values[j] * size
            values[start + j] = best_values[j]
        codes[start // group : (start + sub) // group] = best_codes
        replace_block(h, start, before, after, row.delta, slope)
        changed += 1
    return changed


@jit
def refit_points(h, scales, row, slope):
    """Fits d of each block of a row to its points and scales; returns how many changed."""
    multipliers, sub = scales.multipliers, scales.sub
    d, scale, values = row.d, row.scale, row.values
    changed = 0
    width = sub * scales.per
    a, ha = np.empty(width, np.float32), np.empty(width, np.float32)
    before, after = np.empty(width, np.float32), np.empty(width, np.float32)
    for block in range(d.size):
        start = block * width
        aa, ga = 0.0, 0.0
        for j in range(width):
            a[j] = values[start + j] * multipliers[scale[(start + j) // sub]]
        block_product(h, start, a, ha)
        for j in range(width):
            aa += a[j] * ha[j]
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
        replace_block(h, start, before, after, row.delta, slope)
        changed += 1
    return changed


@entry
def open_points(weights, first_row, targets, carried, leading, opening, scales, grid, rows, errors):
    """Rounds some columns of the rows from `first_row` on for the first time, in place in `rows`.

    targets and carried [group, B] are as for `open_row`, leading [group, group] as in `method.round_in_groups`. Writes
    errors [group, B].
    """
    sub = scales.sub
    deltas = np.empty(targets.shape, np.float32)
    for index in range(targets.shape[0]):
        row, target = first_row + index, targets[index]
        add_owed(leading, index, deltas, target)
        whole = part_of_points(rows, row, 0, rows.delta.shape[1], scales, grid.points.shape[0])
        open_row(target, carried[index], opening, scales, grid, whole, errors[index])
        for place in range(target.size):
            column = opening.order[place // sub] * sub + place % sub
            deltas[index, place] = errors[index, place] - target[place] + weights[row, column]
            whole.delta[column] = deltas[index, place]


@entry
def change_points(first_row, start, slopes, coupling, shifts, h, units, subs, scales, grid, rows, refine, fit):
    """Changes columns of the rows from `first_row` on, in place in `rows`: those from `start` on.

    slopes [group, B] and coupling [group, group] are those of `method.round_in_groups`; h [B, B], `units` and `subs`
    belong to these columns. shifts [group, B] is scratch. `refine`: whether scales change too; `fit`: whether d does.
    """
    count = slopes.shape[1]
    for index in range(slopes.shape[0]):
        row = part_of_points(rows, first_row + index, start, start + count, scales, grid.points.shape[0])
        slope, shift = slopes[index], shifts[index]
        add_owed(coupling, index, shifts, slope)
        shift[:] = slope
        if refine:
            refine_points(h, subs, scales, grid, row, slope)
        if fit:
            refit_points(h, scales, row, slope)
        descend_points(h, units, scales, grid, row, slope)
        for j in range(count):
            shift[j] = slope[j] - shift[j]
