"""What smoothing does to each tensor, to the importance of its columns, and to the second moments of a model."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bitladder.calibrate import (
    Correlations,
    Imatrix,
    LowRank,
    MomentsFile,
    MomentShape,
    pack_triangle,
    unpack_triangle,
    writing_moments,
)
from bitladder.engine import quantize_rows
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, TensorInfo
from bitladder.refine.model_files import PIECE, Bytes, Floats, Indices, row_pieces
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


def changed_rows(file: GgufFile, tensor: TensorInfo, change: Change) -> Iterator[Bytes]:
    """The new rows of a tensor, piece by piece, in its own type.

    Powers of two and another order round nothing. Raises BitladderError for weights that overflow F16.
    """
    if change.nothing:
        step = max(1, PIECE // tensor.width)
        for start in range(0, tensor.rows, step):
            yield file.read(tensor, start, min(start + step, tensor.rows))
        return
    rows = change.rows
    if rows is not None:  # of a vector (of each expert, if there are several) each element is a channel
        rows = rows.reshape(tensor.rows, -1 if tensor.elements == rows.size else 1)
    for numbers, weights in row_pieces(file, tensor, change.row_order):
        if change.columns is not None:
            matrix = numbers[0] // tensor.rows_per_matrix if len(change.columns) > 1 else 0
            np.multiply(weights, change.columns[matrix], out=weights)
        if rows is not None:
            np.multiply(weights, rows[numbers], out=weights)
        if tensor.type.name == "f16" and not np.abs(weights).max() <= np.finfo(np.float16).max:
            raise BitladderError(f"{tensor.name}: scaled weights overflow F16; convert with --outtype bf16 or f32")
        placed = weights if change.column_order is None else np.ascontiguousarray(weights[:, change.column_order])
        yield quantize_rows(placed, tensor.type, None)


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


def _changed_inputs(moments: MomentsFile, name: str, change: Change) -> Iterator[Floats]:
    """E[w xxᵀ] of the new inputs, packed, matrix by matrix: they are divided by the scales of a weight's columns."""
    shape = moments.shape(name)
    scales = None if change.columns is None else np.broadcast_to(change.columns, (shape.matrices, shape.n_in))
    for matrix in range(shape.matrices):
        inputs = unpack_triangle(moments.packed(name, matrix))
        if scales is not None:
            inverse = (1 / scales[matrix]).astype(np.float32)
            inputs = inputs * inverse[:, None] * inverse
        if change.column_order is not None:
            inputs = np.ascontiguousarray(inputs[np.ix_(change.column_order, change.column_order)])
        yield pack_triangle(inputs)


def _changed_outputs(outputs: Correlations | LowRank, change: Change) -> Correlations | LowRank:
    """E[ggᵀ] of the new outputs: one that is divided by s has a gradient that is s times larger."""
    values, diagonals = outputs.values, outputs.diagonals
    if change.rows is not None:
        # Correlations stay what they are.
        diagonals = np.asarray(diagonals / np.square(change.rows.reshape(diagonals.shape)), np.float32)
    if change.row_order is None:
        return type(outputs)(values, diagonals)
    if isinstance(outputs, LowRank):
        return LowRank(values[change.row_order], diagonals[:, change.row_order])
    matrix = Correlations(values, diagonals).matrix()[np.ix_(change.row_order, change.row_order)]
    return Correlations.of(pack_triangle(matrix)[None])


def smoothed_moments(
    moments: pathlib.Path, changes: Mapping[str, Change], out: pathlib.Path, model_sha256: str
) -> None:
    """Writes the second moments of the smoothed model.

    They are those that collecting on the smoothed model gives, up to the rounding of F16. The weights of tokens are an
    exception: for v and up they stay those of the gradients before smoothing.

    Parameters:
        moments: path of the second moments of the model before.
        changes: what happened to each tensor.
        out: path to write.
        model_sha256: hash of the smoothed model.

    Raises:
        BitladderError: the file holds no second moments.
    """
    with MomentsFile(moments) as old:
        names = old.names()
        shared = {name: old.entry(name) for name in names if old.entry(name) != name}
        provenance = dataclasses.replace(old.provenance, model_sha256=model_sha256)
        shapes = {name: _changed_shape(old.shape(name), changes.get(name, Change())) for name in names}
        with writing_moments(out, provenance, shapes, shared) as writer:
            for name in names:
                change = changes.get(name, Change())
                if name not in shared:
                    writer.write_inputs(name, _changed_inputs(old, name, change), old.counts(name))
                outputs = old.outputs(name)
                if outputs is not None:
                    writer.write_outputs(name, _changed_outputs(outputs, change))


def _changed_shape(shape: MomentShape, change: Change) -> MomentShape:
    """Outputs in another order are not in blocks any more."""
    return shape if change.row_order is None else dataclasses.replace(shape, blocks=1)
