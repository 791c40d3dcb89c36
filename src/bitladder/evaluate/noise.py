"""The noise floor: how far the full-precision model is from itself when nothing but arithmetic differs.

A difference between two quants below it says nothing about their weights.
"""

import dataclasses

from bitladder.engine.context import Context
from bitladder.engine.observe import RoundedInputs, Trampoline
from bitladder.engine.types import type_by_name
from bitladder.evaluate.base import HiddenBase
from bitladder.evaluate.divergence import compare
from bitladder.evaluate.figures import mean
from bitladder.evaluate.rows import Workers
from bitladder.evaluate.scores import Noise, NoiseFigure
from bitladder.evaluate.settings import Settings
from bitladder.progress import SILENT, Progress

ACTIVATIONS = "q8_0"


def noise_floor(base: HiddenBase, chunks: int, settings: Settings, progress: Progress = SILENT) -> Noise:
    """Divergence of the base's model from its own base, over the first `chunks` chunks.

    Once with another -ub, so that sums are taken in another order (or, where the context is one batch of -ub, in
    batches of an eighth); once with the input of every multiplication by a weight rounded to Q8_0, as the CPU kernels
    of quantized weights round it. Raises BitladderError if the model does not load or decode.
    """
    count = min(chunks, len(base.chunks))
    size = min(settings.n_ubatch, settings.n_ctx)
    other = dataclasses.replace(settings, n_ubatch=max(size // 8, 1))
    return Noise(
        chunks=count,
        n_ubatch=other.n_ubatch,
        batch=_divergence(base, count, other, None, progress),
        activations=_divergence(base, count, settings, RoundedInputs(type_by_name(ACTIVATIONS)), progress),
    )


def _divergence(
    base: HiddenBase, count: int, settings: Settings, callback: Trampoline | None, progress: Progress
) -> NoiseFigure:
    with (
        settings.load(base.model.path) as model,
        Context(
            model,
            n_ctx=settings.n_ctx,
            n_batch=settings.n_batch,
            n_ubatch=settings.n_ubatch,
            threads=settings.threads,
            callback=callback,
        ) as context,
        Workers(settings.threads) as workers,
    ):
        kld = compare(context, base, count, workers, progress).kld
    figure = mean(kld)
    return NoiseFigure(value=figure.value, error=figure.error, max=float(kld.max()))
