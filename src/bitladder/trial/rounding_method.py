"""A rounding method: a function from weights, type and importance to blocks, and the library's own as one."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from bitladder.engine import RowKernels, TensorType, quantize_rows
from bitladder.errors import BitladderError
from bitladder.gguf import TensorInfo

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class RoundingMethod(Protocol):
    """A function from weights to blocks.

    `key` is the same for two methods only if they give the same blocks; rendered blocks are cached under it.
    """

    key: str

    def __call__(self, name: str, weights: Floats, kind: TensorType, importance: Floats | None) -> Bytes:
        """The blocks of a tensor.

        Parameters:
            name: the tensor's name.
            weights: float32 [matrices, rows, width].
            kind: the type to round to.
            importance: mean squared inputs, float32 [matrices, width], or None.

        Returns:
            uint8 [matrices, rows, row bytes].

        Raises:
            BitladderError: the type cannot hold the tensor; the message names it.
        """


@runtime_checkable
class SideBySide(RoundingMethod, Protocol):
    """A method that rounds several tensors at once, since a GPU is busy only then."""

    def groups(self, tensors: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
        """The tensors as they are rounded together; one that is rounded by itself is a group."""

    def together(
        self,
        names: Sequence[str],
        weights: Sequence[Floats],
        kind: TensorType,
        importance: Sequence[Floats | None],
        threads: int,
    ) -> list[Bytes]:
        """The blocks of the tensors of a group, or of some of them. Each parameter is as of `__call__`.

        Parameters:
            threads: of the CPU, which make them ready.
        """


class StockRounding:
    """The library's own kernels.

    Parameters:
        kernels: with threads of their own; None computes in the calling thread.
    """

    key = "stock"

    def __init__(self, kernels: RowKernels | None = None) -> None:
        self._quantize = quantize_rows if kernels is None else kernels.quantize

    def __call__(self, name: str, weights: Floats, kind: TensorType, importance: Floats | None) -> Bytes:
        """See `RoundingMethod`."""
        try:
            parts = [
                self._quantize(matrix, kind, None if importance is None else importance[index])
                for index, matrix in enumerate(weights)
            ]
        except BitladderError as error:
            raise BitladderError(f"{name} as {kind.name}: {error}") from error
        return np.stack(parts)
