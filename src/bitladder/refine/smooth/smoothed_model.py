"""Writing a smoothed model: the same tensors and types, scales moved and channels ordered, and the same logits.

Its importance matrix and second moments change with it.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bitladder.calibrate import (
    Correlations,
    Imatrix,
    LowRank,
    MomentsFile,
    MomentShape,
    pack_triangle,
    read_imatrix,
    write_imatrix,
    writing_moments,
)
from bitladder.engine import in_order, logit_differences, quantize_rows, sequence_logits
from bitladder.errors import BitladderError, UsageError
from bitladder.files import refuse_inputs, replacing, sha256_file
from bitladder.gguf import GgufFile, TensorInfo, open_model
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress
from bitladder.refine.model_files import PIECE, Bytes, Floats, Indices, ModelFiles, copy_model, expanded, row_spans
from bitladder.refine.options import SmoothingOptions
from bitladder.refine.smooth.links import FLOATS, Link, SmoothingError, link_importance, link_scales, links_of
from bitladder.refine.smooth.order import Order, find_order
from bitladder.units import number_of

SMOOTHING = Algorithm(
    "smoothing",
    (
        "channels are rescaled by powers of two between norms, v, up and the weights behind them",
        "channels are ordered where the head cannot be scaled",
        "the norm before a head stays where prediction heads share the head",
    ),
)

KEY = "bitladder.smooth.imatrix.sha256"  # in files that are smoothed: the importance matrix they were smoothed by
CHECKED_TOKENS = 64


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
        out[start : start + step] = _changed(whole[within], tensor, change, within + first)
    return out


def _changed_piece(file: GgufFile, tensor: TensorInfo, change: Change, start: int, stop: int) -> Bytes:
    data = file.read(tensor, start, stop)
    return data if change.nothing else _changed(data, tensor, change, np.arange(start, stop))


def _changed(data: Bytes, tensor: TensorInfo, change: Change, numbers: Indices) -> Bytes:
    """Rows of one matrix with these numbers, changed, in the same order."""
    weights = expanded(data, tensor)
    if change.columns is not None:
        matrix = numbers[0] // tensor.rows_per_matrix if len(change.columns) > 1 else 0
        np.multiply(weights, change.columns[matrix], out=weights)
    if change.rows is not None:
        # Of a vector (of each expert, if there are several) each element is a channel.
        rows = change.rows.reshape(tensor.rows, -1 if tensor.elements == change.rows.size else 1)
        np.multiply(weights, rows[numbers], out=weights)
    if tensor.type.name == "f16" and not max(weights.max(), -weights.min()) <= np.finfo(np.float16).max:
        raise BitladderError(f"{tensor.name}: scaled weights overflow F16; convert with --outtype bf16 or f32")
    placed = weights if change.column_order is None else np.ascontiguousarray(weights[:, change.column_order])
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


def smoothed_moments(
    moments: pathlib.Path,
    changes: Mapping[str, Change],
    out: pathlib.Path,
    model_sha256: str,
    threads: int | None = None,
) -> None:
    """Writes the second moments of the smoothed model.

    They are those that collecting on the smoothed model gives, up to the rounding of F16. The weights of tokens are an
    exception: for v and up they stay those of the gradients before smoothing.

    Parameters:
        moments: path of the second moments of the model before.
        changes: what happened to each tensor.
        out: path to write.
        model_sha256: hash of the smoothed model.
        threads: threads of the CPU; None takes all. Each has the moments of a matrix in memory.

    Raises:
        BitladderError: the file holds no second moments.
    """
    with MomentsFile(moments) as old:
        names = old.names()
        shared = {name: old.entry(name) for name in names if old.entry(name) != name}
        provenance = dataclasses.replace(old.provenance, model_sha256=model_sha256)
        shapes = {name: _changed_shape(old.shape(name), changes.get(name, Change())) for name in names}
        with (
            writing_moments(out, provenance, shapes, shared) as writer,
            contextlib.closing(in_order(_changed_moments(old, changes, shared), threads, ahead=1)) as made,
        ):
            for name, shape in shapes.items():
                if name not in shared:
                    writer.write_inputs(name, itertools.islice(made, shape.matrices), old.counts(name))
                if shape.n_out:
                    writer.write_outputs(name, next(made))


def _changed_moments(
    old: MomentsFile, changes: Mapping[str, Change], shared: Collection[str]
) -> Iterator[Callable[[], Any]]:
    """What makes the new moments of each weight: of its inputs, matrix by matrix, if it has its own; of its outputs."""
    for name in old.names():
        change, shape = changes.get(name, Change()), old.shape(name)
        if name not in shared:
            for matrix in range(shape.matrices):
                yield functools.partial(_changed_inputs, old, name, change, matrix)
        if shape.n_out:
            yield functools.partial(_changed_outputs, old, name, change)


def _changed_shape(shape: MomentShape, change: Change) -> MomentShape:
    """Outputs in another order are not in blocks any more."""
    return shape if change.row_order is None else dataclasses.replace(shape, blocks=1)


@dataclasses.dataclass(frozen=True)
class SmoothResult:
    """A smoothed model.

    Parameters:
        links: links used, by kind.
        head_noise: the expected factor of the error of the head's rounded inputs; None if the order stayed.
        moved: how far logits moved at most, as a share of their range.
        changes: what happened to each tensor.
    """

    links: dict[str, int]
    head_noise: float | None
    moved: float
    changes: dict[str, Change] = dataclasses.field(repr=False)


@SMOOTHING.entry
def smooth_model(
    source: ModelFiles,
    out: ModelFiles,
    options: SmoothingOptions | None = None,
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> SmoothResult:
    """Writes a model whose channels are rescaled and ordered, its importance matrix and its second moments.

    The logits of some tokens are compared. A kind of link that changes them is left out, with a warning, and so is the
    order.

    Parameters:
        source: an F32, F16 or BF16 model, its importance matrix and its second moments.
        out: paths of the files to write; as many second moments as `source` has.
        options: what is done.
        threads: threads of the CPU; None takes all.
        progress: where work is shown.

    Raises:
        SmoothingError: weights are quantized, or nothing can change without changing the logits.
        BitladderError: the matrix is of another model, or scaled weights overflow.
    """
    options = options or SmoothingOptions()
    if source.imatrix is None or out.imatrix is None:
        raise UsageError("smoothing needs an importance matrix: pass --imatrix")
    matrix, digest = read_imatrix(source.imatrix), sha256_file(source.imatrix)
    with open_model(source.model) as file:
        refuse_inputs([out.model, out.imatrix, *out.moments], [*file.parts, source.imatrix, *source.moments])
        if file.get(KEY):
            raise BitladderError(f"{file.path} is smoothed already")
        _refuse_other_imatrix(file, matrix, source.imatrix)
        parts = _Parts(
            link_scales(file, _links(file, matrix, source.imatrix), matrix, options, progress)
            if options.scales
            else [],
            find_order(file, options, threads) if options.order else None,
        )
        if not parts.names():
            raise SmoothingError(
                f"{file.path}: no other order of channels is known to be better; one is sought where embeddings are "
                "the head and their width is a multiple of 256"
            )
        with replacing(out.model) as temporary:
            attempt = _Attempt(file, digest, temporary, threads)
            moved = attempt.moved(parts, progress)
            if not moved <= options.tolerance:
                neutral = [name for name in parts.names() if attempt.moved(parts.only([name])) <= options.tolerance]
                parts = parts.only(neutral)
                progress.warn(
                    f"{file.path.name} has other tensors that read channels: only {', '.join(neutral) or 'nothing'} "
                    "can change"
                )
                moved = attempt.moved(parts, progress)
            if not parts.names() or not moved <= options.tolerance:
                raise SmoothingError(f"{file.path}: no scale can move without changing the logits; do not smooth it")
    changes = parts.changes()
    write_imatrix(changed_imatrix(matrix, changes), out.imatrix)
    if source.moments:
        model_sha256 = sha256_file(out.model)
        for old, new in zip(source.moments, out.moments, strict=True):
            smoothed_moments(old, changes, new, model_sha256, threads)
    return SmoothResult(parts.links(), None if parts.order is None else parts.order.noise, moved, changes)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What can be done to a model: scales by link, and an order."""

    scales: list[tuple[Link, Floats]]
    order: Order | None

    def names(self) -> list[str]:
        """Kinds of links, and "order"."""
        return [*dict.fromkeys(link.kind for link, _ in self.scales), *(["order"] if self.order else [])]

    def only(self, names: Sequence[str]) -> "_Parts":
        """The parts of these names."""
        kept = [(link, scale) for link, scale in self.scales if link.kind in names]
        return _Parts(kept, self.order if "order" in names else None)

    def links(self) -> dict[str, int]:
        """How many links of each kind."""
        return dict(collections.Counter(link.kind for link, _ in self.scales))

    def changes(self) -> dict[str, Change]:
        """What happens to each tensor."""
        return changes_of(self.scales, self.order)


