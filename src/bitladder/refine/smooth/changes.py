"""What happens to each tensor of a model that is smoothed, and its rows, importance matrix and second moments after.

Nothing is collected again: the moments of the smoothed model follow from those of the model before.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bitladder.calibrate import (
    Correlations,
    Imatrix,
    LowRank,
    MomentsFile,
    MomentShape,
    MomentsWriter,
    pack_triangle,
    writing_moments,
)
from bitladder.engine import Aside, dequantize_rows, in_order, quantize_rows
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
    if change.column_order is not None:
        # `take` lets other threads of Python run meanwhile. Stored weights are half as large as float32.
        stored = data.view(f"u{data.shape[1] // tensor.width}")
        data = np.take(stored, change.column_order, axis=1).view(np.uint8)
    if change.columns is None and change.rows is None:
        return data
    order = slice(None) if change.column_order is None else change.column_order
    weights = dequantize_rows(data, tensor.type, tensor.width)
    if change.columns is not None:
        matrix = numbers[0] // tensor.rows_per_matrix if len(change.columns) > 1 else 0
        np.multiply(weights, change.columns[matrix, order], out=weights)
    if change.rows is not None and tensor.elements == change.rows.size:  # of a vector each element is a channel
        np.multiply(weights, change.rows.reshape(tensor.rows, -1)[numbers][:, order], out=weights)
    elif change.rows is not None:
        np.multiply(weights, change.rows[numbers, None], out=weights)
    try:
        return quantize_rows(weights, tensor.type, None)
    except BitladderError as error:
        remedy = "; convert with --outtype bf16 or f32" if tensor.type.name == "f16" else ""
        raise BitladderError(f"{tensor.name}: scaled weights overflow {tensor.type.name.upper()}{remedy}") from error


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


def smoothed_moments(
    moments: Sequence[pathlib.Path],
    changes: Mapping[str, Change],
    out: Sequence[pathlib.Path],
    model_sha256: str,
    threads: int | None = None,
    approve: Callable[[], Any] = lambda: None,
) -> None:
    """Writes the second moments of the smoothed model.

    They are those that collecting on the smoothed model gives, up to the rounding of F16. The weights of tokens are an
    exception: for v and up they stay those of the gradients before smoothing.

    Parameters:
        moments: paths of second moments of the model before.
        changes: what happened to each tensor.
        out: paths to write, one for each.
        model_sha256: hash of the smoothed model.
        threads: threads of the CPU; None takes all. Each has the moments of a matrix in memory.
        approve: is called when a file is written, before it appears. What it raises is raised, and no file appears.

    Raises:
        BitladderError: a file holds no second moments.
    """
    with contextlib.ExitStack() as opened:
        files = [_Smoothed(opened.enter_context(MomentsFile(path)), changes) for path in moments]
        works = itertools.chain.from_iterable(file.works() for file in files)
        made = opened.enter_context(contextlib.closing(in_order(works, threads, ahead=2)))
        aside = opened.enter_context(Aside(threads))
        finished = []
        for file, path in zip(files, out, strict=True):
            with contextlib.ExitStack() as writing:
                writer = writing.enter_context(file.writer(path, model_sha256))
                file.write(made, writer)
                # While the disk takes a file, the next one is written.
                finished.append(aside.submit(_finish, writing.pop_all(), writer, approve))
        for each in finished:
            each.result()


def _finish(writing: contextlib.ExitStack, writer: MomentsWriter, approve: Callable[[], Any]) -> None:
    with writing:
        writer.sync()
        approve()


class _Smoothed:
    """The moments of a file after smoothing."""

    def __init__(self, old: MomentsFile, changes: Mapping[str, Change]) -> None:
        self._old = old
        self._changes = {name: changes.get(name, Change()) for name in old.names()}
        self._shared = {name: old.entry(name) for name in old.names() if old.entry(name) != name}
        self._shapes = {name: _changed_shape(old.shape(name), change) for name, change in self._changes.items()}

    def works(self) -> Iterator[Callable[[], Any]]:
        """What makes the moments of each weight: of its inputs, matrix by matrix, if it has its own; of its outputs."""
        for name, change in self._changes.items():
            if name not in self._shared:
                for matrix in range(self._shapes[name].matrices):
                    yield functools.partial(_changed_inputs, self._old, name, change, matrix)
            if self._shapes[name].n_out:
                yield functools.partial(_changed_outputs, self._old, name, change)

    def writer(self, path: pathlib.Path, model_sha256: str) -> contextlib.AbstractContextManager[MomentsWriter]:
        """Opens the new file."""
        provenance = dataclasses.replace(self._old.provenance, model_sha256=model_sha256)
        return writing_moments(path, provenance, self._shapes, self._shared)

    def write(self, made: Iterator[Any], writer: MomentsWriter) -> None:
        """Writes what the works made, which are done in their order."""
        for name, shape in self._shapes.items():
            if name not in self._shared:
                writer.write_inputs(name, itertools.islice(made, shape.matrices), self._old.counts(name))
            if shape.n_out:
                writer.write_outputs(name, next(made))


def _changed_inputs(moments: MomentsFile, name: str, change: Change, matrix: int) -> Correlations:
    """E[w xxᵀ] of the new inputs of a matrix: they are divided by the scales of a weight's columns."""
    inputs = moments.kept_inputs(name, matrix)
    if change.columns is not None:  # correlations stay what they are
        scales = np.square(change.columns[matrix if len(change.columns) > 1 else 0])
        inputs = Correlations(inputs.values, (inputs.diagonals / scales).astype(np.float32))
    return inputs if change.column_order is None else _ordered(inputs, change.column_order)


def _ordered(moments: Correlations, order: Indices) -> Correlations:
    """Moments of numbers that come in another order."""
    if len(moments.values) == 1:
        return moments.ordered(order)
    return Correlations.of(pack_triangle(moments.matrix()[np.ix_(order, order)])[None])


def _changed_outputs(moments: MomentsFile, name: str, change: Change) -> Correlations | LowRank | None:
    """E[ggᵀ] of the new outputs: one that is divided by s has a gradient that is s times larger."""
    outputs = moments.outputs(name)
    if outputs is None:
        return None
    values, diagonals = outputs.values, outputs.diagonals
    if change.rows is not None:
        # Correlations stay what they are.
        diagonals = np.asarray(diagonals / np.square(change.rows.reshape(diagonals.shape)), np.float32)
    if change.row_order is None:
        return type(outputs)(values, diagonals)
    if isinstance(outputs, LowRank):
        return LowRank(values[change.row_order], diagonals[:, change.row_order])
    return _ordered(Correlations(values, diagonals), change.row_order)


def _changed_shape(shape: MomentShape, change: Change) -> MomentShape:
    """Outputs in another order are not in blocks any more."""
    return shape if change.row_order is None else dataclasses.replace(shape, blocks=1)
