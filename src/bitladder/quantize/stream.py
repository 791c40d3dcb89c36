"""Rows through the kernels: read, expanded, checked, quantized and written, in pieces that overlap.

Each thread takes one piece all the way; the calling thread writes finished pieces in order. Only a few pieces are
under way at once, so memory does not grow with the model, and nobody waits at the end of a tensor.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine.presets import storable
from bitladder.engine.types import TensorType, dequantize_into, quantize_rows, threads_available
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, TensorInfo
from bitladder.progress import Bar
from bitladder.quantize.choose_types import TensorChoice

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
PIECE = 1 << 17  # weights: a call's overhead vanishes, and float32 of it fits a core's cache
AHEAD = 4  # pieces per thread that may be under way or wait to be written


class TensorWriter(Protocol):
    """Takes the tensors' bytes in order, in pieces (model.writer.GgufWriter, or one for shards)."""

    def write(self, name: str, data: Bytes) -> None:
        """Append bytes to a tensor."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Rows start…stop of a tensor, all of one matrix, to become `kind`; `importance` float32 [width] or None.

    `name` is the tensor's in the new file.
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
    rendered: Collection[str] = (),
    blocks: Callable[[str], Bytes] | None = None,
) -> None:
    """Write every chosen tensor of `file`, in order.

    Parameters: `importance` float32 [matrices, width] by (new) tensor name. The bytes of tensors in `rendered` are not
    made here but come whole from `blocks`, uint8 [rows, row bytes]. Raises BitladderError for weights that are not
    finite, copied ones included; nothing is left running then.
    """
    count = threads or threads_available()
    pool = ThreadPoolExecutor(count)
    waiting: collections.deque[tuple[_Piece, Future[Bytes]]] = collections.deque()

    def write_first() -> None:
        piece, future = waiting.popleft()
        writer.write(piece.name, future.result())
        bar.note(piece.name)
        bar.advance((piece.stop - piece.start) * piece.tensor.type.row_bytes(piece.tensor.width))

    try:
        for piece in _pieces(tensors, importance, rendered):
            if len(waiting) >= AHEAD * count:
                write_first()
            known = blocks if piece.name in rendered else None
            waiting.append((piece, pool.submit(known, piece.name) if known else pool.submit(_make, file, piece)))
        while waiting:
            write_first()
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


def _make(file: GgufFile, piece: _Piece) -> Bytes:
    data = file.read(piece.tensor, piece.start, piece.stop)
    copied = piece.kind == piece.tensor.type
    if copied and not storable(piece.kind):
        return data  # integers and the like
    weights = np.empty((piece.stop - piece.start, piece.tensor.width), np.float32)
    dequantize_into(data, piece.tensor.type, weights)
    _refuse_not_finite(weights, piece)
    return data if copied else quantize_rows(weights, piece.kind, piece.importance)


def _refuse_not_finite(weights: Floats, piece: _Piece) -> None:
    # One NaN or Inf spoils the sum, and the sum is far cheaper than looking at each weight.
    if np.isfinite(weights.sum(dtype=np.float64)):
        return
    bad = np.flatnonzero(~np.isfinite(weights.reshape(-1)))
    index = piece.start * piece.tensor.width + int(bad[0])
    raise BitladderError(f"{piece.tensor.name} has the weight {weights.reshape(-1)[bad[0]]} at index {index}")
