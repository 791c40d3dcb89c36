"""Streams a model through the library's kernels into a new file, in pieces that overlap.

Each thread does all the work on one piece. The calling thread writes finished pieces in order. Only a few pieces are in
work at once, so that memory does not grow with the model, and no thread waits at the end of a tensor.

With the same options, imatrix and library every tensor's bytes equal llama-quantize's.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bitladder.engine import TensorType, dequantize_rows, in_order, lost_in, plain_type, quantize_rows, storable
from bitladder.errors import BitladderError
from bitladder.files import refuse_inputs
from bitladder.gguf import GgufFile, TensorInfo, open_model, output_paths, shards_of, writing
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Bar, Progress
from bitladder.quantize.choose_types import TensorChoice
from bitladder.quantize.importance import lost_units
from bitladder.quantize.prepare import PreparedQuant, prepare
from bitladder.quantize.quantize_options import QuantizeOptions

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Blocks = Mapping[str, Callable[[], Bytes]]
NO_BLOCKS: Blocks = {}
PIECE = 1 << 17  # weights: the overhead of a call is negligible, and float32 of them fits the cache of a core
QUANTIZE = Algorithm(
    "quantize",
    (
        "the library's kernels with the preset's types",
        "all of llama-quantize's options, recipes by exact names, metadata in its order",
        "a tensor's blocks may come from elsewhere, and its metadata says from where",
        "a matrix whose importance is 0 throughout is quantized as if all its columns counted alike",
        "prediction heads that no text reaches get Q8_0",
    ),
)


@dataclasses.dataclass(frozen=True)
class QuantizeResult:
    """A quant that was written.

    Parameters:
        path: the file; of several shards the first.
        bytes: size of all shards.
        bpw: bits per weight over all tensors, tensor bytes only.
        types: type of each tensor.
        preset: its name; "" for a recipe without one.
        bpw_blocks: bits per weight over the repeating blocks, tensor bytes only.
    """

    path: pathlib.Path
    bytes: int
    bpw: float
    types: dict[str, str]
    preset: str
    bpw_blocks: float = 0.0


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: str | QuantizeOptions,
    *,
    imatrix: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
    same: Sequence[str | os.PathLike[str]] = (),
) -> QuantizeResult:
    """Quantizes a GGUF.

    Parameters:
        source: path of an F16, BF16 or F32 GGUF (of any GGUF with allow_requantize).
        out: path of the file to write. A file that exists is replaced.
        options: a preset such as "Q4_K_M", or all options.
        imatrix: path of an importance matrix of the same model, or None.
        threads: of the CPU; None for all.
        progress: where work and warnings are shown.
        same: quants that this function has made of the same source with the same imatrix and options, but for the
            types. A tensor that one of them has in the same type is copied from it, which takes a tenth of the time.

    Raises:
        BitladderError: before anything is written, if the options, the imatrix or the source cannot be used; and later,
            without leaving a file, if weights are not finite or the disk is full.
    """
    if isinstance(options, str):
        options = QuantizeOptions(preset=options)
    inputs = [*shards_of(pathlib.Path(source)), *([] if imatrix is None else [imatrix]), *same]
    refuse_inputs([out], inputs)
    with prepare(source, options, imatrix=imatrix, progress=progress) as prepared, contextlib.ExitStack() as opened:
        others = [opened.enter_context(open_model(each)) for each in same]
        return write(prepared, out, threads=threads, progress=progress, same=others)


@QUANTIZE.entry
def write(
    prepared: PreparedQuant,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
    blocks: Blocks = NO_BLOCKS,
    same: Sequence[GgufFile] = (),
) -> QuantizeResult:
    """Makes a prepared quant. The file, or its shards, appear when they are complete.

    Parameters:
        prepared: the quant.
        out: path of the file to write.
        threads: of the CPU; None for all.
        progress: where work is shown, and warnings of tensors that lose weights at the small end.
        blocks: name → what makes the tensor's blocks, uint8, shape [rows, row bytes], instead of the library's kernels.
        same: as of `quantize`.

    Raises:
        BitladderError: `out` cannot be written or is the source, or weights are not finite.
    """
    choice, paths = prepared.choice, output_paths(out, prepared.groups)
    refuse_inputs(paths, prepared.file.parts)
    label = prepared.options.preset or "recipe"
    total = sum(tensor.source.nbytes for tensor in choice.tensors)
    with (
        writing(out, prepared.metadata, prepared.groups) as writer,
        progress.task(f"quantize {label}", total) as bar,
    ):
        lost = stream_tensors(writer, prepared.file, choice.tensors, prepared.importance, threads, bar, blocks, same)
    _warn_of_lost(prepared, lost, progress)
    return QuantizeResult(
        paths[0],
        prepared.bytes,
        prepared.bpw,
        choice.types,
        (prepared.options.preset or "").upper(),
        prepared.bpw_blocks,
    )


def _warn_of_lost(prepared: PreparedQuant, lost: Mapping[str, int], progress: Progress) -> None:
    for tensor in prepared.choice.tensors:
        if tensor.name not in lost:
            continue
        kind, source = tensor.type, tensor.source
        of, unit = (source.elements // kind.block, "blocks") if kind.quantized else (source.rows, "rows")
        columns = prepared.importance.get(tensor.name)
        if columns is not None and not columns.reshape(-1, kind.block).any(axis=1).all():
            progress.warn(
                f"{tensor.name}: {lost[tensor.name]} of {of} {unit} are lost in {kind.name}, because the importance of "
                f"their columns is 0; --exclude-weights {tensor.name} quantizes the tensor without importance"
            )
            continue
        other = "f32" if kind.name == "bf16" else "bf16"
        remedy = f"keep it as {other}: --tensor-type {tensor.name}={other}"
        if plain_type(prepared.options.preset or "Q8_0") is not None:
            remedy = f"take the preset {other.upper()}"
        progress.warn(lost_in(tensor.name, lost[tensor.name], of, kind.name, remedy, unit))


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
        copied: a file that has the blocks, or None.
    """

    name: str
    tensor: TensorInfo
    start: int
    stop: int
    kind: TensorType
    importance: Floats | None
    copied: GgufFile | None = None


