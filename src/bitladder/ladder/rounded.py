"""Rungs whose blocks are chosen for their layers' outputs: second moments once, then each rung rounded and tried."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder import quantize
from bitladder.calibrate import MomentsResult, collect_moments
from bitladder.calibrate.gradients import collect_gradient_moments, why_not
from bitladder.evaluate import Settings
from bitladder.ladder.plan import RunOptions
from bitladder.ladder.planned import WORK, joined
from bitladder.progress import Progress
from bitladder.refine.round import Refined, RefineOptions, quantize_refined
from bitladder.rounding import RoundingOptions
from bitladder.text.excerpts import excerpts
from bitladder.text.texts import Text

# Beside what planning keeps: large, and of use to nobody but this run and `bitladder verify`.
MOMENTS = f"{WORK}/moments.gguf"
# Moments in which all tokens count alike, of more of them: correlations need many tokens, and these cost little.
PLAIN = f"{WORK}/moments-plain.gguf"
PLAIN_SHARE = 2
GUARD_CHUNKS = 8


def collect(
    model: pathlib.Path, texts: Sequence[Text], folder: pathlib.Path, chunks: int, *, progress: Progress, **engine: Any
) -> MomentsResult:
    """Second moments of all weights: weighted by gradients where torch is there and knows the model, else by positions.

    Gradients are costly, so in a file beside there are plain moments of PLAIN_SHARE times the chunks. `engine` are
    n_ctx, threads and gpu_layers. Raises BitladderError as what it calls.
    """
    out, plain = folder / MOMENTS, folder / PLAIN
    out.parent.mkdir(parents=True, exist_ok=True)
    collect_moments(model, texts, plain, chunks=PLAIN_SHARE * chunks, weighting="tokens", progress=progress, **engine)
    reason = why_not(model)
    if reason is None:
        return collect_gradient_moments(model, texts, out, chunks=chunks, progress=progress, **engine)
    progress.info(f"tokens are weighted by their positions, not by gradients: {reason}")
    return collect_moments(model, texts, out, chunks=chunks, weighting="positions", progress=progress, **engine)


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