class _Attempt:
    """Writes changed models to one path, and compares their logits with those of the model before."""

    def __init__(self, file: GgufFile, digest: str, out: pathlib.Path, threads: int | None) -> None:
        self._file, self._digest, self._out, self._threads = file, digest, out, threads
        vocabulary = file.tensors["token_embd.weight"].shape[1]
        self._tokens = np.random.default_rng(0).integers(0, vocabulary, CHECKED_TOKENS).astype(np.int32)
        self._logits = sequence_logits(file.path, self._tokens, threads=threads)

    def moved(self, parts: _Parts, progress: Progress = SILENT) -> float:
        """The largest difference of logits, as a share of the range of those of the position."""
        changes: Mapping[str, Change] = parts.changes()
        copy_model(
            self._file,
            self._out,
            (KEY, self._digest),
            lambda tensor: changed_rows(self._file, tensor, changes.get(tensor.name, Change())),
            label="write the smoothed model",
            threads=self._threads,
            progress=progress,
        )
        logits = sequence_logits(self._out, self._tokens, threads=self._threads)
        return float(logit_differences(logits, self._logits).max())


def _refuse_other_imatrix(file: GgufFile, matrix: Imatrix, path: pathlib.Path) -> None:
    """An order needs no entry of any link, but it moves the columns of all links."""
    for name, entry in matrix.entries.items():
        tensor = file.tensors.get(name)
        if tensor is not None and entry.sums.shape[1] != tensor.width:
            raise BitladderError(
                f"{path} belongs to another model: {name} has {number_of(entry.sums.shape[1], 'column')} there"
            )
    if not matrix.entries.keys() & file.tensors.keys():
        raise BitladderError(f"{path} belongs to another model: it has no entry for {file.path.name}'s weights")


def _links(file: GgufFile, matrix: Imatrix, path: pathlib.Path) -> list[Link]:
    """The links whose importance is known. Raises SmoothingError if weights are quantized."""
    links = [link for link in links_of(file) if link_importance(matrix, link) is not None]
    if not links:
        raise BitladderError(f"{path} belongs to another model: it has no entry for {file.path.name}'s weights")
    for link in links:
        for name in (*link.makers, *link.readers):
            kind = file.tensors[name].type.name
            if kind not in FLOATS:
                raise SmoothingError(
                    f"{file.path}: {name} is {kind}; scales move between F32, F16 or BF16 weights only, so smooth the "
                    "full-precision model"
                )
    return links
