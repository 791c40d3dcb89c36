"""The files of a model that is refined: read and copied piece by piece, so that memory is bounded by one tensor."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from bitladder.engine import dequantize_into
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, GgufWriter, TensorInfo, TensorPlan, string
from bitladder.progress import SILENT, Bar, Progress
from bitladder.quantize import DROPPED

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]
PIECE = 1 << 20  # weights read at once


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """Paths of a full-precision model and of what was collected from it.

    Parameters:
        model: a GGUF.
        imatrix: its importance matrix, or None.
        moments: its second moments; of several files the mean counts.
    """

    model: pathlib.Path
    imatrix: pathlib.Path | None = None
    moments: tuple[pathlib.Path, ...] = ()


def row_pieces(file: GgufFile, tensor: TensorInfo, order: Indices | None = None) -> Iterator[tuple[Indices, Floats]]:
    """Reads a tensor as float32, each piece within one matrix.

    Parameters:
        file: where the tensor is.
        tensor: what to read.
        order: in which order the rows of each matrix come, int64 [rows of a matrix]; each matrix is then read whole.

    Yields:
        Numbers of rows, and the rows, float32 [rows, width].
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
    """Sums of squares of the columns of a tensor.

    Parameters:
        file: where the tensor is.
        tensor: what to read.
        matrices: 1 for the sums over all matrices of the tensor, else the number of its matrices.
        task: advances by the weights that are read.

    Returns:
        float64 [matrices, width].

    Raises:
        BitladderError: weights are not finite.
    """
    squares = np.zeros((matrices, tensor.width))
    for numbers, weights in row_pieces(file, tensor):
        matrix = numbers[0] // tensor.rows_per_matrix if matrices > 1 else 0
        squares[matrix] += np.einsum("ij,ij->j", weights, weights, dtype=np.float64)
        if task is not None:
            task.advance(weights.size)
    if not np.isfinite(squares).all():
        raise BitladderError(f"{file.path}: {tensor.name} has weights that are not finite")
    return squares


def copy_model(
    file: GgufFile,
    out: pathlib.Path,
    remark: tuple[str, str],
    data: Callable[[TensorInfo], Iterable[Bytes]],
    *,
    label: str,
    progress: Progress = SILENT,
) -> None:
    """Writes a model with the same tensors and types, and other data.

    Parameters:
        file: the model that is copied.
        out: path of the copy.
        remark: key and text that the metadata of the copy say of it.
        data: the bytes of a tensor in the copy, in order, in pieces of any size.
        label: what the progress bar says.
    """
    key, text = remark
    metadata = {name: value for name, value in file.metadata.items() if name not in DROPPED} | {key: string(text)}
    plans = [TensorPlan(name, tensor.shape, tensor.type) for name, tensor in file.tensors.items()]
    with out.open("wb") as stream, progress.task(label, file.tensor_bytes) as task:
        writer = GgufWriter(stream, metadata, plans)
        for name, tensor in file.tensors.items():
            task.note(name)
            for piece in data(tensor):
                writer.write(name, piece)
                task.advance(piece.nbytes)
        writer.finish()
