"""The step that tries whether a rung is better made of the smoothed model."""

from collections.abc import Mapping
from typing import Any

from bitladder.evaluate import BASE, decision_chunk
from bitladder.files import write_json
from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.steps.base import shared_base
from bitladder.ladder.steps.quantize import preset_decides, quant_bytes
from bitladder.ladder.steps.step import CutText, Extent, Part, Product, Room, Step, TextsOfRun
from bitladder.refine import SMOOTHING_TRIAL, trial_text, try_smoothing


class TrySmoothing(Step):
    """both models, imatrices, passages of the calibration text → which of the two the rung is made of.

    The preset of each is measured. The text that is scored is not looked at.
    """

    verb = "trial"
    anywhere = True
    algorithms = (SMOOTHING_TRIAL, BASE)

    @property
    def needs(self) -> tuple[str, ...]:
        """Both models, the preset of the original, and the text."""
        return ("convert", "imatrix", "smooth", "calibration", f"preset {self.label}")

    def decides(self) -> Mapping[str, Any]:
        """The preset, and how it is measured."""
        options = self.options
        return {
            **preset_decides(self.options, self.label),
            "decoding": options.decoding,
            "smoothing": options.refine.smoothing,
        }

    def parts(self, extent: Extent) -> list[Part]:
        """The quant of the smoothed model by the library, and two measurements."""
        half = decision_chunk(extent.chunk)
        tokens = 2 * self.options.refine.smoothing.trial_chunks * half
        seconds = cost.comparing(extent.shape, tokens, half, quant=True, scored=cost.DECIDING)
        library = cost.by_library(extent.shape, self.label)
        return [
            *shared_base(self, extent, tokens / 2, half),
            Part("quantize", library, "quantize", library=library),
            *2 * [Part("divergence", seconds / 2)],
        ]

    def room(self, extent: Extent) -> Room:
        """The quant of the smoothed model, while it is measured."""
        return Room(beside=quant_bytes(self.label, extent))

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """Passages of the calibration texts."""
        n_ctx = self.options.decoding.n_ctx
        text = trial_text(texts.calibration, self.options.refine.smoothing, n_ctx)
        return [CutText("--calibration", text, decision_chunk(n_ctx))]

    def make(self, run: Run) -> Product:
        """Measures both, and writes which is better."""
        out = run.layout.trial(self.label)
        out.parent.mkdir(parents=True, exist_ok=True)
        verdict: dict[str, Any] = {"smoothed": False}
        if run.files("smooth"):
            options, decoding = self.options.refine.smoothing, self.options.decoding
            trial = try_smoothing(
                run.material(smoothed=False),
                run.material(smoothed=True),
                trial_text(run.calibration, options, decoding.n_ctx),
                decoding,
                options,
                preset=self.options.quantization(self.label),
                quant=run.layout.preset(self.label),
                work=out.parent,
                progress=run.progress,
            )
            verdict = {"smoothed": trial.helps, "before": trial.before, "after": trial.after, "error": trial.error}
            helped, used = ("helped", "smoothed model") if trial.helps else ("did not help", "original")
            klds = f"KLD {trial.after:.5f} against {trial.before:.5f}"
            run.progress.info(f"{self.label}: smoothing {helped} ({klds}); using the {used}")
        write_json(out, verdict)
        return Product([out], {"smoothed": verdict["smoothed"]})
