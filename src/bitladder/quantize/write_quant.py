"""Streams a model through the library's kernels into a new file.

With the same options, imatrix and library every tensor's bytes equal llama-quantize's.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

from bitladder.engine import lost_in, plain_type
from bitladder.files import refuse_inputs
from bitladder.gguf import output_paths, shards_of, writing
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress
from bitladder.quantize.prepare import PreparedQuant, prepare
from bitladder.quantize.quantize_options import QuantizeOptions
from bitladder.quantize.stream import NO_BLOCKS, Blocks, stream_tensors

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
) -> QuantizeResult:
    """Quantizes a GGUF.

    Parameters:
        source: path of an F16, BF16 or F32 GGUF (of any GGUF with allow_requantize).
        out: path of the file to write. A file that exists is replaced.
        options: a preset such as "Q4_K_M", or all options.
        imatrix: path of an importance matrix of the same model, or None.
        threads: of the CPU; None for all.
        progress: where work and warnings are shown.

    Raises:
        BitladderError: before anything is written, if the options, the imatrix or the source cannot be used; and later,
            without leaving a file, if weights are not finite or the disk is full.
    """
    if isinstance(options, str):
        options = QuantizeOptions(preset=options)
    refuse_inputs([out], [*shards_of(pathlib.Path(source)), *([] if imatrix is None else [imatrix])])
    with prepare(source, options, imatrix=imatrix, progress=progress) as prepared:
        return write(prepared, out, threads=threads, progress=progress)


@QUANTIZE.entry
def write(
    prepared: PreparedQuant,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
    blocks: Blocks = NO_BLOCKS,
) -> QuantizeResult:
    """Makes a prepared quant. The file, or its shards, appear when they are complete.

    Parameters:
        prepared: the quant.
        out: path of the file to write.
        threads: of the CPU; None for all.
        progress: where work is shown, and warnings of tensors that lose weights at the small end.
        blocks: name → what makes the tensor's blocks, uint8, shape [rows, row bytes], instead of the library's kernels.

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
        lost = stream_tensors(writer, prepared.file, choice.tensors, prepared.importance, threads, bar, blocks)
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
