"""Everything about a quant before a byte is written: types, importance, llama-quantize's metadata, exact size."""

import dataclasses
import importlib.metadata
import math
import os
import pathlib
from collections.abc import Mapping

from bitladder.calibrate import Imatrix, read_imatrix
from bitladder.engine import Request, TensorType, preset_number, preset_types, presets
from bitladder.errors import BitladderError
from bitladder.files import Closing
from bitladder.gguf import (
    BOOL,
    F32,
    GgufFile,
    TensorPlan,
    Value,
    block_of,
    group_as,
    group_by_size,
    open_model,
    scalar,
    split_sizes,
    string,
    u32,
)
from bitladder.progress import SILENT, Progress
from bitladder.quantize.choose_types import ChosenTypes, choose
from bitladder.quantize.importance import Floats, importance_of, selected
from bitladder.quantize.prune import pruned_metadata
from bitladder.quantize.quantize_options import QuantizeOptions, check_options
from bitladder.recipe import RECIPE_KEY, recipe_sha256

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml.h
# The output is one file with the default alignment. The writer of shards adds its own split.*.
DROPPED = ("split.no", "split.count", "split.tensors.count", "general.alignment")
VERSION_KEY = "bitladder.version"
TUNE_KEY = "bitladder.tune"  # in files whose scales were tuned: how, and on how much text


def quant_metadata(
    file: GgufFile,
    choice: ChosenTypes,
    file_type: int,
    imatrix: tuple[str | os.PathLike[str], Imatrix] | None,
    extra: Mapping[str, str],
) -> dict[str, Value]:
    """The metadata to write. Names of files are stored without their folders.

    Parameters:
        file: the source.
        choice: the types.
        file_type: a llama_ftype, as of `file_type`.
        imatrix: path of the importance matrix and the entries that are used, or None.
        extra: strings to add.
    """
    values = {key: value for key, value in file.metadata.items() if key not in DROPPED}
    own: dict[str, Value] = {
        "general.quantization_version": u32(QUANTIZATION_VERSION),
        "general.file_type": u32(file_type),
    }
    # At the end of the metadata, as llama-quantize writes them.
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
    """A value of --override-kv as llama-quantize writes it: integers in 32 bits, without their sign."""
    if isinstance(value, bool):
        return scalar(BOOL, value)
    if isinstance(value, int):
        return u32(abs(value))
    return scalar(F32, value) if isinstance(value, float) else string(value)


def file_type(file: GgufFile, options: QuantizeOptions, choice: ChosenTypes) -> int:
    """The llama_ftype to write into general.file_type, by which other programs name a quant.

    It is the preset's own, as llama-quantize writes it. COPY keeps the source's. A recipe without a preset gets that of
    the nearest preset.
    """
    if options.preset is not None and not options.copies:
        return preset_number(options.preset)
    if options.copies and (known := file.get("general.file_type")) is not None:
        return int(known)
    return nearest_preset(file, choice)


def nearest_preset(file: GgufFile, choice: ChosenTypes) -> int:
    """The number of the preset whose tensor bytes on this model are nearest to the choice's.

    Of several presets it is the one with the same type for most weights, and of these the lowest number.
    """
    shapes = {tensor.name: tensor.source for tensor in choice.tensors}
    chosen = {tensor.name: tensor.type for tensor in choice.tensors}

    def size(types: dict[str, TensorType]) -> int:
        return sum(kind.row_bytes(shapes[name].width) * shapes[name].rows for name, kind in types.items())

    ranked = []
    for number in presets().values():
        try:
            types = preset_types(file.path, _plain(choice.request, number)).types
        except BitladderError:
            continue  # a number without a preset, or a width that no type of the preset can hold
        same = sum(shapes[name].elements for name, kind in types.items() if chosen[name] == kind)
        ranked.append((abs(size(types) - size(chosen)), -same, number))
    return min(ranked)[2]


def _plain(request: Request, number: int) -> Request:
    return Request(str(number), imatrix=request.imatrix, kv=request.kv, prune_layers=request.prune_layers)


@dataclasses.dataclass(frozen=True)
class PreparedQuant(Closing):
    """A quant that is ready to be made. Closing it closes the source.

    Parameters:
        file: the source.
        options: the options of the quant.
        choice: the types.
        importance: name → importance of its columns, float32, shape [matrices, width].
        metadata: the metadata of the new file.
        groups: the tensors of each shard; one group for one file.
    """

    file: GgufFile
    options: QuantizeOptions
    choice: ChosenTypes
    importance: dict[str, Floats]
    metadata: dict[str, Value]
    groups: tuple[tuple[TensorPlan, ...], ...]

    def close(self) -> None:
        """Closes the source."""
        self.file.close()

    @property
    def bytes(self) -> int:
        """Size of the file or shards, headers and padding included."""
        return sum(split_sizes(self.metadata, self.groups))

    @property
    def plans(self) -> tuple[TensorPlan, ...]:
        """All tensors, in the order they are written."""
        return tuple(plan for group in self.groups for plan in group)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors, tensor bytes only."""
        return _bpw(self.plans)

    @property
    def bpw_blocks(self) -> float:
        """Bits per weight over the tensors of the repeating blocks; 0 if there are none."""
        return _bpw(tuple(plan for plan in self.plans if block_of(plan.name) is not None))


def prepare(
    source: str | os.PathLike[str],
    options: QuantizeOptions,
    *,
    imatrix: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress = SILENT,
) -> PreparedQuant:
    """Decides how a GGUF is quantized. Nothing is written.

    Parameters:
        source: path of a GGUF.
        options: preset, recipe, patterns and so on.
        imatrix: path of an importance matrix of the same model, or None.
        metadata: strings to add to the file's metadata.
        progress: where warnings go.

    Raises:
        BitladderError: the options, the imatrix or the source cannot be used.
    """
    check_options(options)
    file = open_model(source)
    try:
        used = selected(read_imatrix(imatrix) if imatrix is not None else None, options)
        if imatrix is None and (options.include_weights or options.exclude_weights):
            progress.warn("--include-weights and --exclude-weights have no effect without --imatrix")
        choice = choose(file, options, importance=None if used is None else used.entries.keys())
        importance = importance_of(file.path, choice, used, progress)
        for line in choice.warnings:
            progress.warn(line)
        extra = {**(metadata or {}), RECIPE_KEY: recipe_sha256(choice.types)}
        number = file_type(file, options, choice)
        origin = (imatrix, used) if imatrix is not None and used is not None else None
        values = quant_metadata(file, choice, number, origin, extra)
        return PreparedQuant(file, options, choice, importance, values, _groups(options, choice))
    except BaseException:
        file.close()
        raise


def _groups(options: QuantizeOptions, choice: ChosenTypes) -> tuple[tuple[TensorPlan, ...], ...]:
    plans = [TensorPlan(tensor.name, tensor.source.shape, tensor.type) for tensor in choice.tensors]
    groups = [plans]
    if options.keep_split:
        groups = group_as(plans, {tensor.name: tensor.source for tensor in choice.tensors})
    elif options.split_max_bytes is not None:
        groups = group_by_size(plans, options.split_max_bytes)
    return tuple(map(tuple, groups))


def _bpw(plans: tuple[TensorPlan, ...]) -> float:
    weights = sum(math.prod(plan.shape) for plan in plans)
    return 8 * sum(plan.nbytes for plan in plans) / weights if weights else 0.0
