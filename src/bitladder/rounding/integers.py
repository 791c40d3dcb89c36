"""What blocks hold beside their F16 numbers."""

import numpy as np
import numpy.typing as npt

from bitladder.rounding.blocks import Bytes
from bitladder.rounding.formats import FORMATS, unpack
from bitladder.rounding.vectorformats import unpack_vector


def same_integers(kind: str, first: Bytes, second: Bytes, width: int) -> bool:
    """Whether two tensors' blocks, uint8 [rows, row bytes] each, differ in nothing but their F16 numbers.

    Raises KeyError for a type that `can_round` does not know.
    """
    ours, theirs = _integers(kind, first, width), _integers(kind, second, width)
    return all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))


def _integers(kind: str, data: Bytes, width: int) -> list[npt.NDArray[np.generic]]:
    if kind in FORMATS:
        scalar = unpack(kind, data, width)
        return [part for part in (scalar.indices, scalar.scale, scalar.minimum) if part is not None]
    vector = unpack_vector(kind, data, width)
    return [vector.codes, vector.minus, vector.scale]
