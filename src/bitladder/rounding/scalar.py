"""Rounding of a matrix to a type that stores an index for each weight."""

import dataclasses

import numpy as np
import numpy.typing as npt

from bitladder.rounding.block_types import Floats
from bitladder.rounding.factors import Factors, factor
from bitladder.rounding.options import RoundingOptions
from bitladder.rounding.scalar_kernels import Rows, Shape, open_rows
from bitladder.rounding.scalar_refine_kernels import Hessian, change_rows
from bitladder.rounding.scalar_types import NONE, ScalarBlocks, ScalarType


class ScalarRounding:
    """The rows of a matrix while they are rounded (a `method.RowRounding`).

    Parameters:
        weights: float32 [rows, n].
        start: the library's blocks for them.
        inputs: second moments of the inputs, [n, n].
        options: how to round.
    """

    def __init__(
        self, weights: Floats, start: ScalarBlocks, inputs: npt.NDArray[np.floating], options: RoundingOptions
    ) -> None:
        kind = start.type
        self.weights, self.delta = weights, weights - start.values()
        self._factors: Factors = factor(inputs, kind.sub, options.damping, options.by_importance)
        self.h = self._factors.h
        self._hessian = Hessian(self.h, self._factors.local_ut, self._factors.local_d, self._factors.local_inverse)
        limits = np.array([*kind.scales, *kind.minimums], np.int64)
        self._shape = Shape(
            kind.sub, kind.block // kind.sub, kind.levels, kind.uniform, kind.lowest, np.float32(kind.sign), limits
        )
        self._blocks = dataclasses.replace(
            start,
            indices=start.indices.copy(),
            d=start.d.copy(),
            dmin=start.dmin.copy(),
            scale=start.scale.copy(),
            minimum=start.minimum.copy(),
        )
        blocks = self._blocks
        self._rows = Rows(blocks.d, blocks.dmin, blocks.scale, blocks.minimum, blocks.indices, self.delta)
        self._steps = _steps_to_try(kind, options)
        self._scales = options.method == "best"

    def open(self, first: int, targets: Floats, leading: Floats) -> None:
        """See `RowRounding`."""
        factors = self._factors
        open_rows(self.weights, first, targets, leading, factors.ut, factors.order, self._shape, self._rows)

    def change(self, first: int, slopes: Floats, coupling: Floats) -> Floats:
        """See `RowRounding`."""
        shifts = np.empty_like(slopes)
        change_rows(
            first, slopes, coupling, shifts, self._hessian, self._shape, self._steps, self._rows, self._scales
        )  # fmt: skip
        return shifts

    def blocks(self) -> ScalarBlocks:
        """See `RowRounding`."""
        return self._blocks


def _steps_to_try(kind: ScalarType, options: RoundingOptions) -> Floats:
    """What the step of a block with an F16 step of its own is multiplied by; nothing for a type with scales."""
    if kind.scales != NONE:
        return np.empty(0, np.float32)
    both_ends_alike = kind.sign != 0 or kind.levels[kind.lowest] == -kind.levels[-1]
    return np.array(options.steps if both_ends_alike else options.steps + options.turned_steps, np.float32)
