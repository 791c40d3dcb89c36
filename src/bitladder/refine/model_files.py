"""The files of a model that is refined: read and copied piece by piece, so that memory is bounded by one tensor."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from bitladder.engine import Aside, dequantize_rows, in_order
from bitladder.errors import BitladderError
from bitladder.files import Closing
from bitladder.gguf import GgufFile, GgufWriter, TensorInfo, TensorPlan, string
from bitladder.progress import SILENT, Progress
from bitladder.quantize import DROPPED

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]
HASHED_LATER = 4  # pieces that are written and wait for the thread that hashes
PIECE = 1 << 18  # weights read at once: buffers of a megabyte stay in the caches


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


def row_spans(tensor: TensorInfo) -> Iterator[tuple[int, int]]:
    """The first row of each piece of a tensor, and the row after its last. A piece lies within one matrix."""
    step = max(1, PIECE // tensor.width)
    for first in range(0, tensor.rows, tensor.rows_per_matrix):
        end = first + tensor.rows_per_matrix
        yield from ((start, min(start + step, end)) for start in range(first, end, step))


def column_squares(file: GgufFile, tensor: TensorInfo, matrices: int = 1) -> Doubles:
    """Sums of squares of the columns of a tensor.

    Parameters:
        file: where the tensor is.
        tensor: what to read.
        matrices: 1 for the sums over all matrices of the tensor, else the number of its matrices.

    Returns:
        float64 [matrices, width].

    Raises:
        BitladderError: weights are not finite.
    """
    squares = np.zeros((matrices, tensor.width))
    for start, stop in row_spans(tensor):
        weights = dequantize_rows(file.read(tensor, start, stop), tensor.type, tensor.width)
        matrix = start // tensor.rows_per_matrix if matrices > 1 else 0
        squares[matrix] += np.einsum("ij,ij->j", weights, weights, dtype=np.float64)
    if not np.isfinite(squares).all():
        raise BitladderError(f"{file.path}: {tensor.name} has weights that are not finite")
    return squares


def copy_model(
    file: GgufFile,
    out: pathlib.Path,
    remark: tuple[str, str],
    data: Callable[[TensorInfo], Iterable[Callable[[], Bytes]]],
    *,
    label: str,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> str:
    """Writes a model with the same tensors and types, and other data.

    Parameters:
        file: the model that is copied.
        out: path of the copy.
        remark: key and text that the metadata of the copy say of it.
        data: what makes the bytes of a tensor in the copy, in order, in pieces of any size.
        label: what the progress bar says.
        threads: threads that make pieces; None for one on each CPU. Two pieces for each, and `HASHED_LATER` that are
            written, are in memory.

    Returns:
        The SHA-256 of the copy.
    """
    key, text = remark
    metadata = {name: value for name, value in file.metadata.items() if name not in DROPPED} | {key: string(text)}
    plans = [TensorPlan(name, tensor.shape, tensor.type) for name, tensor in file.tensors.items()]
    works = (functools.partial(_named, name, make) for name, tensor in file.tensors.items() for make in data(tensor))
    with (
        out.open("wb") as stream,
        progress.task(label, file.tensor_bytes) as task,
        contextlib.closing(in_order(works, threads, ahead=2)) as pieces,
        _HashedStream(stream, threads) as hashed,
    ):
        writer = GgufWriter(hashed, metadata, plans)
        for name, piece in pieces:
            task.note(name)
            writer.write(name, piece)
            task.advance(piece.nbytes)
        writer.finish()
        return hashed.sha256()


def _named(name: str, make: Callable[[], Bytes]) -> tuple[str, Bytes]:
    return name, make()


class _HashedStream(Closing):
    """Passes bytes on to a stream, and hashes them. With several threads, one of them hashes a piece while others work.

    What is written must not change afterwards.
    """

    def __init__(self, stream: BinaryIO, threads: int | None) -> None:
        self._stream, self._hash = stream, hashlib.sha256()
        self._aside = Aside(threads)
        self._waiting: collections.deque[Future[None]] = collections.deque()

    def close(self) -> None:
        """Ends the thread."""
        self._aside.close()

    def write(self, data: "Buffer") -> None:
        """Appends bytes."""
        self._wait(HASHED_LATER)
        self._waiting.append(self._aside.submit(self._hash.update, data))
        self._stream.write(data)

    def sha256(self) -> str:
        """The SHA-256 of the bytes so far, in hexadecimal digits."""
        self._wait()
        return self._hash.hexdigest()

    def _wait(self, left: int = 0) -> None:
        """Until no more than so many pieces are left to hash."""
        while len(self._waiting) > left:
            self._waiting.popleft().result()
