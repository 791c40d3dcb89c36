"""What each block is worth: the divergence of the model without it.

A block adds what its last matrices give to the residual stream. With those at zero the block passes its input on, which
is what pruning it does, and the model need be neither written nor loaded again.
"""

import collections
import dataclasses

import numpy as np

from bitladder.engine.context import Context
from bitladder.engine.model import Model
from bitladder.engine.weights import Weights
from bitladder.errors import BitladderError
from bitladder.evaluate.base.hidden import HiddenBase
from bitladder.evaluate.divergence import compare_with_base
from bitladder.evaluate.figures import mean
from bitladder.evaluate.logit_rows import Workers
from bitladder.evaluate.scores import Figure
from bitladder.evaluate.settings import Settings
from bitladder.gguf.names import block_of, name_in_block
from bitladder.gguf.reader import GgufFile
from bitladder.progress import SILENT, Progress

# The last matrices of the two halves of a block, in every transformer of llama.cpp's with plain attention.
ATTENTION, FEED_FORWARD = ("attn_output",), ("ffn_down", "ffn_down_exps", "ffn_down_shexp")


@dataclasses.dataclass(frozen=True)
class BlockLoss:
    """The model without block `block`: its KLD from the whole model (nats per token), and the block's size in it."""

    block: int
    kld: Figure
    bytes: int


def blocks_left_out(
    base: HiddenBase, settings: Settings, *, chunks: int | None = None, progress: Progress = SILENT
) -> list[BlockLoss]:
    """Measure the model of a base without each of its blocks, over the base's first `chunks` chunks (None: all).

    Returns one entry per block, in order. Raises BitladderError for an architecture whose blocks end in other matrices.
    """
    path = base.model.path
    sizes, ends = _blocks(base)
    count = min(chunks or len(base.chunks), len(base.chunks))
    found = []
    with (
        Model(path, mmap=False, repack=False, gpu_layers=settings.gpu_layers) as model,
        Context(model, settings) as context,
        Workers(settings.threads) as workers,
        progress.task(f"{path.name} without each block", len(ends)) as task,
    ):
        weights = Weights(model)
        for block, names in ends.items():
            kept = {name: weights.get(name) for name in names}
            try:
                for name, data in kept.items():
                    weights.set_bytes(name, np.zeros_like(data))
                kld = mean(compare_with_base(context, base, count, workers).kld)
            finally:
                for name, data in kept.items():
                    weights.set_bytes(name, data)
            found.append(BlockLoss(block, kld, sizes[block]))
            task.note(f"block {block}: KLD {kld.value:.4f}")
            task.advance()
    return found


def _blocks(base: HiddenBase) -> tuple[dict[int, int], dict[int, list[str]]]:
    """Bytes of each block, and the tensors it ends in."""
    sizes: dict[int, int] = collections.Counter()
    ends: dict[int, list[str]] = collections.defaultdict(list)
    halves: dict[int, set[tuple[str, ...]]] = collections.defaultdict(set)
    with GgufFile(base.model.path) as file:
        for tensor in file.tensors.values():
            block = block_of(tensor.name)
            stem, _, suffix = name_in_block(tensor.name).rpartition(".")
            if block is None or suffix not in ("weight", "bias"):
                continue
            sizes[block] += tensor.nbytes
            for half in (ATTENTION, FEED_FORWARD):
                if stem in half:
                    ends[block].append(tensor.name)
                    halves[block].add(half)
    odd = [block for block in sizes if len(halves[block]) < 2]
    if odd or not sizes:
        raise BitladderError(
            f"{base.model.name}: block {odd[0] if odd else 0} of architecture {base.model.architecture} does not end "
            "in attn_output and ffn_down; it cannot be left out here"
        )
    return dict(sorted(sizes.items())), dict(sorted(ends.items()))
