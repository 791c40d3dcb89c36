"""Rungs whose scales are tuned on the calibration texts, but for the end of each, on which that is tried."""

import pathlib
from collections.abc import Sequence

from bitladder.calibrate.gradients import why_no_gradients
from bitladder.evaluate import Settings
from bitladder.files import sha256_bytes
from bitladder.ladder.plan import RunOptions
from bitladder.ladder.planned import joined
from bitladder.progress import Progress
from bitladder.refine.tune import TuneOptions, tune
from bitladder.text.texts import Text

HELD_OUT = 0.1  # of each calibration text
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


def set_apart(texts: Sequence[Text]) -> tuple[list[Text], Text]:
    """Each text without its end, and the ends together."""
    first: list[Text] = []
    ends: list[Text] = []
    for text in texts:
        cut = int(len(text.text) * (1 - HELD_OUT))
        for parts, part in ((first, text.text[:cut]), (ends, text.text[cut:])):
            parts.append(Text(text.name, part, sha256_bytes(part.encode("utf-8", "surrogateescape"))))
    return first, joined(ends)
