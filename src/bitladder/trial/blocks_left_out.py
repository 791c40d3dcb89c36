"""What each block of a model is worth: the divergence of the model without it.

A block adds the products of its last matrices to the residual stream. With zeros in these the block passes its input
on, as if it were pruned. The model is neither written nor loaded again.
"""

import collections
import dataclasses
import pathlib

from bitladder.engine import Decoding
from bitladder.errors import BitladderError
from bitladder.evaluate import Figure, HiddenBase, MeasureOptions, load_or_compute_base, mean
from bitladder.gguf import GgufFile, block_of, name_in_block, prediction_tensors
from bitladder.options import option
from bitladder.progress import SILENT, Progress
from bitladder.text import Text
from bitladder.trial.render import Renderer
from bitladder.trial.swapped_model import SwappedModel, Zeros

# The last matrices of the two halves of a block, in every transformer of llama.cpp's with plain attention.
ATTENTION, FEED_FORWARD = ("attn_output",), ("ffn_down", "ffn_down_exps", "ffn_down_shexp")


@dataclasses.dataclass(frozen=True)
class BlockLoss:
    """The model without a block.

    Parameters:
        block: number of the block.
        kld: KLD from the whole model, nats per token.
        bytes: size of the block in the file.
    """

    block: int
    kld: Figure
    bytes: int


@dataclasses.dataclass(frozen=True)
class PruneOptions(MeasureOptions):
    """How the model without a block is measured: on less text than a quant, because the losses are large."""

    chunks: int | None = option(4, "--chunks", least=1, metavar="N", help="Chunks of the text that are measured.")


def rank_blocks(
    model: pathlib.Path, text: Text, options: PruneOptions, *, progress: Progress = SILENT
) -> list[BlockLoss]:
    """Measures the model without each of its blocks, and sorts them by KLD, the least first.

    Parameters:
        model: path of a GGUF.
        text: what is measured on.
        options: how much of it, and how the model is decoded.
        progress: where work is shown.

    Raises:
        BitladderError: the blocks of the architecture cannot be left out here.
    """
    with load_or_compute_base(model, text, options, progress=progress) as base:
        losses = blocks_left_out(base, options, chunks=options.chunks, progress=progress)
    return sorted(losses, key=lambda loss: loss.kld.value)


def blocks_left_out(
    base: HiddenBase, decoding: Decoding, *, chunks: int | None = None, progress: Progress = SILENT
) -> list[BlockLoss]:
    """Measures the model of a base without each of its blocks.

    Parameters:
        base: predictions of the whole model.
        decoding: how to decode; the context length must be the base's.
        chunks: how many of the base's chunks to decode, from the first on; None decodes all.

    Returns:
        One entry for each block, in their order.

    Raises:
        BitladderError: the blocks of this architecture end in other matrices than attn_output and ffn_down.
    """
    losses = []
    with GgufFile(base.model.path) as file, Renderer(file, {}, threads=decoding.threads) as renderer:
        sizes, ends = _blocks(file)
        with (
            SwappedModel(base, renderer, decoding) as model,
            progress.task(f"{base.model.name} without each block", len(ends)) as task,
        ):
            for block, names in ends.items():
                kld = mean(model.kld_with(dict.fromkeys(names, Zeros()), chunks).ravel())
                losses.append(BlockLoss(block, kld, sizes[block]))
                task.note(f"block {block}: KLD {kld.value:.4f}")
                task.advance()
    return losses


def _blocks(file: GgufFile) -> tuple[dict[int, int], dict[int, list[str]]]:
    """Bytes of each block, and the tensors that it ends in."""
    sizes: dict[int, int] = collections.Counter()
    ends: dict[int, list[str]] = collections.defaultdict(list)
    halves: dict[int, set[tuple[str, ...]]] = collections.defaultdict(set)
    heads = set(prediction_tensors(file))  # no text that is measured here reaches them
    for tensor in file.tensors.values():
        block = None if tensor.name in heads else block_of(tensor.name)
        stem, _, suffix = name_in_block(tensor.name).rpartition(".")
        if block is None or suffix not in ("weight", "bias"):
            continue
        sizes[block] += tensor.nbytes
        for half in (ATTENTION, FEED_FORWARD):
            if stem in half:
                ends[block].append(tensor.name)
                halves[block].add(half)
    incomplete = [block for block in sizes if len(halves[block]) < 2]
    if incomplete or not sizes:
        raise BitladderError(
            f"{file.path.name}: block {incomplete[0] if incomplete else 0} of architecture {file.architecture} does "
            "not end in attn_output and ffn_down; it cannot be left out here"
        )
    return dict(sorted(sizes.items())), dict(sorted(ends.items()))
