"""The steps that price every type that a rung may need: of the original model, and of the smoothed one.

Prices are of all types that the usual ladder may need, whichever rungs a run has, so that another rung changes none.
Types below 4 bits take most of the time. So a ladder without a rung there leaves them out, and the first such rung
changes the prices.
"""

from collections.abc import Mapping
from typing import Any

from bitladder.evaluate import BASE
from bitladder.ladder.context import Run
from bitladder.ladder.options import RunOptions
from bitladder.ladder.steps.quantize import round_amount
from bitladder.ladder.steps.step import CutText, Extent, Part, Product, Step, TextsOfRun
from bitladder.plan import PRICES, planning_text, price_rungs
from bitladder.quantize import RUNGS, QuantizeOptions
from bitladder.refine import OUTPUT_ROUNDING
from bitladder.text import joined

TYPES = 15  # that are rendered, about
SWAPPED = 0.44  # tokens decoded in the time that a token of the budget takes on which a swap is measured
ORIGINAL, SMOOTHED = "original", "smoothed"


class Price(Step):
    """model, imatrix, moments, calibration text → what each type of each tensor costs in KLD.

    The label is "smoothed" or "original": the model that is priced. Nothing is made if no rung is made of it.
    """

    verb = "price"
    algorithms = (PRICES, OUTPUT_ROUNDING, BASE)

    @property
    def needs(self) -> tuple[str, ...]:
        """The model that is priced."""
        return planned_from(self, smoothed=self.label == SMOOTHED)

    def decides(self) -> Mapping[str, Any]:
        """The presets whose types are priced, how swaps are measured, and how blocks are rounded."""
        return {"presets": [QuantizeOptions(preset) for preset in self._presets()], **planning(self)}

    def surroundings(self, run: Run) -> Mapping[str, Any]:
        """Whether a rung is made of the model."""
        return {"used": self._used(run)}

    def _presets(self) -> tuple[str, ...]:
        rungs = self.options.rungs
        usual = [rung for rung in RUNGS if any(map(below_four_bits, rungs)) or not below_four_bits(rung)]
        return (*usual, *sorted(set(rungs) - set(usual)))

    def _used(self, run: Run) -> bool:
        return (self.label == SMOOTHED) in {run.smoothed(rung) for rung in self.options.rungs}

    def parts(self, extent: Extent) -> list[Part]:
        """Every type is rendered; then single tensors and whole kinds are swapped and measured.

        Before the trials nobody knows whether the original model is priced too. Mostly it is not.
        """
        if self.label == ORIGINAL and self.options.smooths:
            return []
        prices, share = self.options.planning.prices, self.options.planning.prices.group_share
        kind, amount = round_amount(self.options, extent)
        passes = self.options.refine.rounding.passes
        amount *= (1 + min(passes, prices.price_passes)) / (1 + passes)
        tokens = SWAPPED * prices.probe_tokens
        checked = SWAPPED * prices.check_pairs * prices.probe_chunks * self.options.planning.decoding.n_ctx
        return [
            Part(kind, TYPES * amount, "render every tensor"),
            Part("swaps", tokens * (1 - share), "probe tensors"),
            Part("swaps", tokens * share, "whole kinds"),
            Part("swaps", checked, "check single swaps"),
        ]

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """Passages of the calibration texts, on which recipes are measured too."""
        text = planning_text(joined(texts.calibration), self.options.planning)
        return [CutText("--calibration", text, self.options.planning.decoding.n_ctx)]

    def make(self, run: Run) -> Product:
        """Prices the types."""
        if not self._used(run):
            return Product([])
        smoothed = self.label == SMOOTHED
        out = run.layout.sensitivity(smoothed=smoothed)
        price_rungs(run.planner(smoothed=smoothed), self._presets()).save(out)
        return Product([out])


def below_four_bits(preset: str) -> bool:
    """Whether a preset has fewer than 4 bits a weight in its name, such as Q3_K_M.

    Example:
        >>> below_four_bits("IQ3_S"), below_four_bits("IQ4_XS"), below_four_bits("Q8_0")
        (True, False, False)
    """
    digits = [character for character in preset if character.isdigit()]
    return bool(digits) and int(digits[0]) < 4


def priced_models(options: RunOptions) -> tuple[str, ...]:
    """The labels of the steps that price."""
    return (ORIGINAL, SMOOTHED) if options.smooths else (ORIGINAL,)


def planned_from(step: Step, *, smoothed: bool) -> tuple[str, ...]:
    """What prices and plans of one of the two models read."""
    if smoothed:
        return ("smooth", "calibration")
    return ("convert", "imatrix", "calibration", *(("moments",) if step.options.rounds else ()))


def planning(step: Step) -> dict[str, Any]:
    """The options that decide prices and plans."""
    options = step.options
    return {"planning": options.planning, "rounding": options.refine.rounding, "gpu": options.decoding.gpu_layers != 0}
