"""Streaming a model through the library's kernels into a new file.

With the same preset, imatrix and library every tensor's bytes equal llama-quantize's.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

from bitladder.calibrate.imatrix import Imatrix, read_imatrix
from bitladder.engine.presets import preset_number, preset_types
from bitladder.errors import BitladderError
from bitladder.files import replacing
from bitladder.model.reader import GgufFile
from bitladder.model.values import Value, string, u32
from bitladder.model.writer import GgufWriter, TensorPlan, file_size
from bitladder.progress import SILENT, Progress
from bitladder.quantize.importance import importance_of
from bitladder.quantize.stream import stream_tensors

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml.h
# Splits are joined, and the output has the default alignment.
DROPPED = ("split.no", "split.count", "split.tensors.count", "general.alignment")


@dataclasses.dataclass(frozen=True)
class QuantizeResult:
    """The file, its size in bytes, bits per weight (all weights, tensor bytes only), and the type of each tensor."""

    path: pathlib.Path
    bytes: int
    bpw: float
    types: dict[str, str]
    preset: str


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    preset: str,
    *,
    imatrix: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
) -> QuantizeResult:
    """Quantize a full-precision GGUF to a preset.

    Parameters: `source` an F16, BF16 or F32 GGUF; `preset` such as "Q4_K_M"; `imatrix` an importance matrix of the
    same model; `metadata` strings to add to the file's. Raises BitladderError before anything is written if the
    preset, the imatrix or the source cannot be used, and if weights are not finite.
    """
    source, out = pathlib.Path(source), pathlib.Path(out)
    with GgufFile(source) as file:
        if out.exists() and out.samefile(source):
            raise BitladderError(f"{out} is the input; name another output (-o)")
        _refuse_splits(file)
        importance = read_imatrix(imatrix) if imatrix is not None else None
        chosen = preset_types(source, preset, imatrix=importance is not None)
        if chosen.types.keys() != file.tensors.keys():
            odd = sorted(chosen.types.keys() ^ file.tensors.keys())
            raise BitladderError(f"the library and {source} disagree on tensors ({odd[0]}, …); is the file damaged?")
        for name, kind in chosen.types.items():
            have = file.tensors[name].type
            if kind != have and have.quantized:
                raise BitladderError(f"{name} is already {have.name}; quantize from an F16, BF16 or F32 file")
        weights = importance_of(file, chosen, importance, preset, progress)
        if chosen.fallbacks:
            progress.warn(
                f"{chosen.fallbacks} of {len(chosen.types)} tensors have a width that {preset}'s own type cannot hold"
            )
        plans = [TensorPlan(name, file.tensors[name].shape, kind) for name, kind in chosen.types.items()]
        values = _metadata(file, preset, imatrix, importance, metadata or {})
        with (
            replacing(out) as temporary,
            temporary.open("wb") as stream,
            progress.task(f"quantize {preset}", file.tensor_bytes) as bar,
        ):
            writer = GgufWriter(stream, values, plans)
            stream_tensors(writer, file, plans, weights, threads, bar)
            writer.finish()
        elements = sum(file.tensors[p.name].elements for p in plans)
        bpw = 8 * sum(plan.nbytes for plan in plans) / elements
    types = {name: kind.name for name, kind in chosen.types.items()}
    return QuantizeResult(out, file_size(values, plans), bpw, types, preset.upper())


def _refuse_splits(file: GgufFile) -> None:
    count = int(file.get("split.count", 0))
    if count > 1:
        raise BitladderError(
            f"{file.path} is one of {count} splits; join them first: llama-gguf-split --merge {file.path.name} OUT.gguf"
        )


def _metadata(
    file: GgufFile,
    preset: str,
    imatrix_path: str | os.PathLike[str] | None,
    imatrix: Imatrix | None,
    extra: Mapping[str, str],
) -> dict[str, Value]:
    """The source's metadata with what llama-quantize changes and adds, in its order; file names without paths."""
    values = {key: value for key, value in file.metadata.items() if key not in DROPPED}
    own: dict[str, Value] = {
        "general.quantization_version": u32(QUANTIZATION_VERSION),
        "general.file_type": u32(preset_number(preset)),
    }
    if imatrix is not None and imatrix_path is not None:
        own["quantize.imatrix.file"] = string(pathlib.Path(imatrix_path).name)
        if imatrix.datasets:
            own["quantize.imatrix.dataset"] = string(pathlib.PurePath(imatrix.datasets[0]).name)
        own["quantize.imatrix.entries_count"] = u32(len(imatrix.entries))
        if imatrix.chunk_count > 0:
            own["quantize.imatrix.chunks_count"] = u32(imatrix.chunk_count)
    own |= {key: string(text) for key, text in extra.items()}
    for key in own:
        values.pop(key, None)
    return values | own
