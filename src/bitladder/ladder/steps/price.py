"""The steps that price every type that a rung may need: of the original model, and of the smoothed one.

Prices are of all types that the usual ladder may need, whichever rungs a run has, so that another rung changes none.
Types below 4 bits take most of the time. So a ladder without a rung there leaves them out, and the first such rung
changes the prices.
"""

from collections.abc import Mapping
from typing import Any

from bitladder.engine import device_key
from bitladder.evaluate import BASE
from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.options import RunOptions
from bitladder.ladder.steps.base import base_part
from bitladder.ladder.steps.quantize import preset_decides, round_part
from bitladder.ladder.steps.step import CutText, Extent, Part, Product, Room, Step, TextsOfRun
from bitladder.plan import PRICES, RENDERED, planning_text, price_rungs
from bitladder.quantize import RUNGS
from bitladder.refine import OUTPUT_ROUNDING

# Types that are rendered for a ladder with rungs below 4 bits and for one without: their number, each counted by its
# time, and their bits for each weight.
ALL_TYPES, ALL_BITS = 20.0, 80
HIGH_TYPES, HIGH_BITS = 12.0, 60
ORIGINAL, SMOOTHED = "original", "smoothed"


class Price(Step):
    """model, imatrix, moments, calibration text → what each type of each tensor costs in KLD.

    The label is "smoothed" or "original": the model that is priced. Nothing is made if no rung is made of it.
    """

    verb = "price"
    cache = RENDERED
    algorithms = (PRICES, OUTPUT_ROUNDING, BASE)

    @property
    def needs(self) -> tuple[str, ...]:
        """The model that is priced."""
        return planned_from(self, smoothed=self.label == SMOOTHED)

    def reads(self, run: Run | None = None) -> tuple[str, ...]:
        """Nothing, if no rung is made of the model."""
        return self.needs if run is None or self._used(run) else ()

    def decides(self) -> Mapping[str, Any]:
        """The presets whose types are priced, how swaps are measured, and how blocks are rounded."""
        return {**preset_decides(self.options, *self._presets()), **planning(self)}

    def surroundings(self, run: Run) -> Mapping[str, Any]:
        """Whether a rung is made of the model."""
        return {"whether a rung is made of it": self._used(run)}

    def _presets(self) -> tuple[str, ...]:
        rungs = self.options.rungs
        usual = [rung for rung in RUNGS if any(map(below_four_bits, rungs)) or not below_four_bits(rung)]
        return (*usual, *sorted(set(rungs) - set(usual)))

    def _used(self, run: Run) -> bool:
        """Whether a rung is made of the model, as far as trials were made."""
        tried = [rung for rung in self.options.rungs if run.facts(f"trial {rung}") or not self.options.smooths]
        return (self.label == SMOOTHED) in {run.smoothed(rung) for rung in tried}

    def parts(self, extent: Extent) -> list[Part]:
        """Every type is rendered; then single tensors and whole kinds are swapped and measured.

        Before the trials nobody knows whether the original model is priced too. Mostly it is not.
        """
        if self.label == ORIGINAL and self.options.smooths:
            return []
        prices, share = self.options.planning.prices, self.options.planning.prices.group_share
        passes, n_ctx = self.options.refine.rounding.passes, self.options.planning.decoding.n_ctx
        rendering = round_part(
            self.options, extent, "render every tensor", types=self._types(), passes=min(passes, prices.price_passes)
        )
        kinds = len({matrix.kind for matrix in extent.shape.matrices}) + 1
        once = prices.probe_chunks * n_ctx  # tokens of a swap
        singles = min(prices.probe_tokens * (1 - share), once * (extent.shape.blocks * (kinds - 1) + 1))
        whole = min(prices.probe_tokens * share, once * kinds * self._types())

        def swaps(tokens: float, label: str) -> Part:
            return Part("swaps", cost.comparing(extent.shape, tokens, n_ctx), label)

        return [
            base_part(extent, self.options.planning.chunks * n_ctx, n_ctx),
            rendering,
            swaps(singles, "probe tensors"),
            swaps(whole, "whole kinds"),
            swaps(prices.check_pairs * once, "check single swaps"),
        ]

    def _types(self) -> float:
        """How many types are rendered, each counted with its time as a multiple of that of Q4_K."""
        types = ALL_TYPES if any(map(below_four_bits, self.options.rungs)) else HIGH_TYPES
        return types if self.options.planning.menu == "all" else types / 2

    def memory(self, extent: Extent) -> float:
        """The loaded model and what is swapped, or rounding."""
        rounding = cost.rounding_bytes(extent.shape, extent.rounding_threads) if self.options.rounds else 0
        return max(swapped_bytes(extent), rounding)

    def room(self, extent: Extent) -> Room:
        """The rendered blocks of all types that are kept for the plans.

        Trials decide by rung which model it is made of, so two rungs can need the blocks of both models.
        """
        if self.label == ORIGINAL and self.options.smooths and len(self.options.rungs) == 1:
            return Room()
        bits: float = ALL_BITS if any(map(below_four_bits, self.options.rungs)) else HIGH_BITS
        bits /= 1 if self.options.planning.menu == "all" else 2
        need = bits / 8 * extent.shape.weights
        return Room(work=cost.kept_blocks(extent.shape, need, self.options.planning.cache_bytes))

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """Passages of the calibration texts, on which recipes are measured too."""
        text = planning_text(texts.calibration, self.options.planning)
        return [CutText("--calibration", text, self.options.planning.decoding.n_ctx)]

    def make(self, run: Run) -> Product:
        """Prices the types."""
        if not self._used(run):
            return Product([])
        smoothed = self.label == SMOOTHED
        out = run.layout.sensitivity(smoothed=smoothed)
        price_rungs(run.planner(smoothed=smoothed), self._presets()).save(out)
        return Product([out])


def swapped_bytes(extent: Extent) -> float:
    """Memory of a loaded model in which tensors are swapped: one is expanded to float32 twice."""
    return cost.decoding_bytes(extent) + 8 * extent.shape.largest


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
    planned = options.planning.replace(unreached_type=options.unreached_type)
    decides = {"planning": planned, "rounding": options.refine.rounding, "gpu": options.decoding.gpu_layers != 0}
    return decides | (device_key(options.decoding.device) if options.rounds else {})
