"""Rounding of a matrix: to a type with an index for each weight, and to one whose blocks hold points of a grid."""

import dataclasses

import numpy as np

from bitladder.rounding.block_types import Floats
from bitladder.rounding.options import RoundingOptions
from bitladder.rounding.point_kernels import Points
from bitladder.rounding.scalar_kernels import Rows, open_rows, shape_of
from bitladder.rounding.scalar_refine_kernels import Hessian, change_rows
from bitladder.rounding.scalar_types import NONE, ScalarBlocks, ScalarType
from bitladder.rounding.second_moments import Order, SecondMoments, column_parts
from bitladder.rounding.vector_kernels import LocalArrays, PointOpening, PointRows, Scales, change_points, open_points
from bitladder.rounding.vector_types import BLOCK, VectorBlocks


class ScalarRounding:
    """The rows of a matrix while they are rounded (a `method.RowRounding`).

    Parameters:
        weights: float32 [rows, n].
        start: the library's blocks for them.
        moments: second moments of the matrix.
        options: how to round.
    """

    def __init__(self, weights: Floats, start: ScalarBlocks, moments: SecondMoments, options: RoundingOptions) -> None:
        kind, width = start.type, weights.shape[1]
        self.weights, self.delta = weights, weights - start.values()
        h = moments.h
        self.order: Order = (
            np.argsort(-np.diag(h), kind="stable") if options.by_importance else np.arange(width, dtype=np.int64)
        )
        self.ut, _ = moments.factor(self.order)
        self._hessians = hessians(moments, kind.sub)
        self._shape = shape_of(kind)
        self._blocks = blocks = dataclasses.replace(
            start,
            indices=start.indices.copy(),
            d=start.d.copy(),
            dmin=start.dmin.copy(),
            scale=start.scale.copy(),
            minimum=start.minimum.copy(),
        )
        self._rows = Rows(blocks.d, blocks.dmin, blocks.scale, blocks.minimum, blocks.indices, self.delta)
        self._steps = steps_to_try(kind, options)
        self._best, self._scale_every = options.method == "best", options.scale_every

    def open(self, first: int, places: slice, targets: Floats, carried: Floats, leading: Floats) -> Floats:
        """See `RowRounding`."""
        errors = np.empty_like(targets)
        ut = np.ascontiguousarray(self.ut[places, places])
        open_rows(
            self.weights, first, targets, carried, leading, ut, self.order[places], self._shape, self._rows, errors
        )  # fmt: skip
        return errors

    def change(self, turn: int, first: int, part: int, start: int, slopes: Floats, coupling: Floats) -> None:
        """See `RowRounding`."""
        refine = self._best and (turn % self._scale_every == 0 or not self._steps.size)
        change_rows(
            first, start, slopes, coupling, np.empty_like(slopes), self._hessians[part], self._shape, self._steps,
            self._rows, refine, self._best,
        )  # fmt: skip

    def blocks(self) -> ScalarBlocks:
        """See `RowRounding`."""
        return self._blocks


def hessians(moments: SecondMoments, sub: int) -> list[Hessian]:
    """What kernels need of H for each part of the columns; sub: columns of a sub-block."""
    local, parts = moments.local(sub), []
    for block, part in zip(moments.diagonal, column_parts(len(moments.h)), strict=True):
        within = local.part(part.start, part.stop)
        sums = block.reshape(-1, sub, len(block)).sum(axis=1)
        parts.append(Hessian(block, within.ut, within.d, within.inverse, sums))
    return parts


def steps_to_try(kind: ScalarType, options: RoundingOptions) -> Floats:
    """What the step of a block with an F16 step of its own is multiplied by; nothing for a type with scales."""
    if kind.scales != NONE:
        return np.empty(0, np.float32)
    both_ends_alike = kind.sign != 0 or kind.levels[kind.lowest] == -kind.levels[-1]
    return np.array(options.steps if both_ends_alike else options.steps + options.turned_steps, np.float32)


class VectorRounding:
    """The rows of a matrix while they are rounded (a `method.RowRounding`).

    Parameters:
        weights: float32 [rows, n].
        start: the library's blocks for them.
        moments: second moments of the matrix.
        options: how to round.
    """

    def __init__(self, weights: Floats, start: VectorBlocks, moments: SecondMoments, options: RoundingOptions) -> None:
        self._type = kind = start.type
        self.weights, self.delta = weights, weights - start.values()
        self._sub_order = sub_order(moments.h, kind.sub, options.by_importance)
        self.order: Order = (self._sub_order[:, None] * kind.sub + np.arange(kind.sub)).reshape(-1)
        self.ut, d = moments.factor(self.order)
        self._roots = np.sqrt(d)
        units, subs = moments.local(kind.unit), moments.local(kind.sub)
        self._locals = []
        for block, part in zip(moments.diagonal, column_parts(weights.shape[1]), strict=True):
            pair = (local.part(part.start, part.stop) for local in (units, subs))
            self._locals.append((block, *(LocalArrays(local.triangles, local.inverse) for local in pair)))
        points, costs = np.ascontiguousarray(kind.grid.T), np.empty(kind.points, np.float32)
        hold = np.float32((options.hold_even if kind.even else options.hold) * points.min())
        self._grid = Points(points, kind.unit, kind.even, hold, costs, costs.view(np.int32))
        self._best, self._scale_every = options.method == "best", options.scale_every
        moves = options.scale_moves if self._best else 0
        self._scales = Scales(kind.multipliers, moves, kind.sub, BLOCK // kind.sub)
        self._rows = PointRows(start.d.copy(), start.scale.copy(), start.codes.copy(), start.signed(), self.delta)

    def open(self, first: int, places: slice, targets: Floats, carried: Floats, leading: Floats) -> Floats:
        """See `RowRounding`."""
        errors, sub = np.empty_like(targets), self._type.sub
        ut, roots = np.ascontiguousarray(self.ut[places, places]), self._roots[places]
        within = range(0, len(roots), sub)
        triangles = np.stack([roots[at : at + sub, None] * ut[at : at + sub, at : at + sub] for at in within])
        order = self._sub_order[places.start // sub : places.stop // sub]
        opening = PointOpening(ut, order, roots, triangles)
        open_points(
            self.weights, first, targets, carried, leading, opening, self._scales, self._grid, self._rows, errors
        )  # fmt: skip
        return errors

    def change(self, turn: int, first: int, part: int, start: int, slopes: Floats, coupling: Floats) -> None:
        """See `RowRounding`."""
        h, units, subs = self._locals[part]
        change_points(
            first, start, slopes, coupling, np.empty_like(slopes), h, units, subs, self._scales, self._grid, self._rows,
            self._best and turn % self._scale_every == 0, self._best,
        )  # fmt: skip

    def blocks(self) -> VectorBlocks:
        """See `RowRounding`."""
        rows = self._rows
        return VectorBlocks(self._type, rows.codes, (rows.values < 0).astype(np.uint8), rows.d, rows.scale)


def sub_order(h: Floats, sub: int, by_importance: bool) -> Order:
    """The order in which sub-blocks are rounded, int64 [n/sub].

    Parameters:
        h: second moments [n, n].
        sub: columns of a sub-block.
        by_importance: sub-blocks with large inputs first, not from left to right.
    """
    weight = np.diag(h).reshape(-1, sub).sum(axis=1)
    return np.argsort(-weight, kind="stable") if by_importance else np.arange(len(weight), dtype=np.int64)
