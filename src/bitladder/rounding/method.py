"""Choosing blocks for the output of a layer: one function, several methods, each monotone in what it lowers.

What is lowered is tr(O ΔW H ΔWᵀ): ΔW is weight less blocks, H = E[xxᵀ] of the inputs, O of the gradients at the outputs
(the unit matrix where it is not known). The library's own blocks are the start, and stay where nothing is gained.
"""

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitladder.engine.blas import single_threaded
from bitladder.errors import BitladderError
from bitladder.rounding.blocks import Bytes, Floats
from bitladder.rounding.factors import shrunk
from bitladder.rounding.formats import FORMATS
from bitladder.rounding.scalar import round_scalar
from bitladder.rounding.vector import VECTOR_FORMATS, round_vector

Method = Literal["stock", "feedback", "descent", "best"]
METHODS: tuple[Method, ...] = ("stock", "feedback", "descent", "best")


@dataclasses.dataclass(frozen=True)
class RoundingOptions:
    """How to round.

    `method`: "feedback" hands each column's error on to those after it; "descent" then changes single indices as long
    as that helps, `passes` times over the tensor; "best" changes scales too. `damping` is added to the diagonals of H
    and O, as a share of their mean, after what is off them was made smaller by `shrinkage`. `by_importance` rounds
    columns with much input first. `two_sided` lets rows make up for each other's errors where output moments are known.
    """

    method: Method = "best"
    damping: float = 0.1
    shrinkage: float = 0.1
    passes: int = 6
    by_importance: bool = False
    two_sided: bool = True


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Blocks, uint8 [rows, row bytes], and tr(O ΔW H ΔWᵀ) of the library's blocks (`before`) and of these (`after`)."""

    data: Bytes
    before: float
    after: float


def can_round(kind: str) -> bool:
    """Whether there is more than the library's kernel for a type ("q4_K", "iq3_s", …)."""
    return kind in FORMATS or kind in VECTOR_FORMATS


def round_tensor(
    weights: Floats,
    stock: Bytes,
    kind: str,
    inputs: npt.NDArray[np.floating],
    options: RoundingOptions,
    outputs: npt.NDArray[np.floating] | None = None,
) -> Rounded:
    """Round one matrix in the calling thread (Python's lock is free meanwhile).

    Parameters: weights float32 [n_out, n_in]; `stock` the library's blocks for them, uint8 [n_out, row bytes]; inputs
    [n_in, n_in] second moments, outputs [n_out, n_out] of the gradients or None. Raises BitladderError if shapes do not
    fit or moments are not finite.
    """
    rows, width = weights.shape
    if inputs.shape != (width, width) or (outputs is not None and outputs.shape != (rows, rows)):
        raise BitladderError(f"second moments of {inputs.shape} do not fit a matrix of {rows} × {width}")
    if not options.two_sided:
        outputs = None
    if options.method == "stock" or not can_round(kind):
        return Rounded(stock, 0.0, 0.0)
    run = round_scalar if kind in FORMATS else round_vector
    passes = 0 if options.method == "feedback" else options.passes
    with single_threaded():  # who has many tensors rounds them in threads
        data, first, last = run(
            weights,
            stock,
            kind,
            shrunk(inputs, options.shrinkage),
            None if outputs is None else shrunk(outputs, options.shrinkage),
            passes=passes,
            scales=options.method == "best",
            damping=options.damping,
            output_damping=options.damping,
            by_importance=options.by_importance,
        )
        before, after = loss(first, inputs, outputs), loss(last, inputs, outputs)
    return Rounded(data, before, after) if after < before else Rounded(stock, before, before)


def loss(delta: Floats, inputs: npt.NDArray[np.floating], outputs: npt.NDArray[np.floating] | None) -> float:
    """tr(O Δ H Δᵀ) of errors [n_out, n_in], without any damping."""
    left = delta if outputs is None else outputs.astype(np.float32) @ delta
    return float(np.vdot(left @ inputs.astype(np.float32), delta))
