"""Does smoothing help? A preset of the model as it is, and of the smoothed model, measured on a text."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitladder.engine import Decoding
from bitladder.evaluate import HiddenBase, MeasureOptions, paired_mean
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress
from bitladder.quantize import QuantizeOptions, prepare
from bitladder.refine.model_files import ModelFiles
from bitladder.refine.options import SmoothingOptions
from bitladder.refine.smooth.smoothed_model import SMOOTHING
from bitladder.text import EXCERPTS, Text, excerpts
from bitladder.trial import SWAPPED_KLD, Renderer, SwappedModel, kept_base

SMOOTHING_TRIAL = Algorithm(
    "smoothing trial",
    (
        "quants of both models are compared with full precision",
        "blocks of both are swapped into the loaded models, as where recipes are planned",
    ),
    uses=(EXCERPTS, SMOOTHING, SWAPPED_KLD),
)

PRESET = "Q4_K_M"


@dataclasses.dataclass(frozen=True)
class SmoothingTrial:
    """A preset of both models.

    Parameters:
        preset: its name.
        before: KLD with the model as it is, nats per token.
        after: KLD with the smoothed model.
        error: standard error of the difference.
        tokens: how many tokens were scored.
    """

    preset: str
    before: float
    after: float
    error: float
    tokens: int

    @property
    def helps(self) -> bool:
        """Whether the quant of the smoothed model is nearer to full precision."""
        return self.after < self.before


@SMOOTHING_TRIAL.entry
def try_smoothing(
    plain: ModelFiles,
    smoothed: ModelFiles,
    text: Text,
    decoding: Decoding,
    options: SmoothingOptions | None = None,
    *,
    preset: str = PRESET,
    work: pathlib.Path | None = None,
    progress: Progress = SILENT,
) -> SmoothingTrial:
    """Measures a preset, with the library's blocks, of both models against the full precision.

    Parameters:
        plain: the model as it is, and its importance matrix.
        smoothed: the smoothed model, and its importance matrix.
        text: what is predicted: a text that the result is not judged by.
        decoding: how models are decoded.
        options: on how many chunks.
        preset: name of the preset.
        work: folder in which the predictions of full precision are kept for the next trial; None keeps nothing.
        progress: where work is shown.

    Raises:
        BitladderError: the preset cannot be made, or a model does not decode.
    """
    chunks = (options or SmoothingOptions()).trial_chunks
    settings = MeasureOptions(**dataclasses.asdict(decoding) | {"chunks": chunks})
    with (
        tempfile.TemporaryDirectory(
            dir=plain.model.parent if work is None else work, prefix=".trial.", suffix=".tmp"
        ) as temporary,
        kept_base(work or pathlib.Path(temporary), plain.model, text, settings, progress) as base,
        progress.task(f"{preset} original and smoothed", 2) as task,
    ):
        klds = []
        for files in (plain, smoothed):
            klds.append(_preset_kld(files, base, preset, decoding, chunks))
            task.advance()
    before, after = klds
    gap = paired_mean(after, before, min(chunks, len(base.chunks)))
    return SmoothingTrial(preset, float(before.mean()), float(after.mean()), gap.error, before.size)


def trial_text(calibration: Sequence[Text], options: SmoothingOptions, n_ctx: int) -> Text:
    """Passages of the calibration texts on which smoothing is tried.

    Parameters:
        calibration: the texts.
        options: how many chunks, and where they begin.
        n_ctx: tokens of a chunk.
    """
    return excerpts(calibration, options.trial_chunks, n_ctx, offset=options.trial_offset)


def _preset_kld(
    files: ModelFiles, base: HiddenBase, preset: str, decoding: Decoding, chunks: int
) -> npt.NDArray[np.float64]:
    """KLD of each token, nats."""
    with (
        prepare(files.model, QuantizeOptions(preset), imatrix=files.imatrix) as prepared,
        Renderer(prepared.file, prepared.importance, threads=decoding.threads) as renderer,
        SwappedModel(base, renderer, decoding) as model,
    ):
        types = {tensor.name: tensor.type.name for tensor in prepared.choice.tensors if tensor.changes}
        return model.kld(types, chunks).ravel()
