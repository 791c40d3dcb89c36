"""The model with balanced channels, and which rungs are better made of it."""

import pathlib
from collections.abc import Sequence
from typing import Any

from bitladder.evaluate import Settings
from bitladder.files import sha256_file, write_json
from bitladder.ladder.plan import RunOptions
from bitladder.ladder.planned import WORK
from bitladder.ladder.records import IMATRIX
from bitladder.ladder.rounded import MOMENTS, PLAIN
from bitladder.progress import Progress
from bitladder.refine.smooth import SmoothingError, smooth_model, smoothed_moments, trial
from bitladder.text import excerpts, joined
from bitladder.text.texts import Text

# Beside what planning keeps: `bitladder smooth` makes the same bytes from the full-precision file and the imatrix.
SMOOTH = f"{WORK}/smooth.gguf"
SMOOTH_IMATRIX = f"{WORK}/smooth.imatrix.gguf"
SMOOTH_MOMENTS = f"{WORK}/smooth-moments.gguf"
SMOOTH_PLAIN = f"{WORK}/smooth-moments-plain.gguf"
TRIALS = f"{WORK}/trials"
CHUNKS = 8


def smooth(
    options: RunOptions, full: pathlib.Path, folder: pathlib.Path, progress: Progress
) -> tuple[list[pathlib.Path], dict[str, Any]]:
    """Write the smoothed model, its imatrix and, if there are any, its second moments: the files, and facts of them.

    No files, and a remark, for a model whose channels cannot be scaled.
    """
    out = folder / SMOOTH
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        made = smooth_model(
            full, folder / IMATRIX, out, folder / SMOOTH_IMATRIX, threads=options.threads, progress=progress
        )
    except SmoothingError as error:
        out.unlink(missing_ok=True)  # of another model that was here before
        progress.warn(f"rungs are made of the model as it is: {error}")
        return [], {}
    files = [out, made.imatrix]
    if options.rounding != "stock":
        digest = sha256_file(out)
        for old, new in ((MOMENTS, SMOOTH_MOMENTS), (PLAIN, SMOOTH_PLAIN)):
            smoothed_moments(folder / old, made.changes, folder / new, digest)
            files.append(folder / new)
    return files, {"links": made.links}


def try_rung(
    options: RunOptions,
    full: pathlib.Path,
    full_sha256: str,
    folder: pathlib.Path,
    rung: str,
    calibration: Sequence[Text],
    progress: Progress,
) -> tuple[pathlib.Path, bool]:
    """Is a rung better made of the smoothed model? The preset of each is measured on passages of the calibration text.

    The text that is scored is not looked at. Returns the file that says it, and what it says.
    """
    out, smoothed = folder / TRIALS / f"{rung}.json", (folder / SMOOTH, folder / SMOOTH_IMATRIX)
    said: dict[str, Any] = {"smoothed": False}
    if smoothed[0].is_file():
        text = excerpts(joined(list(calibration)), CHUNKS, options.n_ctx, offset=0.25)
        settings = Settings(n_ctx=options.n_ctx, chunks=CHUNKS, threads=options.threads, gpu_layers=options.gpu_layers)
        # All rungs are compared with the same predictions.
        base = out.with_name(f"{full_sha256[:12]}.{text.sha256[:12]}.{options.n_ctx}.base")
        base.parent.mkdir(parents=True, exist_ok=True)
        tried = trial(
            (full, folder / IMATRIX),
            smoothed,
            text,
            settings,
            preset=rung,
            folder=smoothed[0].parent,
            base_file=base,
            progress=progress,
        )
        said = {"smoothed": tried.helps, "before": tried.before, "after": tried.after, "error": tried.error}
        made_of = "the smoothed model" if tried.helps else "the model as it is"
        progress.info(
            f"{rung} is made of {made_of}: KLD of the preset {tried.after:.5f} smoothed, {tried.before:.5f} else"
        )
    write_json(out, said)
    return out, bool(said["smoothed"])
