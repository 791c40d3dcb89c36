"""Does smoothing help? A quant of the model as it is against one of the smoothed model, on some text."""

import dataclasses
import pathlib
import tempfile

from bitladder.evaluate import Settings, load_or_compute_base, measure, paired_mean
from bitladder.progress import SILENT, Progress
from bitladder.quantize import quantize
from bitladder.text.texts import Text

PRESET = "Q4_K_M"


@dataclasses.dataclass(frozen=True)
class Trial:
    """Mean KLD, nats per token, of a preset of the model as it is and of the smoothed one, and ± of their difference.

    `tokens` they were compared on.
    """

    preset: str
    before: float
    after: float
    error: float
    tokens: int

    @property
    def helps(self) -> bool:
        """Whether the smoothed one is nearer to full precision."""
        return self.after < self.before


def trial(
    model: tuple[pathlib.Path, pathlib.Path],
    smoothed: tuple[pathlib.Path, pathlib.Path],
    text: Text,
    settings: Settings,
    *,
    preset: str = PRESET,
    folder: pathlib.Path | None = None,
    base_file: pathlib.Path | None = None,
    progress: Progress = SILENT,
) -> Trial:
    """Quantize both with the library's kernels and compare them with the full precision on a text.

    Parameters: `model` and `smoothed` are a file and its imatrix each; `text` one that the result is not judged by;
    `folder` for the quants, which are removed; `base_file` where the full precision's predictions stay for the next
    trial on the same text (None: they are removed too). Raises BitladderError as quantizing and measuring do.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".trial.") as name:
        work = pathlib.Path(name)
        quant = work / "quant.gguf"
        with load_or_compute_base(model[0], text, settings, path=base_file or work / "base", progress=progress) as base:
            found = []
            for path, imatrix in (model, smoothed):
                quantize(path, quant, preset, imatrix=imatrix, threads=settings.threads, progress=progress)
                found.append(measure(quant, text, settings, base=base, progress=progress).arrays["kld"])
            gap = paired_mean(found[1], found[0], len(base.chunks))
    return Trial(preset, float(found[0].mean()), float(found[1].mean()), gap.error, found[0].size)
