"""Rounding of a matrix to a type whose blocks hold indices of points: IQ3_S and its kin."""

import numpy as np
import numpy.typing as npt

from bitladder.rounding.block_types import Floats
from bitladder.rounding.factors import damped, diagonal_blocks, upper_factor
from bitladder.rounding.options import RoundingOptions
from bitladder.rounding.point_kernels import Points
from bitladder.rounding.vector_kernels import Local, Opening, PointRows, Scales, change_points, open_points
from bitladder.rounding.vector_types import BLOCK, VectorBlocks


class VectorRounding:
    """The rows of a matrix while they are rounded (a `method.RowRounding`).

    Parameters:
        weights: float32 [rows, n].
        start: the library's blocks for them.
        inputs: second moments of the inputs, [n, n].
        options: how to round.
    """

    def __init__(
        self, weights: Floats, start: VectorBlocks, inputs: npt.NDArray[np.floating], options: RoundingOptions
    ) -> None:
        self._type = kind = start.type
        self.weights, self.delta = weights, weights - start.values()
        full = damped(inputs, options.damping)
        self.h = np.ascontiguousarray(full, np.float32)
        self._opening = open_factors(full, kind.sub, options.by_importance)
        self._units, self._subs = local_factors(full, kind.unit), local_factors(full, kind.sub)
        points, costs = np.ascontiguousarray(kind.grid.T), np.empty(kind.points, np.float32)
        hold = np.float32((options.hold_even if kind.even else options.hold) * points.min())
        self._grid = Points(points, kind.unit, kind.even, hold, costs, costs.view(np.int32))
        self._refine = options.method == "best"
        moves = options.scale_moves if self._refine else 0
        self._scales = Scales(kind.multipliers, moves, kind.sub, BLOCK // kind.sub)
        self._rows = PointRows(start.d.copy(), start.scale.copy(), start.codes.copy(), start.signed(), self.delta)

    def open(self, first: int, targets: Floats, leading: Floats) -> None:
        """See `RowRounding`."""
        open_points(self.weights, first, targets, leading, self._opening, self._scales, self._grid, self._rows)

    def change(self, first: int, slopes: Floats, coupling: Floats) -> Floats:
        """See `RowRounding`."""
        shifts = np.empty_like(slopes)
        change_points(
            first, slopes, coupling, shifts, self.h, self._units, self._subs, self._scales, self._grid, self._rows,
            self._refine,
        )  # fmt: skip
        return shifts

    def blocks(self) -> VectorBlocks:
        """See `RowRounding`."""
        rows = self._rows
        return VectorBlocks(self._type, rows.codes, (rows.values < 0).astype(np.uint8), rows.d, rows.scale)


def open_factors(h: npt.NDArray[np.float64], sub: int, by_importance: bool) -> Opening:
    """Factors of H, damped, in the order in which sub-blocks are rounded.

    Parameters:
        h: second moments [n, n].
        sub: columns of a sub-block.
        by_importance: sub-blocks with large inputs first, not from left to right.
    """
    weight = np.diag(h).reshape(-1, sub).sum(axis=1)
    order = np.argsort(-weight, kind="stable") if by_importance else np.arange(len(weight))
    columns = (order[:, None] * sub + np.arange(sub)).reshape(-1)
    upper, d = upper_factor(h[np.ix_(columns, columns)])
    triangle = np.sqrt(d)[:, None] * upper.T
    return Opening(
        np.ascontiguousarray(upper.T, np.float32),
        order.astype(np.int64),
        np.sqrt(d).astype(np.float32),
        diagonal_blocks(triangle, sub).astype(np.float32),
    )


def local_factors(h: npt.NDArray[np.float64], width: int) -> Local:
    """T with TᵀT = H_b and the inverse of H_b, for the diagonal blocks of H [n, n] of a width."""
    blocks = diagonal_blocks(h, width)
    triangles = []
    for block in blocks:
        upper, d = upper_factor(block)
        triangles.append(np.sqrt(d)[:, None] * upper.T)
    return Local(np.stack(triangles).astype(np.float32), np.linalg.inv(blocks).astype(np.float32))
