"""Reading a tensor's rows as float32, and the sizes of its columns."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from bitladder.engine.types import dequantize_into
from bitladder.errors import BitladderError
from bitladder.gguf.header import TensorInfo
from bitladder.gguf.reader import GgufFile
from bitladder.progress import Bar

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
PIECE = 1 << 20  # weights read at once


def row_pieces(file: GgufFile, tensor: TensorInfo, order: Indices | None = None) -> Iterator[tuple[Indices, Floats]]:
    """Numbers of rows, and float32 [rows, width]; each piece within one matrix.

    With `order`, int64 [rows of a matrix], the rows of each matrix come in it, and each matrix's bytes are read whole.
    """
    step = max(1, PIECE // tensor.width)
    for first in range(0, tensor.rows, tensor.rows_per_matrix):
        end = first + tensor.rows_per_matrix
        whole = None if order is None else file.read(tensor, first, end)
        for start in range(first, end, step):
            numbers = np.arange(start, min(start + step, end))
            if whole is None or order is None:
                data = file.read(tensor, start, start + len(numbers))
            else:
                within = order[numbers - first]
                numbers, data = within + first, whole[within]
            weights = np.empty((len(numbers), tensor.width), np.float32)
            dequantize_into(data, tensor.type, weights)
            yield numbers, weights


def column_squares(file: GgufFile, tensor: TensorInfo, matrices: int = 1, task: Bar | None = None) -> Doubles:
    """Sums of squares of a tensor's columns, [matrices, width] (of all its matrices together if `matrices` is 1).

    Raises BitladderError for weights that are not finite.
    """
    found = np.zeros((matrices, tensor.width))
    for numbers, weights in row_pieces(file, tensor):
        matrix = numbers[0] // tensor.rows_per_matrix if matrices > 1 else 0
        found[matrix] += np.einsum("ij,ij->j", weights, weights, dtype=np.float64)
        if task is not None:
            task.advance(weights.size)
    if not np.isfinite(found).all():
        raise BitladderError(f"{file.path}: {tensor.name} has weights that are not finite")
    return found
