"""What rounding needs of a model: an imatrix and plain second moments."""

import pathlib

from bitladder.calibrate import MomentsOptions, collect_imatrix, collect_moments
from bitladder.engine import Decoding
from bitladder.text import Reading, load_text


def calibrate(model: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Write imatrix.gguf and moments.gguf, from 12 chunks of 256 tokens of the calibration text; the folder again."""
    texts = [load_text("pydoc:calibration")]
    collect_imatrix(
        model, texts, folder / "imatrix.gguf", reading=Reading(chunks=12, spread=False), decoding=Decoding(n_ctx=256)
    )
    collect_moments(
        model,
        texts,
        folder / "moments.gguf",
        reading=Reading(chunks=12),
        decoding=Decoding(n_ctx=256),
        options=MomentsOptions(weighting="tokens"),
    )
    return folder
