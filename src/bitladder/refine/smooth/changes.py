"""What happens to each tensor of a model that is smoothed, and its rows and importance matrix after that."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from bitladder.calibrate import Imatrix
from bitladder.engine import dequantize_rows, quantize_rows
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, TensorInfo
from bitladder.refine.model_files import PIECE, Bytes, Floats, Indices, row_spans
from bitladder.refine.smooth.links import Link
from bitladder.refine.smooth.order import Order


@dataclasses.dataclass
class Change:
    """What happens to a tensor: first it is multiplied, then its columns and rows come in another order.

    Parameters:
        columns: factors of its columns, float32 [matrices or 1, width]; None leaves them.
        rows: factors of its rows, float32 [rows]; None leaves them.
        column_order: numbers of the columns in their new order, int64 [width]; None leaves them.
        row_order: the same for the rows of each of its matrices.
    """

    columns: Floats | None = None
    rows: Floats | None = None
    column_order: Indices | None = None
    row_order: Indices | None = None

    @property
    def nothing(self) -> bool:
        """Whether the tensor stays as it is."""
        return all(part is None for part in (self.columns, self.rows, self.column_order, self.row_order))


def changes_of(scales: Sequence[tuple[Link, Floats]], order: Order | None = None) -> dict[str, Change]:
    """What happens to each tensor that changes, by name.

    Parameters:
        scales: each link and its scales, float32 [matrices, channels of the readers].
        order: the new order of channels, or None.
    """
    changes: dict[str, Change] = {}
    for link, scale in scales:
        for name in link.readers:
            changes.setdefault(name, Change()).columns = scale
        once = scale.reshape(link.matrices, link.groups, link.repeats, link.size)[:, :, 0].reshape(-1)
        for name in link.makers:
            changes.setdefault(name, Change()).rows = (1 / once).astype(np.float32)
    if order is not None:
        for name in order.columns:
            changes.setdefault(name, Change()).column_order = order.channels
        for name in order.rows:
            changes.setdefault(name, Change()).row_order = order.channels
    return changes


def changed_rows(file: GgufFile, tensor: TensorInfo, change: Change) -> Iterator[Callable[[], Bytes]]:
    """What makes the new rows of a tensor, piece by piece, in its own type.

    Powers of two and another order round nothing. A piece raises BitladderError for weights that overflow F16.
    """
    if change.row_order is not None:  # rows come from all over the matrix
        for first in range(0, tensor.rows, tensor.rows_per_matrix):
            yield functools.partial(_changed_matrix, file, tensor, change, first, change.row_order)
        return
    for start, stop in row_spans(tensor):
        yield functools.partial(_changed_piece, file, tensor, change, start, stop)


def _changed_matrix(file: GgufFile, tensor: TensorInfo, change: Change, first: int, order: Indices) -> Bytes:
    whole = file.read(tensor, first, first + tensor.rows_per_matrix)
    out, step = np.empty_like(whole), max(1, PIECE // tensor.width)
    for start in range(0, len(whole), step):
        within = order[start : start + step]
        out[start : start + step] = _changed(np.take(whole, within, axis=0), tensor, change, within + first)
    return out


def _changed_piece(file: GgufFile, tensor: TensorInfo, change: Change, start: int, stop: int) -> Bytes:
    data = file.read(tensor, start, stop)
    return data if change.nothing else _changed(data, tensor, change, np.arange(start, stop))


def _changed(data: Bytes, tensor: TensorInfo, change: Change, numbers: Indices) -> Bytes:
    """Rows of one matrix with these numbers, changed, in the same order."""
    weights = dequantize_rows(data, tensor.type, tensor.width)
    if change.columns is not None:
        matrix = numbers[0] // tensor.rows_per_matrix if len(change.columns) > 1 else 0
        np.multiply(weights, change.columns[matrix], out=weights)
    if change.rows is not None:
        # Of a vector (of each expert, if there are several) each element is a channel.
        rows = change.rows.reshape(tensor.rows, -1 if tensor.elements == change.rows.size else 1)
        np.multiply(weights, rows[numbers], out=weights)
    if tensor.type.name == "f16" and not max(weights.max(), -weights.min()) <= np.finfo(np.float16).max:
        raise BitladderError(f"{tensor.name}: scaled weights overflow F16; convert with --outtype bf16 or f32")
    # `take` lets other threads of Python run meanwhile.
    placed = weights if change.column_order is None else np.take(weights, change.column_order, axis=1)
    return quantize_rows(placed, tensor.type, None)


def changed_imatrix(imatrix: Imatrix, changes: Mapping[str, Change]) -> Imatrix:
    """The importance matrix of the new inputs: the old inputs divided by the scales, in the new order."""
    entries = dict(imatrix.entries)
    for name, change in changes.items():
        if name not in entries:
            continue
        sums = entries[name].sums
        if change.columns is not None:
            sums = sums / np.square(change.columns, dtype=np.float64)
        if change.column_order is not None:
            sums = np.ascontiguousarray(sums[:, change.column_order])
        entries[name] = dataclasses.replace(entries[name], sums=sums)
    return dataclasses.replace(imatrix, entries=entries)
