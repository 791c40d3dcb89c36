"""Streaming a model through the library's kernels into a new file.

With the same options, imatrix and library every tensor's bytes equal llama-quantize's.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Mapping

from bitladder.errors import BitladderError
from bitladder.gguf.split_writer import output_paths, writing
from bitladder.progress import SILENT, Progress
from bitladder.quantize.prepare import Prepared, prepare
from bitladder.quantize.quantize_options import QuantizeOptions
from bitladder.quantize.stream import Bytes, stream_tensors


@dataclasses.dataclass(frozen=True)
class QuantizeResult:
    """The file (of several shards the first), the size of all in bytes, bits per weight, and the type of each tensor.

    `bpw` counts all weights and tensor bytes only, `bpw_blocks` those of the repeating blocks; `preset` is "" for a
    recipe without one.
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
    metadata: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize a GGUF.

    Parameters: `source` an F16, BF16 or F32 GGUF (or any, with allow_requantize); `out` the file to write, replaced if
    it exists; `options` a preset such as "Q4_K_M", or more; `imatrix` an importance matrix of the same model;
    `metadata` as for `prepare`. Raises BitladderError before anything is written if the options, the
    imatrix or the source cannot be used; and, leaving no file, if weights are not finite or the disk is full.
    """
    if isinstance(options, str):
        options = QuantizeOptions(preset=options)
    refuse_target(source, out)
    with prepare(source, options, imatrix=imatrix, metadata=metadata, progress=progress) as prepared:
        return write(prepared, out, threads=threads, progress=progress)


def write(
    prepared: Prepared,
    out: str | os.PathLike[str],
    *,
    threads: int | None = None,
    progress: Progress = SILENT,
    rendered: Collection[str] = (),
    blocks: Callable[[str], Bytes] | None = None,
) -> QuantizeResult:
    """Make what was prepared, in one step: `out`, or its shards, appear when they are complete.

    The bytes of the tensors in `rendered` come from `blocks`, see `stream_tensors`. Raises BitladderError that names
    `out` if it cannot be written or is the source, and the tensor if weights are not finite.
    """
    choice, paths = prepared.choice, output_paths(out, prepared.groups)
    for path in paths:
        for part in prepared.file.parts:
            refuse_target(part, path)
    label = prepared.options.preset or "recipe"
    total = sum(tensor.source.nbytes for tensor in choice.tensors)
    with (
        writing(out, prepared.metadata, prepared.groups) as writer,
        progress.task(f"quantize {label}", total) as bar,
    ):
        stream_tensors(writer, prepared.file, choice.tensors, prepared.importance, threads, bar, rendered, blocks)
    return QuantizeResult(
        paths[0],
        prepared.bytes,
        prepared.bpw,
        choice.types,
        (prepared.options.preset or "").upper(),
        prepared.bpw_blocks,
    )


def refuse_target(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Raise BitladderError if the output is a directory or the source itself."""
    source, out = pathlib.Path(source), pathlib.Path(out)
    if out.is_dir():
        raise BitladderError(f"{out} is a directory; name a file (-o)")
    if out.exists() and source.exists() and out.samefile(source):
        raise BitladderError(f"{out} is the input; name another output (-o)")
