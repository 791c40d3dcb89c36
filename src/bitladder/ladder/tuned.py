"""Rungs whose scales are tuned on the calibration texts, but for the end of each, on which that is tried."""

import pathlib
from collections.abc import Sequence

from bitladder.calibrate.gradients import why_no_gradients
from bitladder.evaluate import Settings
from bitladder.ladder.plan import RunOptions
from bitladder.progress import Progress
from bitladder.refine.tune import TuneOptions, tune
from bitladder.text import Text, set_apart

CHUNKS = 8


def tune_rung(
    options: RunOptions, full: pathlib.Path, quant: pathlib.Path, calibration: Sequence[Text], progress: Progress
) -> bool:
    """Tune a quant of `full` in place; whether that helped. Nothing changes if it does not, or cannot be done.

    The text that is scored is not looked at.
    """
    if not options.tune_chunks:
        return False
    reason = why_no_gradients(full)
    if reason is not None:
        progress.info(f"scales are not tuned: {reason}")
        return False
    texts, held_out = set_apart(calibration)
    settings = Settings(n_ctx=options.n_ctx, chunks=CHUNKS, threads=options.threads, gpu_layers=options.gpu_layers)
    wanted = TuneOptions(n_ctx=options.n_ctx, chunks=options.tune_chunks)
    out = quant.with_name(f".{quant.name}.tuned.tmp")
    try:
        made = tune(
            full, quant, out, texts, wanted, held_out=(held_out, settings), threads=options.threads, progress=progress
        )
        out.replace(quant)
    finally:
        out.unlink(missing_ok=True)
    if not made.kept:
        progress.info(f"{quant.name}: tuned scales lose more on held-out text, and stay as they were")
    return made.kept
