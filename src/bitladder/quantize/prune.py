"""Whole blocks left out (--prune-layers): tensors get new numbers, and metadata that count or list blocks are changed.

llama-quantize renumbers the tensors and sets block_count. Metadata with one value per block keep their length there,
and such a file does not load (llama.cpp #27976). In some architectures the number of a block decides its kind. Pruning
that changes the kind of a block is refused.
"""

import dataclasses
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from bitladder.errors import BitladderError, UsageError
from bitladder.gguf import ARRAY, SCALARS, Value, block_of, block_prefix, in_main_block, name_in_block, scalar

T = TypeVar("T")
# {arch}.KEY, from llama.cpp's llama-arch.cpp and the loaders in src/models.
_LEADING = ("leading_dense_block_count", "hash_layer_count")  # this many of the first blocks are special
_TRAILING = ("nextn_predict_layers",)  # this many of the last
# Every nth block is special.
_PERIODS = (
    "attention.sliding_window_pattern",
    "full_attention_interval",
    "interleave_moe_layer_step",
    "moe_every_n_layers",
    "rescale_every_n_layers",
)
# Lists of block numbers, or blocks that depend on others: their values in the pruned model are not known.
_UNCLEAR = (
    "attention.shared_kv_layers",
    "decoder_block_count",
    "deepstack_mapping",
    "hrm.layers_per_stack",
    "n_deepstack_layers",
    "ple.layers",
    "target_layers",
)
_NOT_PER_BLOCK = ("rope.", "classifier.", "adapters.", "ple.")


@dataclasses.dataclass(frozen=True)
class Pruning:
    """The blocks that stay.

    Parameters:
        kept: their numbers in the source. The place in this tuple is the new number.
        blocks: number of blocks of the source.

    Example:
        >>> Pruning(kept=(0, 2), blocks=3).new_name("blk.2.attn_v.weight")
        'blk.1.attn_v.weight'
    """

    kept: tuple[int, ...]
    blocks: int

    def new_name(self, name: str) -> str | None:
        """The name of a tensor in the pruned model; None if its block is left out."""
        block = block_of(name)
        if block is None:
            return name
        return block_prefix(self.kept.index(block)) + name_in_block(name) if block in self.kept else None


def plan_pruning(
    metadata: Mapping[str, Value], tensors: Iterable[str], layers: Sequence[int], architecture: str
) -> Pruning:
    """Decides what stays.

    Parameters:
        metadata: of the source.
        tensors: names of its tensors.
        layers: numbers of the blocks to leave out.
        architecture: general.architecture.

    Raises:
        UsageError: the model does not have a block, or cannot be pruned safely.
    """
    count = _integer(metadata.get(f"{architecture}.block_count"))
    if not count:
        raise UsageError(f"--prune-layers: the model has no {architecture}.block_count")
    lacking = [layer for layer in layers if layer >= count]
    if lacking:
        raise UsageError(f"--prune-layers {lacking[0]}: the model has blocks 0 to {count - 1}")
    kept = tuple(block for block in range(count) if block not in layers)
    if not kept:
        raise UsageError("--prune-layers: nothing would be left; keep at least one block")
    odd = next((name for name in tensors if _for_each_block(name)), None)
    if odd is not None:
        raise UsageError(f"--prune-layers: {odd} has a part for each block, which pruning cannot take apart")
    pruning = Pruning(kept, count)
    _refuse_unclear(metadata, pruning, architecture)
    return pruning


def _for_each_block(name: str) -> bool:
    """Whether a tensor belongs to all blocks, or to a block of another tower than the main one."""
    return name.startswith("per_layer_") or (block_of(name) is not None and not in_main_block(name))


def pruned_metadata(metadata: Mapping[str, Value], pruning: Pruning, architecture: str) -> dict[str, Value]:
    """The metadata of the pruned model, in the same order: arrays per block are cut, and blocks counted again.

    An array of {arch}.* has one value per block if its length is the number of blocks, with or without the blocks that
    predict further tokens (nextn_predict_layers).
    """
    trailing = _integer(metadata.get(f"{architecture}.nextn_predict_layers"))
    lengths = {pruning.blocks, pruning.blocks - trailing}
    changed = dict(metadata)
    for key, value in metadata.items():
        rest = key.removeprefix(f"{architecture}.")
        if rest == key:
            continue
        if rest == "block_count":
            changed[key] = scalar(value.kind, len(pruning.kept))
        elif rest in _LEADING and value.kind != ARRAY:
            changed[key] = _counted(value, pruning, lambda block, count: block < count)
        elif rest in _TRAILING and value.kind != ARRAY:
            changed[key] = _counted(value, pruning, lambda block, count: block >= pruning.blocks - count)
        elif value.kind == ARRAY and not rest.startswith(_NOT_PER_BLOCK):
            changed[key] = _cut(value, pruning, lengths)
    return changed


def pruned_entries(entries: Mapping[str, T], pruning: Pruning) -> dict[str, T]:
    """The entries of an importance matrix (name of weight → any value) under their new names."""
    renamed = {pruning.new_name(name): entry for name, entry in entries.items()}
    return {name: entry for name, entry in renamed.items() if name is not None}


def _counted(value: Value, pruning: Pruning, among: Callable[[int, int], bool]) -> Value:
    count = _integer(value)
    return scalar(value.kind, sum(among(block, count) for block in pruning.kept))


def _cut(value: Value, pruning: Pruning, lengths: set[int]) -> Value:
    kind, count = struct.unpack_from("<IQ", value.raw)
    if count not in lengths or kind not in SCALARS:
        return value
    size = struct.calcsize("<" + SCALARS[kind])
    items = [value.raw[12 + size * block : 12 + size * (block + 1)] for block in pruning.kept if block < count]
    return Value(ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(items))


def _refuse_unclear(metadata: Mapping[str, Value], pruning: Pruning, architecture: str) -> None:
    """Raises UsageError if a kept block changes its kind, or if that cannot be known."""
    if pruning.kept == tuple(range(len(pruning.kept))):
        moved = None  # only the last blocks go: all others keep their numbers
    else:
        moved = next(block for new, block in enumerate(pruning.kept) if new != block)
    for rest in _UNCLEAR:
        value = metadata.get(f"{architecture}.{rest}")
        if value is not None and value.python():
            raise UsageError(
                f"--prune-layers: the value of {architecture}.{rest} in the pruned model is not known; not supported"
            )
    for rest in _PERIODS:
        period = _integer(metadata.get(f"{architecture}.{rest}"))
        if period > 1 and any(new % period != block % period for new, block in enumerate(pruning.kept)):
            raise UsageError(
                f"--prune-layers: {architecture}.{rest} makes every {period}th block another kind; "
                f"block {moved} would change its kind; prune whole groups of {period}, or the last blocks"
            )
    window = _integer(metadata.get(f"{architecture}.attention.sliding_window"))
    if window and moved is not None and f"{architecture}.attention.sliding_window_pattern" not in metadata:
        raise UsageError(
            f"--prune-layers: {architecture} may decide by a block's number where its sliding window of {window} "
            f"applies, and block {moved} would get another number; only the last blocks can be pruned"
        )


def _integer(value: Value | None) -> int:
    """A scalar as an integer; 0 for None and for an array."""
    if value is None or value.kind == ARRAY:
        return 0
    try:
        return int(value.python())
    except ValueError as error:
        raise BitladderError(f"a number was expected in the metadata, not {value.python()!r}") from error
