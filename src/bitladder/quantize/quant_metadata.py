"""Metadata of a quant: the source's, with what llama-quantize changes and adds, in its order, and two keys of ours."""

import importlib.metadata
import os
import pathlib
from collections.abc import Mapping

from bitladder.calibrate import Imatrix
from bitladder.gguf.reader import GgufFile
from bitladder.gguf.values import BOOL, F32, Value, scalar, string, u32
from bitladder.quantize.choose_types import Choice
from bitladder.quantize.prune import pruned_metadata

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml.h
# The output is one file with the default alignment; a writer of shards adds its own split.*.
DROPPED = ("split.no", "split.count", "split.tensors.count", "general.alignment")
VERSION_KEY, RECIPE_KEY = "bitladder.version", "bitladder.recipe.sha256"
TUNE_KEY = "bitladder.tune"  # in files whose scales were tuned: on how much, and how


def quant_metadata(
    file: GgufFile,
    choice: Choice,
    file_type: int,
    imatrix: tuple[str | os.PathLike[str], Imatrix] | None,
    extra: Mapping[str, str],
) -> dict[str, Value]:
    """The metadata to write.

    Parameters: `file_type` a llama_ftype; `imatrix` the path and the entries used, or None; `extra` strings to add.
    Names of files are stored without their folders.
    """
    values = {key: value for key, value in file.metadata.items() if key not in DROPPED}
    own: dict[str, Value] = {
        "general.quantization_version": u32(QUANTIZATION_VERSION),
        "general.file_type": u32(file_type),
    }
    # Set anew at the end, as llama-quantize does.
    own |= {key: _value(value) for key, value in choice.request.kv.items()}
    if imatrix is not None:
        path, used = imatrix
        own["quantize.imatrix.file"] = string(pathlib.Path(path).name)
        if used.datasets:
            own["quantize.imatrix.dataset"] = string(pathlib.PurePath(used.datasets[0]).name)
        own["quantize.imatrix.entries_count"] = u32(len(used.entries))
        if used.chunk_count > 0:
            own["quantize.imatrix.chunks_count"] = u32(used.chunk_count)
    if choice.pruning is not None:
        values = pruned_metadata(values, choice.pruning, file.architecture)
        count = f"{file.architecture}.block_count"
        own[count] = values[count]
    own[VERSION_KEY] = string(importlib.metadata.version("bitladder"))
    own |= {key: string(text) for key, text in extra.items()}
    for key in own:
        values.pop(key, None)
    return values | own


def _value(value: int | float | bool | str) -> Value:
    """An overriding value as llama-quantize writes it: integers unsigned, in 32 bits, without their sign."""
    if isinstance(value, bool):
        return scalar(BOOL, value)
    if isinstance(value, int):
        return u32(abs(value))
    return scalar(F32, value) if isinstance(value, float) else string(value)
