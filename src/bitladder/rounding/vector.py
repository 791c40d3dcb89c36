"""Rounding to the types whose blocks hold indices of points: IQ3_S and its kin."""

import dataclasses

import numpy as np
import numpy.typing as npt

from bitladder.rounding.blocks import Bytes, Floats
from bitladder.rounding.factors import couplings, damped, upper_factor
from bitladder.rounding.passes import round_in_groups
from bitladder.rounding.vectorformats import BLOCK, VECTOR_FORMATS, VectorBlocks, grid, pack_vector, unpack_vector
from bitladder.rounding.vectorrowkernels import open_points, pass_points

__all__ = ["VECTOR_FORMATS", "round_vector"]

# Signs are tried both ways where a column should be nearer to 0 than this many times the grid's least magnitude, by
# whether minuses must be even. On real weights more changes nothing where signs are free, and little where not.
HOLD = {False: 0.5, True: 1.0}
# How far a scale may go in one pass.
_MOVES = 2


@dataclasses.dataclass(frozen=True)
class PointFactors:
    """H = U D Uᵀ of the columns in the order of rounding, and TᵀT of its diagonal blocks.

    `h` float32 [n, n], damped; `ut` = Uᵀ; `order` int64 [n/sub] of sub-blocks; `roots` [n] of D; `opening`
    [n/sub, sub, sub] the diagonal blocks of √D Uᵀ; `unit`, `sub` [n/w, w, w]: T of H's diagonal blocks of width w, and
    their inverses.
    """

    h: Floats
    ut: Floats
    order: npt.NDArray[np.int64]
    roots: Floats
    opening: Floats
    unit: tuple[Floats, Floats]
    sub: tuple[Floats, Floats]


def factor_points(
    h: npt.NDArray[np.floating], sub: int, unit: int, damping: float, by_importance: bool
) -> PointFactors:
    """Prepare second moments [n, n] for sub-blocks and the units in them. Raises BitladderError if H is not finite."""
    full = damped(h, damping)
    n = len(full)
    weight = np.diag(full).reshape(-1, sub).sum(axis=1)
    order = np.argsort(-weight, kind="stable") if by_importance else np.arange(n // sub)
    columns = (order[:, None] * sub + np.arange(sub)).reshape(-1)
    upper, d = upper_factor(full[np.ix_(columns, columns)])
    triangle = np.sqrt(d)[:, None] * upper.T
    opening = np.stack([triangle[at : at + sub, at : at + sub] for at in range(0, n, sub)])
    return PointFactors(
        np.ascontiguousarray(full, np.float32),
        np.ascontiguousarray(upper.T, np.float32),
        order.astype(np.int64),
        np.sqrt(d).astype(np.float32),
        opening.astype(np.float32),
        _local(full, unit),
        _local(full, sub),
    )


def _local(full: npt.NDArray[np.float64], width: int) -> tuple[Floats, Floats]:
    """T with TᵀT = H_b and the inverse of H_b, for H's diagonal blocks."""
    blocks = np.stack([full[at : at + width, at : at + width] for at in range(0, len(full), width)])
    triangles = []
    for block in blocks:
        upper, d = upper_factor(block)
        triangles.append(np.sqrt(d)[:, None] * upper.T)
    return np.stack(triangles).astype(np.float32), np.linalg.inv(blocks).astype(np.float32)


def round_vector(
    weights: Floats,
    stock: Bytes,
    kind: str,
    inputs: npt.NDArray[np.floating],
    outputs: npt.NDArray[np.floating] | None,
    *,
    passes: int,
    scales: bool,
    damping: float,
    output_damping: float,
    by_importance: bool,
) -> tuple[Bytes, Floats, Floats]:
    """Blocks, and the errors weights − blocks of the library's and of these, float32 [rows, width]; see `method`."""
    width = weights.shape[1]
    start = unpack_vector(kind, stock, width)
    form = start.format
    factors = factor_points(inputs, form.sub, form.unit, damping, by_importance)
    leading, coupling = couplings(outputs, output_damping)
    before = weights - start.values()
    delta = before.copy()
    codes, d, scale, values = start.codes.copy(), start.d.copy(), start.scale.copy(), start.signed()
    points = np.ascontiguousarray(grid(kind).T)
    costs = np.empty(form.points, np.float32)
    kit = (points, form.unit, form.even, np.float32(HOLD[form.even] * points.min()), costs, costs.view(np.int32))
    multipliers = (form.multipliers, _MOVES if scales else 0, form.sub, BLOCK // form.sub)
    state = (d, scale, multipliers, kit, codes, values, delta)

    def opening(first: int, targets: Floats, leading: Floats) -> None:
        open_points(
            weights, first, targets, leading, factors.ut, factors.order, factors.roots, factors.opening, *state
        )  # fmt: skip

    def one_pass(first: int, slopes: Floats, coupling: Floats) -> Floats:
        shifts = np.empty_like(slopes)
        pass_points(first, slopes, coupling, shifts, factors.h, *factors.unit, *factors.sub, *state, scales)
        return shifts

    round_in_groups(weights, delta, factors.h, leading, coupling, passes, opening, one_pass)
    blocks = VectorBlocks(form, codes, (values < 0).astype(np.uint8), d, scale)
    # What the row kernels carried along has rounding errors of its own.
    return pack_vector(blocks), before, weights - blocks.values()
