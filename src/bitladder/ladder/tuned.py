"""Rungs whose scales are tuned on the calibration texts, but for the end of each, on which that is tried."""

import pathlib
from collections.abc import Sequence

from bitladder.calibrate.texts import Text
from bitladder.evaluate import Settings
from bitladder.files import sha256_bytes
from bitladder.gradients import why_not
from bitladder.ladder.plan import RunOptions
from bitladder.ladder.planned import joined
from bitladder.progress import Progress
from bitladder.tune import Tuned, TuneOptions, tune

HELD_OUT = 0.1  # of each calibration text
CHUNKS = 8


def tune_rung(
    options: RunOptions,
    full: pathlib.Path,
    quant: pathlib.Path,
    out: pathlib.Path,
    calibration: Sequence[Text],
    progress: Progress,
) -> Tuned | None:
    """Tune a quant of `full` and write it; None, and nothing written, if there is no way to.

    The text that is scored is not looked at.
    """
    reason = why_not(full)
    if reason is not None:
        progress.info(f"scales are not tuned: {reason}")
        return None
    texts, held_out = set_apart(calibration)
    settings = Settings(options.n_ctx, CHUNKS, options.threads, options.gpu_layers)
    wanted = TuneOptions(n_ctx=options.n_ctx, chunks=options.tune_chunks)
    return tune(
        full, quant, out, texts, wanted, held_out=(held_out, settings), threads=options.threads, progress=progress
    )


def set_apart(texts: Sequence[Text]) -> tuple[list[Text], Text]:
    """Each text without its end, and the ends together."""
    first: list[Text] = []
    ends: list[Text] = []
    for text in texts:
        cut = int(len(text.text) * (1 - HELD_OUT))
        for parts, part in ((first, text.text[:cut]), (ends, text.text[cut:])):
            parts.append(Text(text.name, part, sha256_bytes(part.encode("utf-8", "surrogateescape"))))
    return first, joined(ends)
