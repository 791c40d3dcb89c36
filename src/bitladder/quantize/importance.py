"""From an imatrix to the importance of each tensor's columns. What is missing is reported before work starts."""

import dataclasses
import pathlib

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import Imatrix, zeros_in
from bitladder.engine import (
    TensorType,
    dequantize_into,
    kernel_needs_importance,
    lost_rows,
    plain_type,
    preset_types,
    quantize_rows,
    type_by_name,
)
from bitladder.errors import BitladderError, UsageError
from bitladder.progress import Progress
from bitladder.quantize.choose_types import BASE, EMBEDDINGS, OUTPUT, ChosenTypes, TensorChoice
from bitladder.quantize.prune import pruned_entries
from bitladder.quantize.quantize_options import QuantizeOptions
from bitladder.recipe import exact_patterns
from bitladder.units import number_of, some_of

Floats = npt.NDArray[np.float32]


def selected(imatrix: Imatrix | None, options: QuantizeOptions) -> Imatrix | None:
    """The imatrix with the entries that --include-weights or --exclude-weights leave; None if none is left.

    Any part of a name selects a weight, as in llama-quantize. Raises UsageError for a part that is in no name.
    """
    parts = options.include_weights or options.exclude_weights
    if imatrix is None or not parts:
        return imatrix
    option = "--include-weights" if options.include_weights else "--exclude-weights"
    for part in parts:
        if not any(part in name for name in imatrix.entries):
            raise UsageError(f"{option} {part}: no entry of the imatrix has that in its name")
    keep = bool(options.include_weights)
    entries = {name: entry for name, entry in imatrix.entries.items() if any(part in name for part in parts) == keep}
    return dataclasses.replace(imatrix, entries=entries) if entries else None


def importance_of(
    path: pathlib.Path, choice: ChosenTypes, imatrix: Imatrix | None, progress: Progress
) -> dict[str, Floats]:
    """The importance of the columns of each tensor that will be quantized.

    Parameters:
        path: the source.
        choice: the types.
        imatrix: the importance matrix, or None.
        progress: where warnings go.

    Returns:
        Name in the new file → mean squared inputs, float32, shape [matrices, width]. A tensor without data is missing:
        it is quantized unweighted, with a warning.

    Raises:
        BitladderError: the imatrix belongs to another model, or has no entry where a type needs one.
    """
    changing = [tensor for tensor in choice.tensors if tensor.changes]
    weighted: dict[str, Floats] = {}
    if imatrix is not None:
        if not imatrix.entries.keys() & {tensor.source.name for tensor in choice.tensors}:
            some = next(iter(imatrix.entries))
            raise BitladderError(f"the imatrix belongs to another model: {path} has no tensor {some}")
        entries = imatrix.entries if choice.pruning is None else pruned_entries(imatrix.entries, choice.pruning)
        used = dataclasses.replace(imatrix, entries=entries)
        weighted = {tensor.name: columns for tensor in changing if (columns := _columns(tensor, used)) is not None}
        _warn(weighted, changing, used, progress)
    if imatrix is not None or choice.needs_imatrix or any(kernel_needs_importance(tensor.type) for tensor in changing):
        _refuse_unweighted(path, choice, [tensor for tensor in changing if tensor.name not in weighted], imatrix)
    return weighted


def _columns(tensor: TensorChoice, imatrix: Imatrix) -> Floats | None:
    source = tensor.source
    columns = imatrix.columns(tensor.name, source)
    if columns is None and tensor.name in imatrix.entries and tensor.name not in EMBEDDINGS:
        raise BitladderError(
            f"the imatrix belongs to another model: {source.name} has "
            f"{number_of(imatrix.entries[tensor.name].sums.size, 'entry', 'entries')} there, but "
            f"{number_of(source.width, 'column')} × {source.rows // source.rows_per_matrix} here"
        )
    return columns


def _warn(weighted: dict[str, Floats], changing: list[TensorChoice], imatrix: Imatrix, progress: Progress) -> None:
    # Embeddings and head have no entry in most matrices. Types that are not quantized are never weighted.
    usual = (*EMBEDDINGS, *OUTPUT)
    without = [t.name for t in changing if t.name not in weighted and t.name not in usual and t.type.quantized]
    if without:
        progress.warn(f"the imatrix has no entry for {some_of(without, 'tensor')}: quantized unweighted")
    if zeros := zeros_in(imatrix, weighted):
        progress.warn(zeros)
    gaps = {name: experts for name, experts in imatrix.gaps().items() if name in weighted}
    if gaps:
        some = ", ".join(list(gaps)[:4]) + (", …" if len(gaps) > 4 else "")
        alone = not all(imatrix.entries[name].stands_in for name in gaps)
        progress.warn(
            f"no token reached {number_of(sum(map(len, gaps.values())), 'expert')} of {number_of(len(gaps), 'tensor')} "
            f"({some}; bitladder stats lists them): "
            + ("their columns count alike, as with llama-quantize" if alone else "they have the mean of the others")
        )


