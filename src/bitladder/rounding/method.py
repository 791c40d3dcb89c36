"""Choosing blocks for the output of a layer: one function, several methods, each monotone in what it lowers.

What is lowered is tr(O ΔW H ΔWᵀ): ΔW is weight less blocks, H = E[xxᵀ] of the inputs, O of the gradients at the outputs
(the unit matrix where it is not known). The library's own blocks are the start, and stay where nothing is gained.
"""

import dataclasses
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine import single_threaded
from bitladder.errors import BitladderError
from bitladder.keys import Algorithm
from bitladder.rounding.block_types import Blocks, BlockType, Bytes, Floats
from bitladder.rounding.factors import couplings, shrunk
from bitladder.rounding.options import RoundingOptions
from bitladder.rounding.scalar import ScalarRounding
from bitladder.rounding.scalar_types import SCALAR_TYPES, ScalarBlocks
from bitladder.rounding.vector import VectorRounding
from bitladder.rounding.vector_types import VECTOR_TYPES, VectorBlocks

ROUNDING = Algorithm(
    "rounding",
    (
        "feedback, descent and scales in the blocks of scalar types",
        "second moments are shrunk towards their diagonals",
        "types that store points of a grid; rows make up for each other's errors",
        "H is damped by 0.0001 at least",
        "both signs are tried only of columns that are nearly 0",
        "outputs are damped as much as inputs",
        "six passes, both signs of the step of a block, couplings of rows as products of matrices",
    ),
)

