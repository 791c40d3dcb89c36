"""Rounding a group of a tensor's rows through the kernels, with the errors of other rows where they matter."""

import numpy as np

from bitladder.rounding.refinekernels import refine_plain, refine_scaled, refit
from bitladder.rounding.rowkernels import descend, feedback, jit


@jit
def owed(couplings, index, others, out):
    """Add Σ_{k<index} couplings[index, k] others[k] to out [n]."""
    if couplings.shape[0] > 0:
        for other in range(index):
            amount = couplings[index, other]
            if amount != 0:
                for j in range(out.size):
                    out[j] += amount * others[other, j]


@jit
def _set_steps(d, m, sign, scale, minimum, per, step, offset):
    for block in range(step.size):
        step[block] = d[block // per] * np.float32(scale[block])
        offset[block] = sign * (m[block // per] * np.float32(minimum[block]))


@jit
def open_rows(
    weights, first_row, targets, leading, ut, order, d, m, sign, scale, minimum, sub, per, levels, uniform, first,
    indices, delta,
):  # fmt: skip
    """Round rows from `first_row` on for the first time, in place in indices and delta [rows, n].

    targets [group, n] and leading [group, group] as `passes.round_in_groups` gives them.
    """
    step, offset = np.empty(scale.shape[1], np.float32), np.empty(scale.shape[1], np.float32)
    for index in range(targets.shape[0]):
        row, target = first_row + index, targets[index]
        owed(leading, index, delta[first_row:], target)
        _set_steps(d[row], m[row], sign, scale[row], minimum[row], per, step, offset)
        feedback(target, ut, order, step, offset, sub, levels, uniform, first, indices[row], delta[row])
        for j in range(target.size):
            delta[row, j] -= target[j] - weights[row, j]


@jit
def pass_rows(
    first_row, slopes, coupling, shifts, h, hut, hd, hinverse, d, m, sign, scale, minimum, limits, sub, per, levels,
    uniform, first, factors, indices, delta, scales,
):  # fmt: skip
    """Change rows from `first_row` on, in place in indices, d, m, scale, minimum and delta [rows, n].

    slopes [group, n] and coupling [group, group] as `passes.round_in_groups` gives them; `shifts` [group, n] is by how
    much each row's own changes moved its slope. `scales`: whether more than indices change.
    """
    step, offset = np.empty(scale.shape[1], np.float32), np.empty(scale.shape[1], np.float32)
    for index in range(slopes.shape[0]):
        row, slope = first_row + index, slopes[index]
        owed(coupling, index, shifts, slope)
        shifts[index] = slope
        if scales:
            if factors.size:
                refine_plain(
                    h, hut, hd, hinverse, d[row], m[row], sign, factors, sub, levels, uniform, first, indices[row],
                    delta[row], slope,
                )  # fmt: skip
            else:
                refine_scaled(
                    h, hut, hd, hinverse, d[row], m[row], sign, scale[row], minimum[row], limits, sub, per, levels,
                    uniform, first, indices[row], delta[row], slope,
                )  # fmt: skip
            refit(
                h, d[row], m[row], sign, scale[row], minimum[row], sub, per, levels, indices[row], delta[row], slope
            )  # fmt: skip
        _set_steps(d[row], m[row], sign, scale[row], minimum[row], per, step, offset)
        descend(h, step, offset, sub, levels, uniform, first, indices[row], delta[row], slope)
        for j in range(slope.size):
            shifts[index, j] = slope[j] - shifts[index, j]
