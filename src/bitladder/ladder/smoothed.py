"""The model that rungs are made of: the full-precision one, with its channels balanced where that helps."""

import pathlib
from collections.abc import Sequence
from typing import Any

from bitladder.calibrate.texts import Text
from bitladder.evaluate import Settings
from bitladder.ladder.plan import RunOptions
from bitladder.ladder.planned import WORK, joined
from bitladder.planning.excerpts import excerpts
from bitladder.progress import Progress
from bitladder.smooth import SmoothingError, smooth_model, trial

# Beside what planning keeps: `bitladder smooth` makes the same bytes from the full-precision file and the imatrix.
SMOOTH = f"{WORK}/smooth.gguf"
SMOOTH_IMATRIX = f"{WORK}/imatrix.gguf"
CHUNKS = 8


def smooth(
    options: RunOptions,
    full: pathlib.Path,
    imatrix: pathlib.Path,
    folder: pathlib.Path,
    calibration: Sequence[Text],
    progress: Progress,
) -> tuple[list[pathlib.Path], dict[str, Any]]:
    """Write SMOOTH and SMOOTH_IMATRIX in `folder`: those two, and what is to be said of them.

    Without them, and with a remark, for a model whose channels cannot be scaled, and for one of which a preset comes
    out worse on passages of the calibration text. The text that is scored is not looked at.
    """
    out, out_imatrix = folder / SMOOTH, folder / SMOOTH_IMATRIX
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        made = smooth_model(full, imatrix, out, out_imatrix, threads=options.threads, progress=progress)
    except SmoothingError as error:
        progress.warn(f"rungs are made of the model as it is: {error}")
        return [], {}
    text = excerpts(joined(list(calibration)), CHUNKS, options.n_ctx, offset=0.25)
    settings = Settings(options.n_ctx, CHUNKS, options.threads, options.gpu_layers)
    tried = trial((full, imatrix), (out, out_imatrix), text, settings, folder=out.parent, progress=progress)
    said = f"a {tried.preset} of the smoothed model has KLD {tried.after:.5f}, of the model as it is {tried.before:.5f}"
    facts = {"links": made.links, "trial": {"preset": tried.preset, "before": tried.before, "after": tried.after}}
    if tried.helps:
        progress.info(f"rungs are made of the smoothed model: {said}")
        return [out, out_imatrix], facts
    progress.info(f"rungs are made of the model as it is: {said}")
    out.unlink()
    out_imatrix.unlink()
    return [], facts
