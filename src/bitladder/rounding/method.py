"""Choosing blocks for the output of a layer: one function, several methods, each monotone in what it lowers.

What is lowered is tr(O ΔW H ΔWᵀ): ΔW is weight less blocks, H = E[xxᵀ] of the inputs, O of the gradients at the outputs
(the unit matrix where it is not known). The library's own blocks are the start, and stay where nothing is gained.
"""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine import as_torch, device_memory, single_threaded
from bitladder.keys import Algorithm
from bitladder.rounding.block_types import Blocks, BlockType, Bytes, Floats
from bitladder.rounding.matrix import ScalarRounding, VectorRounding
from bitladder.rounding.options import RoundingOptions
from bitladder.rounding.scalar_types import SCALAR_TYPES, ScalarBlocks, ScalarType
from bitladder.rounding.second_moments import Order, SecondMoments, column_parts
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
        "errors are handed on by parts of 256 columns; sixteen scales are tried at once, those of points and steps in"
        " every second pass; passes end when they gain little",
        "the library's blocks stay where the damped loss does not fall; of wide matrices it is estimated",
        "a process that compiles the loops gives the blocks of one that finds them compiled",
        "many rows that do not make up for each other's errors are rounded some at a time",
    ),
)

TYPES: dict[str, BlockType] = {**SCALAR_TYPES, **VECTOR_TYPES}
GROUP = 128  # rows whose errors are handed on to others by one product of matrices
PIECE = 1 << 23  # weights that are rounded at once, at most, where rows are independent: some 24 bytes for each
SIDE_BY_SIDE = 32  # matrices that a device rounds at once, at most


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The result of rounding a matrix.

    Parameters:
        data: blocks, uint8 [rows, row bytes].
        before: tr(O ΔW H ΔWᵀ) of the library's blocks (`SecondMoments.loss`).
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
        order: numbers of the columns in the order in which they are rounded first, int64 [n].
        ut: Uᵀ of H = U D Uᵀ in this order, float32 [n, n].
    """

    weights: Floats
    delta: Floats
    order: Order
    ut: Floats

    def open(self, first: int, places: slice, targets: Floats, carried: Floats, leading: Floats) -> Floats:
        """Rounds some columns of the rows from `first` on.

        Parameters:
            first: number of the first row.
            places: where the columns are in `order`.
            targets: what they should be, [group, B]; overwritten.
            carried: what the errors of columns before these ask for, [group, B].
            leading: [group, group] as of `factors.couplings`.

        Returns:
            Targets less blocks, [group, B].
        """

    def change(self, turn: int, first: int, part: int, start: int, slopes: Floats, coupling: Floats) -> None:
        """Changes some columns of the rows from `first` on where that helps.

        Parameters:
            turn: number of the pass.
            first: number of the first row.
            part: number of the part of columns.
            start: number of its first column.
            slopes: half of −∂f/∂v, [group, B]; overwritten.
            coupling: [group, group] as of `factors.couplings`.
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
    device: str | None = None,
) -> Rounded:
    """Rounds one matrix in the calling thread. Python's lock is free meanwhile: many matrices are rounded in threads.

    Parameters:
        weights: float32 [n_out, n_in].
        stock: the library's blocks for them, uint8 [n_out, row bytes].
        kind: the type; one that `can_round` does not know keeps the library's blocks.
        inputs: second moments of the inputs, [n_in, n_in].
        options: how to round.
        outputs: second moments of the gradients at the outputs, [n_out, n_out], or None.
        device: what computes (`engine.torch_device`); None is the CPU with its own kernels, in the calling thread.

    Raises:
        BitladderError: shapes do not fit, or moments are not finite.

    Example:
        >>> from bitladder.engine.types import quantize_rows, type_by_name
        >>> rng = np.random.default_rng(0)
        >>> weights, x = rng.normal(size=(4, 256)).astype(np.float32), rng.normal(size=(999, 256)) + 1
        >>> stock = quantize_rows(weights, type_by_name("q4_K"), None)
        >>> rounded = round_tensor(weights, stock, "q4_K", x.T @ x / 999, RoundingOptions())
        >>> rounded.data.shape == stock.shape and rounded.after < 0.6 * rounded.before
        True
    """
    if options.method == "stock" or not can_round(kind):
        return Rounded(stock, 0.0, 0.0)
    return round_matrix(weights, stock, kind, SecondMoments(inputs, outputs, options, device), options, device)