TYPES: dict[str, BlockType] = {**SCALAR_TYPES, **VECTOR_TYPES}
GROUP = 64  # rows whose errors are handed on to other rows by one product of matrices


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The result of rounding a matrix.

    Parameters:
        data: blocks, uint8 [rows, row bytes].
        before: tr(O ΔW H ΔWᵀ) of the library's blocks.
        after: the same of these blocks.
    """

    data: Bytes
    before: float
    after: float


class RowRounding(Protocol):
    """Rows of a matrix that are rounded to a type.

    Attributes:
        weights: float32 [rows, n].
        delta: weights − blocks, float32 [rows, n]; kept up to date.
        h: damped second moments of the inputs, float32 [n, n].
    """

    weights: Floats
    delta: Floats
    h: Floats

    def open(self, first: int, targets: Floats, leading: Floats) -> None:
        """Rounds the rows from `first` on to targets [group, n]; leading [group, group] as of `factors.couplings`."""

    def change(self, first: int, slopes: Floats, coupling: Floats) -> Floats:
        """Changes the rows from `first` on where that helps.

        Parameters:
            first: number of the first row.
            slopes: half of −∂f/∂v of each row, [group, n].
            coupling: [group, group] as of `factors.couplings`.

        Returns:
            By how much the slope of each row moved by its own changes, [group, n].
        """

    def blocks(self) -> Blocks:
        """The rows as they are now."""


def can_round(kind: str) -> bool:
    """Whether there is more than the library's kernel for a type.

    Example:
        >>> can_round("q4_K"), can_round("f16")
        (True, False)
    """
    return kind in TYPES


def same_integers(kind: str, first: Bytes, second: Bytes, width: int) -> bool:
    """Whether two tensors differ in nothing but the F16 numbers of their blocks.

    Parameters:
        kind: a type that `can_round` knows.
        first: blocks of the first tensor, uint8 [rows, row bytes].
        second: blocks of the second tensor.
        width: weights of a row.
    """
    ours, theirs = (TYPES[kind].unpack(data, width).integers() for data in (first, second))
    return all(np.array_equal(*pair) for pair in zip(ours, theirs, strict=True))


@ROUNDING.entry
def round_tensor(
    weights: Floats,
    stock: Bytes,
    kind: str,
    inputs: npt.NDArray[np.floating],
    options: RoundingOptions,
    outputs: npt.NDArray[np.floating] | None = None,
) -> Rounded:
    """Rounds one matrix in the calling thread. Python's lock is free meanwhile: many matrices are rounded in threads.

    Parameters:
        weights: float32 [n_out, n_in].
        stock: the library's blocks for them, uint8 [n_out, row bytes].
        kind: the type; one that `can_round` does not know keeps the library's blocks.
        inputs: second moments of the inputs, [n_in, n_in].
        options: how to round.
        outputs: second moments of the gradients at the outputs, [n_out, n_out], or None.

    Raises:
        BitladderError: shapes do not fit, or moments are not finite.

    Example:
        >>> from bitladder.engine.types import quantize_rows, type_by_name
        >>> rng = np.random.default_rng(0)
        >>> weights, x = rng.normal(size=(4, 256)).astype(np.float32), rng.normal(size=(999, 256)) + 1
        >>> stock = quantize_rows(weights, type_by_name("q4_K"), None)
        >>> rounded = round_tensor(weights, stock, "q4_K", x.T @ x / 999, RoundingOptions())
        >>> rounded.data.shape == stock.shape and rounded.after < 0.5 * rounded.before
        True
    """
    rows, width = weights.shape
    if inputs.shape != (width, width) or (outputs is not None and outputs.shape != (rows, rows)):
        raise BitladderError(f"second moments of {inputs.shape} do not fit a matrix of {rows} × {width}")
    if not options.two_sided:
        outputs = None
    if options.method == "stock" or not can_round(kind):
        return Rounded(stock, 0.0, 0.0)
    start = TYPES[kind].unpack(stock, width)
    with single_threaded():
        blocks = round_blocks(weights, start, inputs, options, outputs)
        # What the row kernels carried along has rounding errors of its own.
        before, after = (loss(weights - part.values(), inputs, outputs) for part in (start, blocks))
    return Rounded(blocks.pack(), before, after) if after < before else Rounded(stock, before, before)


def round_blocks(
    weights: Floats,
    start: Blocks,
    inputs: npt.NDArray[np.floating],
    options: RoundingOptions,
    outputs: npt.NDArray[np.floating] | None = None,
) -> Blocks:
    """Blocks whose damped loss is not above that of `start`; parameters as of `round_tensor`."""
    shrunk_inputs = shrunk(inputs, options.shrinkage)
    shrunk_outputs = None if outputs is None else shrunk(outputs, options.shrinkage)
    rows: RowRounding
    if isinstance(start, ScalarBlocks):
        rows = ScalarRounding(weights, start, shrunk_inputs, options)
    else:
        assert isinstance(start, VectorBlocks)
        rows = VectorRounding(weights, start, shrunk_inputs, options)
    leading, coupling = couplings(shrunk_outputs, options.damping)
    round_in_groups(rows, leading, coupling, 0 if options.method == "feedback" else options.passes)
    return rows.blocks()


def round_in_groups(rows: RowRounding, leading: Floats, coupling: Floats, passes: int) -> None:
    """Rounds all rows once, then changes them `passes` times.

    Row i aims at w_i + Σ_k c_ik delta_k and so makes up for the errors of other rows: at first of those before it (c is
    `leading`), later of all others (c is `coupling`, whose diagonal is 1). Half of −∂f/∂v of row i, its slope, is
    Σ_k c_ik delta_k H. For a group of rows these sums are one product of matrices; within a group, kernels go row by
    row.

    Parameters:
        rows: the rows.
        leading: float32 [rows, rows], or [0, 0] for rows that do not make up for each other (`factors.couplings`).
        coupling: alike.
        passes: how often rows are changed.
    """
    weights, delta = rows.weights, rows.delta
    for first in range(0, len(weights), GROUP):
        group = slice(first, first + GROUP)
        targets = weights[group].copy()
        if len(leading):
            targets += leading[group, :first] @ delta[:first]
        rows.open(first, targets, _within(leading, group))
    for _ in range(passes):
        all_slopes = delta @ rows.h
        for first in range(0, len(weights), GROUP):
            group = slice(first, first + GROUP)
            slopes = coupling[group] @ all_slopes if len(coupling) else all_slopes[group].copy()
            all_slopes[group] += rows.change(first, slopes, _within(coupling, group))


def _within(couplings: Floats, group: slice) -> Floats:
    return np.ascontiguousarray(couplings[group, group])


def loss(delta: Floats, inputs: npt.NDArray[np.floating], outputs: npt.NDArray[np.floating] | None) -> float:
    """tr(O Δ H Δᵀ) of errors [n_out, n_in], without any damping."""
    left = delta if outputs is None else outputs.astype(np.float32) @ delta
    return float(np.vdot(left @ inputs.astype(np.float32), delta))
