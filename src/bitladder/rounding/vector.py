"""Rounding to the types whose blocks hold indices of points: IQ3_S and its kin."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bitladder.rounding.blocks import Bytes, Floats

VECTOR_FORMATS: Mapping[str, object] = {}


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
    raise KeyError(kind)
