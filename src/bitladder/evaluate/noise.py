"""The noise floor: how far the full-precision model is from itself when nothing but arithmetic differs.

A difference between two quants below it says nothing about their weights.
"""

import dataclasses

from bitladder.engine.activations import KernelInputs
from bitladder.engine.context import Context
from bitladder.engine.observe import GraphCallback
from bitladder.engine.types import TensorType, type_by_name
from bitladder.evaluate.base.hidden import BASE, HiddenBase
from bitladder.evaluate.divergence import compare_with_base
from bitladder.evaluate.figures import mean
from bitladder.evaluate.logit_rows import Workers
from bitladder.evaluate.scores import Noise, NoiseFigure
from bitladder.evaluate.settings import Settings
from bitladder.gguf.reader import GgufFile
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress

# Types that stand for all whose kernels round their inputs alike: to Q8_0 (blocks of 32), and to Q8_K (of 256).
SMALL_BLOCKS, LARGE_BLOCKS = "q8_0", "q6_K"

NOISE = Algorithm(
    "noise",
    ("another -ub, and inputs rounded to Q8_0", "inputs rounded to Q8_K too"),
    uses=(BASE,),
)


@NOISE.entry
def noise_floor(base: HiddenBase, chunks: int, settings: Settings, progress: Progress = SILENT) -> Noise:
    """Divergence of the base's model from its own base, over the first `chunks` chunks.

    Once with another -ub, so that sums are taken in another order (or, where the context is one batch of -ub, in
    batches of an eighth); once with the input of every multiplication by a weight rounded to Q8_0, as the CPU kernels
    of Q8_0, Q5_0 and the like round it, and once to Q8_K, as those of K-quants and most I-quants do, if any width can
    hold such a type. Raises BitladderError if the model does not load or decode.
    """
    count = min(chunks, len(base.chunks))
    size = min(settings.n_ubatch, settings.n_ctx)
    other = dataclasses.replace(settings, n_ubatch=max(size // 8, 1))
    return Noise(
        chunks=count,
        n_ubatch=other.n_ubatch,
        batch=_divergence(base, count, other, None, progress),
        activations=_rounded(base, count, settings, type_by_name(SMALL_BLOCKS), progress),
        activations_k=_rounded(base, count, settings, type_by_name(LARGE_BLOCKS), progress),
    )


def _rounded(
    base: HiddenBase, count: int, settings: Settings, kind: TensorType, progress: Progress
) -> NoiseFigure | None:
    """With inputs rounded as if every weight whose width allows it were of a type; None if none is wide enough."""
    with GgufFile(base.model.path) as file:
        fitting = [name for name, tensor in file.tensors.items() if tensor.width % kind.block == 0]
    if not fitting:
        return None
    inputs = KernelInputs()
    inputs.pretend(dict.fromkeys(fitting, kind))
    return _divergence(base, count, settings, inputs, progress)


def _divergence(
    base: HiddenBase, count: int, settings: Settings, callback: GraphCallback | None, progress: Progress
) -> NoiseFigure:
    with (
        settings.load(base.model.path) as model,
        Context(model, settings, callback=callback) as context,
        Workers(settings.threads) as workers,
    ):
        kld = compare_with_base(context, base, count, workers, progress).kld
    figure = mean(kld)
    return NoiseFigure(value=figure.value, error=figure.error, max=float(kld.max()))