def round_matrix(
    weights: Floats,
    stock: Bytes,
    kind: str,
    moments: SecondMoments,
    options: RoundingOptions,
    device: str | None = None,
) -> Rounded:
    """`round_tensor` with second moments that serve several types; `kind` is one that `can_round` knows."""
    return round_matrices([weights], [stock], kind, [moments], options, device)[0]


def round_matrices(
    weights: Sequence[Floats],
    stock: Sequence[Bytes],
    kind: str,
    moments: Sequence[SecondMoments],
    options: RoundingOptions,
    device: str | None = None,
) -> list[Rounded]:
    """`round_matrix` for several matrices of one shape, which a GPU rounds side by side.

    Their memory is not asked for: see `fit_device`.
    """
    for matrix, each in zip(weights, moments, strict=True):
        each.check(*matrix.shape)
    sets = zip(weights, stock, moments, strict=True)
    with single_threaded():
        if device is None:
            return [_by_rows(matrix, data, kind, each, options) for matrix, data, each in sets]
        starts = [TYPES[kind].unpack(data, matrix.shape[1]) for data, matrix in zip(stock, weights, strict=True)]
        rounded = round_on_device(weights, starts, moments, options, device)
        return [_better(*one, *blocks) for one, blocks in zip(sets, zip(starts, rounded, strict=True), strict=True)]


