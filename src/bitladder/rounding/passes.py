"""Opening and passes over a whole matrix, group by group of rows.

What rows owe each other, and what an error costs, is computed for a group at once by matrix multiplication; within a
group, kernels go on row by row.
"""

from collections.abc import Callable

import numpy as np

from bitladder.rounding.blocks import Floats

GROUP = 64  # rows
# (first row, targets [group, n], leading [group, group]): rounds these rows for the first time.
Open = Callable[[int, Floats, Floats], None]
# (first row, slopes [group, n], coupling [group, group]) -> by how much slopes of each row moved by its own changes.
Pass = Callable[[int, Floats, Floats], Floats]


def round_in_groups(
    weights: Floats,
    delta: Floats,
    h: Floats,
    leading: Floats,
    coupling: Floats,
    passes: int,
    open_rows: Open,
    pass_rows: Pass,
) -> None:
    """Round all rows once, then change them `passes` times.

    Parameters: weights [rows, n]; delta [rows, n], weights − blocks, which `open_rows` and `pass_rows` keep up to date;
    h [n, n] symmetric; leading, coupling [rows, rows], or [0, 0] for rows that do not care for each other
    (`factors.couplings`): row i aims at w_i + Σ_k c_ik delta_k and so makes up for the errors of others, of those done
    before at first (c is `leading`), of all others later (`coupling`, whose diagonal is 1). Half of −∂f/∂v of row i,
    its slope, is Σ_k c_ik delta_k H.
    """
    for first in range(0, len(weights), GROUP):
        rows = slice(first, first + GROUP)
        targets = weights[rows].copy()
        if len(leading):
            targets += leading[rows, :first] @ delta[:first]
        open_rows(first, targets, _within(leading, rows))
    for _ in range(passes):
        slopes = delta @ h
        for first in range(0, len(weights), GROUP):
            rows = slice(first, first + GROUP)
            group = coupling[rows] @ slopes if len(coupling) else slopes[rows].copy()
            slopes[rows] += pass_rows(first, group, _within(coupling, rows))


def _within(couplings: Floats, rows: slice) -> Floats:
    return np.ascontiguousarray(couplings[rows, rows])
