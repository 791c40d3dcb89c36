"""Rounding of a matrix to a type that stores an index for each weight."""

import dataclasses

import numpy as np

from bitladder.rounding.block_types import Floats
from bitladder.rounding.options import RoundingOptions
from bitladder.rounding.scalar_kernels import Rows, open_rows, shape_of
from bitladder.rounding.scalar_refine_kernels import Hessian, change_rows
from bitladder.rounding.scalar_types import NONE, ScalarBlocks, ScalarType
from bitladder.rounding.second_moments import Order, SecondMoments, column_parts


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
        self._steps = _steps_to_try(kind, options)
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


def _steps_to_try(kind: ScalarType, options: RoundingOptions) -> Floats:
    """What the step of a block with an F16 step of its own is multiplied by; nothing for a type with scales."""
    if kind.scales != NONE:
        return np.empty(0, np.float32)
    both_ends_alike = kind.sign != 0 or kind.levels[kind.lowest] == -kind.levels[-1]
    return np.array(options.steps if both_ends_alike else options.steps + options.turned_steps, np.float32)