def _by_rows(weights: Floats, stock: Bytes, kind: str, moments: SecondMoments, options: RoundingOptions) -> Rounded:
    """Rounds a matrix on the CPU: rows that do not make up for each other's errors some at a time."""
    step = len(weights) if len(moments.coupling) else max(GROUP, PIECE // weights.shape[1])
    parts = []
    for first in range(0, len(weights), step):
        rows, data = weights[first : first + step], stock[first : first + step]
        start = TYPES[kind].unpack(data, rows.shape[1])
        parts.append(_better(rows, data, moments, start, round_blocks(rows, start, moments, options)))
    blocks = np.concatenate([part.data for part in parts])
    return Rounded(blocks, sum(part.before for part in parts), sum(part.after for part in parts))


def _better(weights: Floats, stock: Bytes, moments: SecondMoments, start: Blocks, blocks: Blocks) -> Rounded:
    """The blocks, or those of the library (`stock`, unpacked `start`) if their loss is not lower."""
    # What the row kernels carried along has rounding errors of its own.
    before, after = (moments.loss(weights - part.values()) for part in (start, blocks))
    return Rounded(blocks.pack(), before, after) if after < before else Rounded(stock, before, before)


_ONE_AT_A_TIME = threading.Lock()  # what is on a device was asked for as if nothing else were there


def fit_device(rows: int, width: int, coupled: bool, device: str) -> int:
    """How many matrices of a shape fit on a device at once; 0 if not even one does.

    Parameters:
        rows: rows of a matrix.
        width: its columns.
        coupled: whether moments of outputs are known.
        device: what `engine.torch_device` returned.
    """
    from bitladder.rounding.torch_tiles import bytes_of

    with _ONE_AT_A_TIME:
        memory = device_memory(device)
    return SIDE_BY_SIDE if memory is None else min(memory // bytes_of(rows, width, coupled), SIDE_BY_SIDE)


def moments_in_memory(rows: int, width: int, coupled: bool) -> int:
    """How many matrices of a shape can be ready for a device at once, for a quarter of the memory that is free.

    Ready are weights, errors and blocks, moments of inputs with their factors, and those of outputs.

    Parameters:
        rows: rows of a matrix.
        width: its columns.
        coupled: whether moments of outputs are known.
    """
    memory = device_memory("torch")
    each = 4 * (3 * rows * width + 4 * width**2 + (2 * rows**2 if coupled else 0))
    return SIDE_BY_SIDE if memory is None else max(1, memory // 4 // each)


def round_on_device(
    weights: Sequence[Floats],
    starts: Sequence[Blocks],
    moments: Sequence[SecondMoments],
    options: RoundingOptions,
    device: str,
) -> list[Blocks]:
    """`round_blocks` for several matrices of one shape and type, by torch."""
    from bitladder.rounding.torch_points import PointTiles
    from bitladder.rounding.torch_scalars import ScalarTiles
    from bitladder.rounding.torch_tiles import round_stack

    place, kind = as_torch(device), starts[0].type
    tiles = ScalarTiles if isinstance(kind, ScalarType) else PointTiles
    with _ONE_AT_A_TIME:
        return round_stack(tiles(kind, options, place), weights, starts, moments, options, place)


def round_blocks(weights: Floats, start: Blocks, moments: SecondMoments, options: RoundingOptions) -> Blocks:
    """Blocks whose damped loss is not above that of `start`; parameters as of `round_matrix`."""
    rows: RowRounding
    if isinstance(start, ScalarBlocks):
        rows = ScalarRounding(weights, start, moments, options)
    else:
        assert isinstance(start, VectorBlocks)
        rows = VectorRounding(weights, start, moments, options)
    open_groups(rows, moments)
    for turn in range(0 if options.method == "feedback" else options.passes):
        gain, level = change_groups(rows, moments, turn)
        if gain < options.enough * level:
            break
    return rows.blocks()


def open_groups(rows: RowRounding, moments: SecondMoments) -> None:
    """Rounds all rows for the first time, a group of rows and a part of the columns after the other.

    Row i aims at w_i + Σ_{k<i} c_ik delta_k, c = `moments.leading`, and so makes up for the errors of the rows before
    it. What other groups of rows and other parts of the columns add to that is one product of matrices for each group
    and part; within them, kernels go row by row and column by column.
    """
    weights, delta, leading, ut = rows.weights, rows.delta, moments.leading, rows.ut
    for group in _groups(len(weights)):
        targets = weights[group].copy()
        if len(leading):
            targets += leading[group, : group.start] @ delta[: group.start]
        targets = targets[:, rows.order]
        errors = np.empty_like(targets)
        for part in column_parts(weights.shape[1]):
            carried = errors[:, : part.start] @ ut[part, : part.start].T
            within = np.ascontiguousarray(targets[:, part])
            errors[:, part] = rows.open(group.start, part, within, carried, _within(leading, group))


def change_groups(rows: RowRounding, moments: SecondMoments, turn: int) -> tuple[float, float]:
    """Changes all rows once more, for the `turn`-th time, a group of rows and a part of the columns after the other.

    Row i sees the others as w_i + Σ_k c_ik delta_k, c = `moments.coupling`, whose diagonal is 1. Half of −∂f/∂v of row
    i, its slope, is Σ_k c_ik delta_k H. Products of matrices are as for `open_groups`.

    Returns:
        By how much the damped loss fell, and about how large it was.
    """
    delta, coupling, h = rows.delta, moments.coupling, moments.h
    gain = level = 0.0
    for group in _groups(len(delta)):
        seen: Floats = np.asarray(coupling[group] @ delta if len(coupling) else delta[group].copy(), np.float32)
        within = _within(coupling, group)
        for number, part in enumerate(column_parts(delta.shape[1])):
            slopes: Floats = seen @ h[part].T
            before, slopes_before = delta[group, part].copy(), slopes.copy()
            rows.change(turn, group.start, number, part.start, slopes, within)
            moved = delta[group, part] - before
            seen_moved = within @ moved if len(within) else moved
            seen[:, part] += seen_moved
            weights = moments.row_weights[group] if len(within) else np.ones(len(moved), np.float32)
            fell = np.einsum("ij,ij->i", 2 * slopes_before + seen_moved @ moments.diagonal[number], moved)
            gain -= float(weights @ fell)
            level += float(weights @ np.einsum("ij,ij->i", slopes_before, before))
    return gain, level


def _groups(rows: int) -> list[slice]:
    return [slice(first, min(first + GROUP, rows)) for first in range(0, rows, GROUP)]


def _within(couplings: Floats, group: slice) -> Floats:
    return np.ascontiguousarray(couplings[group, group])
