"""Which block a model misses least: the divergence without each block, ranked."""

import dataclasses
import pathlib

from bitladder.evaluate import Settings, load_or_compute_base
from bitladder.options import option
from bitladder.progress import SILENT, Progress
from bitladder.text.texts import Text
from bitladder.trial import BlockLoss, blocks_left_out


@dataclasses.dataclass(frozen=True)
class PruneOptions(Settings):
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
