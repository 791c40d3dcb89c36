"""Rows through the kernels: read, expanded, checked, quantized and written, in pieces that overlap.

Each thread does all the work on one piece. The calling thread writes finished pieces in order. Only a few pieces are in
work at once, so that memory does not grow with the model, and no thread waits at the end of a tensor.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine import TensorType, dequantize_into, quantize_rows, storable, threads_available
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, TensorInfo
from bitladder.progress import Bar
from bitladder.quantize.choose_types import TensorChoice
from bitladder.quantize.importance import lost_units

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Blocks = Mapping[str, Callable[[], Bytes]]
NO_BLOCKS: Blocks = {}
PIECE = 1 << 17  # weights: the overhead of a call is negligible, and float32 of them fits the cache of a core
AHEAD = 4  # pieces per thread that may be in work or wait to be written


class TensorWriter(Protocol):
    """Writes the tensors' bytes in order, in pieces (gguf.writer.GgufWriter, or a writer of shards)."""

    def write(self, name: str, data: Bytes) -> None:
        """Appends bytes to a tensor."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Rows of one matrix of a tensor that are made together.

    Parameters:
        name: of the tensor in the new file.
        tensor: of the source.
        start: first row.
        stop: row after the last.
        kind: the new type.
        importance: float32, shape [width], or None.
    """

    name: str
    tensor: TensorInfo
    start: int
    stop: int
    kind: TensorType
    importance: Floats | None


def stream_tensors(
    writer: TensorWriter,
    file: GgufFile,
    tensors: Sequence[TensorChoice],
    importance: Mapping[str, Floats],
    threads: int | None,
    bar: Bar,
    blocks: Blocks = NO_BLOCKS,
) -> dict[str, int]:
    """Writes every chosen tensor of `file`, in order.

    Parameters:
        writer: of the new file.
        file: the source.
        tensors: the tensors of the new file.
        importance: name in the new file → float32, shape [matrices, width].
        threads: of the CPU; None for all.
        bar: where the bytes read are counted.
        blocks: name → what makes the tensor's blocks, uint8, shape [rows, row bytes], instead of the library's kernels.

    Returns:
        How many blocks of a tensor (rows, of a floating-point type) lose their weights, by name, if any do
        (`lost_blocks`).

    Raises:
        BitladderError: weights are not finite, those of copied tensors included. No thread is left running.
    """
    count = threads or threads_available()
    pool = ThreadPoolExecutor(count)
    waiting: collections.deque[tuple[_Piece, Future[tuple[Bytes, int]]]] = collections.deque()
    lost: dict[str, int] = {}

    def write_first() -> None:
        piece, future = waiting.popleft()
        data, units = future.result()
        writer.write(piece.name, data)
        if units:
            lost[piece.name] = lost.get(piece.name, 0) + units
        bar.note(piece.name)
        bar.advance((piece.stop - piece.start) * piece.tensor.type.row_bytes(piece.tensor.width))

    try:
        for piece in _pieces(tensors, importance, blocks):
            if len(waiting) >= AHEAD * count:
                write_first()
            waiting.append((piece, pool.submit(_make, file, piece, blocks.get(piece.name))))
        while waiting:
            write_first()
        return lost
    finally:
        pool.shutdown(cancel_futures=True)


def _pieces(
    tensors: Sequence[TensorChoice], importance: Mapping[str, Floats], whole: Collection[str]
) -> Iterator[_Piece]:
    for chosen in tensors:
        tensor, columns = chosen.source, importance.get(chosen.name)
        if chosen.name in whole:
            yield _Piece(chosen.name, tensor, 0, tensor.rows, chosen.type, None)
            continue
        step = max(1, PIECE // tensor.width)
        for matrix, first in enumerate(range(0, tensor.rows, tensor.rows_per_matrix)):
            end = first + tensor.rows_per_matrix
            for start in range(first, end, step):
                row = columns[matrix] if columns is not None else None
                yield _Piece(chosen.name, tensor, start, min(start + step, end), chosen.type, row)


def _make(file: GgufFile, piece: _Piece, elsewhere: Callable[[], Bytes] | None) -> tuple[Bytes, int]:
    """The piece's bytes, and how many of its blocks lose their weights."""
    if elsewhere is not None:
        blocks, tensor = elsewhere(), piece.tensor
        step = max(1, PIECE // tensor.width)
        lost = 0
        for start in range(piece.start, piece.stop, step):
            data = file.read(tensor, start, min(start + step, piece.stop))
            lost += lost_units(_expanded(data, tensor), blocks[start : start + len(data)], piece.kind, None)
        return blocks, lost
    data = file.read(piece.tensor, piece.start, piece.stop)
    if piece.kind == piece.tensor.type and not storable(piece.kind):
        return data, 0  # integers and the like
    weights = _expanded(data, piece.tensor)
    _refuse_not_finite(weights, piece)
    if piece.kind == piece.tensor.type:
        return data, 0
    data = quantize_rows(weights, piece.kind, piece.importance)
    return data, lost_units(weights, data, piece.kind, piece.importance)


def _expanded(data: Bytes, tensor: TensorInfo) -> Floats:
    """Rows as the file has them, uint8 [rows, row bytes], as float32 [rows, width]."""
    weights = np.empty((len(data), tensor.width), np.float32)
    dequantize_into(data, tensor.type, weights)
    return weights


def _refuse_not_finite(weights: Floats, piece: _Piece) -> None:
    # One NaN or Inf spoils the sum. The sum costs far less than a test of each weight.
    if np.isfinite(weights.sum(dtype=np.float64)):
        return
    bad = np.flatnonzero(~np.isfinite(weights.reshape(-1)))
    index = piece.start * piece.tensor.width + int(bad[0])
    raise BitladderError(f"{piece.tensor.name} has the weight {weights.reshape(-1)[bad[0]]} at index {index}")