def _refuse_unweighted(
    path: pathlib.Path, choice: ChosenTypes, unweighted: list[TensorChoice], imatrix: Imatrix | None
) -> None:
    """Raises BitladderError for a tensor without importance whose type needs it.

    The library decides, by a request in which only these tensors have their types.
    """
    refused = next((tensor for tensor in unweighted if kernel_needs_importance(tensor.type)), None)
    if refused is None:
        if not _needed(path, choice, unweighted):
            return
        while len(unweighted) > 1:  # halved until the refused tensor is left
            half = unweighted[: len(unweighted) // 2]
            unweighted = half if _needed(path, choice, half) else unweighted[len(half) :]
        refused = unweighted[0]
    if imatrix is None:
        raise BitladderError(
            f"{refused.name} would become {refused.type.name}, which cannot be made without an importance matrix; "
            "pass --imatrix"
        )
    raise BitladderError(
        f"the imatrix has no entry for {refused.name}, which would become {refused.type.name}; calibrate this model, "
        f"or give the tensor another type: --tensor-type {refused.name}=q4_K"
    )


def _needed(path: pathlib.Path, choice: ChosenTypes, tensors: list[TensorChoice]) -> bool:
    if not tensors:
        return False
    others = ((".*", type_by_name(BASE)),)
    request = dataclasses.replace(
        choice.request,
        preset=BASE if plain_type(choice.request.preset) is not None else choice.request.preset,
        overrides=(*exact_patterns({tensor.name: tensor.type for tensor in tensors}), *others),
        output_tensor_type=None,
        token_embedding_type=None,
        imatrix=False,
    )
    return preset_types(path, request).needs_imatrix


Bytes = npt.NDArray[np.uint8]

# Types keep scales as F16 times small integers. No scale vanishes in a block with a larger weight than this.
_SAFE = 2.0**-8
# A block is lost if its squared error is more than this share of its squares, and more than twice that of the same
# block scaled to 1: then the type is not at fault, but its smallest scale.
_LOST = 0.25


def lost_units(weights: Floats, data: Bytes, kind: TensorType, importance: Floats | None) -> int:
    """How many blocks of a quantized type, or rows of a floating-point type, lose their weights.

    Parameters:
        weights: the weights, float32 [rows, width].
        data: the weights in the type, uint8 [rows, row bytes].
        kind: the type.
        importance: of the columns, float32 [width], or None.
    """
    if kind.name == "f32":
        return 0
    if not kind.quantized:
        stored = np.empty_like(weights)
        dequantize_into(np.ascontiguousarray(data), kind, stored)
        return lost_rows(weights, stored)
    blocks = weights.reshape(len(weights), -1, kind.block)
    largest = np.abs(blocks).max(axis=2)
    suspect: npt.NDArray[np.bool_] = np.asarray(largest < _SAFE)
    if importance is not None:
        suspect |= ~importance.reshape(-1, kind.block).any(axis=1)
    suspect &= largest > 0
    rows = np.flatnonzero(suspect.any(axis=1))
    if not len(rows):
        return 0
    # Powers of two, so that only the exponents change. Blocks do not depend on one another.
    exponent = np.frexp(largest[rows])[1][:, :, None]
    scaled = np.ldexp(blocks[rows], -exponent).astype(np.float32)
    stored = np.empty_like(weights[rows])
    dequantize_into(np.ascontiguousarray(data[rows]), kind, stored)
    now = np.ldexp(stored.reshape(scaled.shape).astype(np.float64), -exponent)
    flat = scaled.reshape(len(rows), -1)
    columns = _alike(np.ones(weights.shape[1], np.float32) if importance is None else importance, kind.block)
    dequantize_into(quantize_rows(flat, kind, columns), kind, stored)
    least = np.square(stored.reshape(scaled.shape) - scaled).sum(axis=2, dtype=np.float64)
    error = np.square(now - scaled).sum(axis=2, dtype=np.float64)
    squares = np.square(scaled).sum(axis=2, dtype=np.float64)
    lost = (error > _LOST * squares) & (error > 2 * least)
    return int(np.count_nonzero(np.take(suspect, rows, axis=0) & lost))


def _alike(importance: Floats, block: int) -> Floats:
    """The importance with 1 in blocks where it is 0 throughout."""
    blocks = importance.reshape(-1, block)
    known = np.asarray(blocks.any(axis=1))
    return np.where(known[:, None], blocks, np.float32(1)).reshape(-1)
