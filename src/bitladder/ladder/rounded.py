"""Rungs whose blocks are chosen for their layers' outputs: second moments once, then each rung rounded and tried."""

import pathlib
from collections.abc import Mapping, Sequence

from bitladder import quantize
from bitladder.calibrate import MomentsResult, RoundingMomentsOptions, collect_for_rounding
from bitladder.engine.decoding import Decoding
from bitladder.evaluate import Settings
from bitladder.ladder.plan import RunOptions
from bitladder.ladder.planned import WORK
from bitladder.progress import Progress
from bitladder.refine.round import Refined, RefineOptions, quantize_refined
from bitladder.rounding import RoundingOptions
from bitladder.text import excerpts, joined
from bitladder.text.texts import Text

# Beside what planning keeps: large, and of use to nobody but this run and `bitladder verify`.
MOMENTS = f"{WORK}/moments.gguf"
PLAIN = f"{WORK}/moments-plain.gguf"  # moments in which all tokens count alike, of more chunks
GUARD_CHUNKS = 8


def collect(
    model: pathlib.Path,
    texts: Sequence[Text],
    folder: pathlib.Path,
    chunks: int,
    decoding: Decoding,
    progress: Progress,
) -> MomentsResult:
    """Collects the second moments of all weights; see `collect_for_rounding`."""
    options = RoundingMomentsOptions(moments_chunks=chunks)
    return collect_for_rounding(
        model, texts, folder / MOMENTS, folder / PLAIN, decoding=decoding, options=options, progress=progress
    )


def rounding_options(options: RunOptions) -> RoundingOptions:
    """How a run rounds."""
    return RoundingOptions(method=options.rounding)


def refine_rung(
    options: RunOptions,
    model: pathlib.Path,
    imatrix: pathlib.Path,
    moments: Sequence[pathlib.Path],
    work: pathlib.Path,
    out: pathlib.Path,
    rung: str,
    types: Mapping[str, str] | None,
    calibration: Sequence[Text],
    progress: Progress,
) -> Refined:
    """A rung with the preset's or the planned types, its blocks tried on passages of the calibration text.

    Blocks that planning rendered in `work` are used. The passages are others than those that plans are judged by; the
    text that is scored is not looked at.
    """
    held_out = excerpts(joined(list(calibration)), GUARD_CHUNKS, options.n_ctx, offset=0.5)
    settings = Settings(
        n_ctx=options.n_ctx, chunks=GUARD_CHUNKS, threads=options.threads, gpu_layers=options.gpu_layers
    )
    return quantize_refined(
        model,
        out,
        quantize.QuantizeOptions(rung, types=types),
        moments,
        RefineOptions(rounding_options(options), held_out, settings, work / "rendered"),
        imatrix=imatrix,
        threads=options.threads,
        progress=progress,
    )
