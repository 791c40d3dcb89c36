"""Streaming a model through the library's kernels into a new file.

Rows are read, expanded to float32, quantized and written in slabs, so memory does not grow with the model. With the
same preset, imatrix and library every tensor's bytes equal llama-quantize's.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.imatrix import Imatrix, read_imatrix
from bitladder.engine.presets import preset_number, preset_types
from bitladder.engine.types import RowKernels, TensorType
from bitladder.errors import BitladderError
from bitladder.files import replacing
from bitladder.model.reader import GgufFile, TensorInfo
from bitladder.model.values import Value, string, u32
from bitladder.model.writer import GgufWriter, TensorPlan, file_size
from bitladder.progress import SILENT, Progress
from bitladder.quantize.importance import importance_of

Floats = npt.NDArray[np.float32]
SLAB = 1 << 24  # weights expanded at a time: 64 MiB of float32
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml.h
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


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
        weights = importance_of(file, chosen, importance, preset, progress)
        if chosen.fallbacks:
            progress.warn(
                f"{chosen.fallbacks} of {len(chosen.types)} tensors have a width that {preset}'s own type cannot hold"
            )
        plans = [TensorPlan(name, file.tensors[name].shape, kind) for name, kind in chosen.types.items()]
        values = _metadata(file, preset, imatrix, importance, metadata or {})
        kernels = RowKernels(threads)
        try:
            with replacing(out) as temporary, temporary.open("wb") as stream:
                writer = GgufWriter(stream, values, plans)
                with progress.task(f"quantize {preset}", sum(file.tensors[p.name].nbytes for p in plans)) as bar:
                    for plan in plans:
                        bar.note(plan.name)
                        tensor = file.tensors[plan.name]
                        _write_tensor(writer, file, tensor, plan.type, weights.get(plan.name), kernels)
                        bar.advance(tensor.nbytes)
                writer.finish()
        finally:
            kernels.close()
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
    values = {key: value for key, value in file.metadata.items() if key not in SPLIT_KEYS}
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


def _write_tensor(
    writer: GgufWriter,
    file: GgufFile,
    tensor: TensorInfo,
    kind: TensorType,
    importance: Floats | None,
    kernels: RowKernels,
) -> None:
    per_matrix = tensor.rows_per_matrix
    step = max(1, SLAB // tensor.width)
    if kind != tensor.type and tensor.type.quantized:
        raise BitladderError(f"{tensor.name} is already {tensor.type.name}; quantize from an F16, BF16 or F32 file")
    for first in range(0, tensor.rows, per_matrix):
        for start in range(first, first + per_matrix, step):
            data = file.read(tensor, start, min(start + step, first + per_matrix))
            if kind == tensor.type:
                writer.write(tensor.name, data)
                continue
            weights = kernels.dequantize(data, tensor.type, tensor.width)
            _refuse_not_finite(weights, tensor, start)
            row = importance[first // per_matrix] if importance is not None else None
            writer.write(tensor.name, kernels.quantize(weights, kind, row))


def _refuse_not_finite(weights: Floats, tensor: TensorInfo, start: int) -> None:
    # One NaN or Inf spoils the sum, and the sum is far cheaper than looking at each weight.
    if np.isfinite(weights.sum(dtype=np.float64)):
        return
    bad = np.flatnonzero(~np.isfinite(weights.reshape(-1)))
    if len(bad):
        index = start * tensor.width + int(bad[0])
        raise BitladderError(f"{tensor.name} has the weight {weights.reshape(-1)[bad[0]]} at index {index}")