def stream_tensors(
    writer: TensorWriter,
    file: GgufFile,
    tensors: Sequence[TensorChoice],
    importance: Mapping[str, Floats],
    threads: int | None,
    bar: Bar,
    blocks: Blocks = NO_BLOCKS,
    same: Sequence[GgufFile] = (),
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
        same: as of `quantize`.

    Returns:
        How many blocks of a tensor (rows, of a floating-point type) lose their weights, by name, if any do
        (`lost_blocks`).

    Raises:
        BitladderError: weights are not finite, those of copied tensors included. No thread is left running.
    """
    lost: dict[str, int] = {}
    works = (
        functools.partial(_make, file, piece, blocks.get(piece.name))
        for piece in _pieces(tensors, importance, blocks, same)
    )
    with contextlib.closing(in_order(works, threads)) as pieces:
        for piece, data, units in pieces:
            writer.write(piece.name, data)
            if units:
                lost[piece.name] = lost.get(piece.name, 0) + units
            bar.note(piece.name)
            bar.advance((piece.stop - piece.start) * piece.tensor.type.row_bytes(piece.tensor.width))
    return lost


def _pieces(
    tensors: Sequence[TensorChoice],
    importance: Mapping[str, Floats],
    whole: Collection[str],
    same: Sequence[GgufFile],
) -> Iterator[_Piece]:
    for chosen in tensors:
        tensor, columns = chosen.source, importance.get(chosen.name)
        if chosen.name in whole:
            yield _Piece(chosen.name, tensor, 0, tensor.rows, chosen.type, None)
            continue
        copied = next((file for file in same if _holds(file, chosen)), None)
        step = max(1, PIECE // tensor.width)
        for matrix, first in enumerate(range(0, tensor.rows, tensor.rows_per_matrix)):
            end = first + tensor.rows_per_matrix
            for start in range(first, end, step):
                row = columns[matrix] if columns is not None else None
                yield _Piece(chosen.name, tensor, start, min(start + step, end), chosen.type, row, copied)


def _holds(file: GgufFile, chosen: TensorChoice) -> bool:
    """Whether a file has the tensor in the same quantized type."""
    tensor = file.tensors.get(chosen.name)
    return (
        chosen.type.quantized
        and tensor is not None
        and tensor.type == chosen.type
        and tensor.shape == chosen.source.shape
    )


def _make(file: GgufFile, piece: _Piece, elsewhere: Callable[[], Bytes] | None) -> tuple[_Piece, Bytes, int]:
    """The piece, its bytes, and how many of its blocks lose their weights."""
    return piece, *_bytes_of(file, piece, elsewhere)


def _bytes_of(file: GgufFile, piece: _Piece, elsewhere: Callable[[], Bytes] | None) -> tuple[Bytes, int]:
    if elsewhere is not None:
        blocks, tensor = elsewhere(), piece.tensor
        step = max(1, PIECE // tensor.width)
        lost = 0
        for start in range(piece.start, piece.stop, step):
            data = file.read(tensor, start, min(start + step, piece.stop))
            lost += lost_units(
                dequantize_rows(data, tensor.type, tensor.width), blocks[start : start + len(data)], piece.kind, None
            )
        return blocks, lost
    data = file.read(piece.tensor, piece.start, piece.stop)
    if piece.kind == piece.tensor.type and not storable(piece.kind):
        return data, 0  # integers and the like
    weights = dequantize_rows(data, piece.tensor.type, piece.tensor.width)
    _refuse_not_finite(weights, piece)
    if piece.kind == piece.tensor.type:
        return data, 0
    if piece.copied is not None:
        data = piece.copied.read(piece.copied.tensors[piece.name], piece.start, piece.stop)
    else:
        data = quantize_rows(weights, piece.kind, piece.importance)
    return data, lost_units(weights, data, piece.kind, piece.importance)


def _refuse_not_finite(weights: Floats, piece: _Piece) -> None:
    # One NaN or Inf spoils the sum. The sum costs far less than a test of each weight.
    if np.isfinite(weights.sum(dtype=np.float64)):
        return
    bad = np.flatnonzero(~np.isfinite(weights.reshape(-1)))
    index = piece.start * piece.tensor.width + int(bad[0])
    raise BitladderError(f"{piece.tensor.name} has the weight {weights.reshape(-1)[bad[0]]} at index {index}")
