"""Everything about a quant before a byte is written: types, importance, metadata, exact size."""

import dataclasses
import math
import os
from collections.abc import Mapping

from bitladder.calibrate import read_imatrix
from bitladder.closing import Closing
from bitladder.gguf import GgufFile, TensorPlan, Value, block_of, group_as, group_by_size, open_model, split_sizes
from bitladder.progress import SILENT, Progress
from bitladder.quantize.choose_types import ChosenTypes, choose
from bitladder.quantize.importance import Floats, importance_of, selected
from bitladder.quantize.quant_metadata import file_type, quant_metadata
from bitladder.quantize.quantize_options import QuantizeOptions, check_options
from bitladder.recipe import RECIPE_KEY, recipe_sha256


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
        choice = choose(file, options, imatrix=used is not None)
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
