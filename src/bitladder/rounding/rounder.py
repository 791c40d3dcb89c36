"""Rounding a whole tensor: rows through the kernels, in threads, with the errors of other rows where they matter."""

import numpy as np

from bitladder.rounding.refinekernels import refine_plain, refine_scaled, refit
from bitladder.rounding.rowkernels import descend, feedback, jit, multiply


@jit
def round_rows(
    weights, rows_from, rows_to, leading, coupling, h, ut, order, hut, hd, hinverse, d, m, sign, scale, minimum, limits,
    sub, per, levels, uniform, first, factors, indices, delta, passes, scales,
):  # fmt: skip
    """Round rows rows_from … rows_to of weights [rows, n], in place in indices, d, m, scale, minimum and delta.

    leading, coupling [rows, rows], or [0, 0] for rows that do not care for each other: row i aims at
    w_i + Σ_k delta_k c_ik and so makes up for the errors of others; of those done before in the first pass (c is
    `leading`), of all others later (`coupling`).
    """
    n = weights.shape[1]
    slope, target = np.empty(n, np.float32), np.empty(n, np.float32)
    aim = np.empty(n, np.float32)
    step, offset = np.empty(n // sub, np.float32), np.empty(n // sub, np.float32)
    coupled = coupling.shape[0] > 0
    for turn in range(passes + 1):
        for row in range(rows_from, rows_to):
            opening = turn == 0
            target[:] = weights[row]
            if coupled:
                for other in range(row if opening else weights.shape[0]):
                    amount = leading[row, other] if opening else coupling[row, other]
                    if other != row and amount != 0:
                        for j in range(n):
                            target[j] += amount * delta[other, j]
            for block in range(step.size):
                step[block] = d[row, block // per] * np.float32(scale[row, block])
                offset[block] = sign * (m[row, block // per] * np.float32(minimum[row, block]))
            if opening:
                feedback(target, ut, order, step, offset, sub, levels, uniform, first, indices[row], delta[row])
                for j in range(n):
                    delta[row, j] -= target[j] - weights[row, j]
                continue
            # In the kernels below delta is the aim's distance, not the weight's.
            for j in range(n):
                aim[j] = delta[row, j] + (target[j] - weights[row, j])
            multiply(h, aim, slope)
            if scales:
                if factors.size:
                    refine_plain(
                        h, hut, hd, hinverse, d[row], m[row], sign, factors, sub, levels, uniform, first, indices[row],
                        aim, slope,
                    )  # fmt: skip
                else:
                    refine_scaled(
                        h, hut, hd, hinverse, d[row], m[row], sign, scale[row], minimum[row], limits, sub, per, levels,
                        uniform, first, indices[row], aim, slope,
                    )  # fmt: skip
                refit(
                    h, d[row], m[row], sign, scale[row], minimum[row], sub, per, levels, indices[row], aim, slope
                )  # fmt: skip
                for block in range(step.size):
                    step[block] = d[row, block // per] * np.float32(scale[row, block])
                    offset[block] = sign * (m[row, block // per] * np.float32(minimum[row, block]))
            descend(h, step, offset, sub, levels, uniform, first, indices[row], aim, slope)
            for j in range(n):
                delta[row, j] = aim[j] - (target[j] - weights[row, j])
