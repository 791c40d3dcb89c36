"""The steps that price every type that a rung may need: of the original model, and of the smoothed one.

Types are priced for a band of rungs, whichever of them a run has, so that another rung changes no price. Bands share
rendered blocks and measured swaps, so a further one takes only what it lacks. Types below 4 bits take most of the time;
a ladder without a rung there has no step for them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.engine import Decoding, device_key
from bitladder.evaluate import BASE
from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.options import RunOptions
from bitladder.ladder.steps.base import base_part
from bitladder.ladder.steps.quantize import preset_decides, round_part
from bitladder.ladder.steps.step import CutText, Extent, Part, Product, Room, Step, TextsOfRun
from bitladder.plan import BANDS, PRICES, RENDERED, band_name, band_of, planning_text, price_band
from bitladder.refine import OUTPUT_ROUNDING
from bitladder.trial import MeasuredRecipe, Wanted, copies

# Types that are rendered for each of `BANDS`: their number, each counted by its time, and their bits for each weight.
TYPES, BITS = (12.0, 20.0, 23.0), (60, 80, 85)
LIBRARY = 2.5  # time of the library's blocks of such a type, of that of Q4_K: the search of I-quants takes long
ORIGINAL, SMOOTHED = "original", "smoothed"


class Price(Step):
    """model, imatrix, moments, calibration text → what each type of each tensor costs in KLD.

    Nothing is made if no rung of the band is made of the model.

    Parameters:
        options: the options of the run.
        model: "smoothed" or "original": the model that is priced.
        band: the presets whose types are priced.
    """

    verb = "price"
    cache = RENDERED
    algorithms = (PRICES, OUTPUT_ROUNDING, BASE)

    def __init__(self, options: RunOptions, model: str, band: tuple[str, ...]) -> None:
        super().__init__(options, priced(model, band))
        self._smoothed, self._band = model == SMOOTHED, band
        self._unlikely = options.smooths and not self._smoothed  # mostly all rungs are made of the smoothed model

    @property
    def needs(self) -> tuple[str, ...]:
        """The model that is priced."""
        return planned_from(self, smoothed=self._smoothed)

    def reads(self, run: Run | None = None) -> tuple[str, ...]:
        """Nothing, if no rung is made of the model."""
        return self.needs if run is None or self._used(run) else ()

    def decides(self) -> Mapping[str, Any]:
        """The presets whose types are priced, how swaps are measured, and how blocks are rounded."""
        return {**preset_decides(self.options, *self._band), **planning(self)}

    def surroundings(self, run: Run) -> Mapping[str, Any]:
        """Whether a rung is made of the model."""
        return {"whether a rung is made of it": self._used(run)}

    def _used(self, run: Run) -> bool:
        """Whether a rung of the band is made of the model, as far as trials were made."""
        rungs = [rung for rung in self.options.rungs if rung in self._band]
        tried = [rung for rung in rungs if run.facts(f"trial {rung}") or not self.options.smooths]
        return self._smoothed in {run.smoothed(rung) for rung in tried}

    def parts(self, extent: Extent) -> list[Part]:
        """Every type is rendered; then single tensors and whole kinds are swapped and measured.

        The base, single tensors and most types are done once for all bands. Before the trials nobody knows whether the
        original model is priced too. Mostly it is not.
        """
        if self._unlikely:
            return []
        prices, share = self.options.planning.prices, self.options.planning.prices.group_share
        before, after = self._before_and_after(TYPES)
        types = max(after - before, 1.0)  # a type or two may be of a preset that is alone
        passes, n_ctx = self.options.refine.rounding.passes, self.options.planning.decoding.n_ctx
        rendering = round_part(
            self.options,
            extent,
            "render every tensor",
            types=types,
            passes=min(passes, prices.price_passes),
            library=LIBRARY,
        )
        kinds = len({matrix.kind for matrix in extent.shape.matrices}) + 1
        once = prices.probe_chunks * n_ctx  # tokens of a swap
        singles = min(prices.probe_tokens * (1 - share), once * (extent.shape.blocks * (kinds - 1) + 1))
        whole = min(prices.probe_tokens * share, once * kinds * types)

        def swaps(tokens: float, label: str, weights: float = 0.0) -> Part:
            seconds = cost.comparing(extent.shape, tokens, n_ctx, scored=cost.DECIDING)
            return Part("swaps", seconds + cost.SWAPPED * weights * tokens / once, label)

        base = base_part(extent, self.options.planning.chunks * n_ctx, n_ctx, cost.DECIDING)
        first = not self._bands_before()
        return [
            *([base] if first else []),
            rendering,
            *([swaps(singles, "probe tensors")] if first else []),
            swaps(whole, "whole kinds", extent.shape.weights / kinds),
            swaps(prices.check_pairs * once, "check single swaps"),
        ]

    def _bands_before(self) -> list[tuple[str, ...]]:
        """The bands that the run prices before this one."""
        bands = bands_of(self.options)
        return bands[: bands.index(self._band)]

    def _before_and_after(self, of_bands: tuple[float, ...]) -> tuple[float, float]:
        """What there is before the band and after it, given the values of `BANDS`."""

        def value(band: tuple[str, ...]) -> float:
            usual = BANDS.index(band) if band in BANDS else int(below_four_bits(band[0]))
            return of_bands[usual] if self.options.planning.menu == "all" else of_bands[usual] / 2

        before = max(map(value, self._bands_before()), default=0.0)
        return before, max(before, value(self._band))

    def memory(self, extent: Extent) -> float:
        """The loaded model and what is swapped, or rounding."""
        rounding = cost.rounding_bytes(extent.shape, extent.rounding_threads) if self.options.rounds else 0
        return max(swapped_bytes(extent), rounding)

    def room(self, extent: Extent) -> Room:
        """The rendered blocks of all types that are kept for the plans.

        Trials decide by rung which model it is made of, so two rungs can need the blocks of both models.
        """
        if self._unlikely and len(self.options.rungs) == 1:
            return Room()
        limit = self.options.planning.cache_bytes  # of all bands together
        before, after = (
            cost.kept_blocks(extent.shape, bits / 8 * extent.shape.weights, limit)
            for bits in self._before_and_after(BITS)
        )
        return Room(work=after - before)

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """Passages of the calibration texts, on which recipes are measured too."""
        text = planning_text(texts.calibration, self.options.planning)
        return [CutText("--calibration", text, self.options.planning.decoding.n_ctx)]

    def make(self, run: Run) -> Product:
        """Prices the types."""
        if not self._used(run):
            return Product([])
        out = run.layout.sensitivity(band_name(self._band), smoothed=self._smoothed)
        price_band(run.planner(smoothed=self._smoothed, step=self), self._band).save(out)
        return Product([out])

    def render(self, run: Run, share: tuple[Sequence[tuple[str, str]], int]) -> dict[tuple[str, str], float]:
        """Renders a share of the tensors (`trial.Helpers`)."""
        return run.planner(smoothed=self._smoothed).render_share(*share)

    def measure(self, run: Run, wanted: Sequence[Wanted]) -> list[MeasuredRecipe]:
        """Measures a share of the recipes (`trial.Helpers`)."""
        return run.planner(smoothed=self._smoothed).measure_share(wanted)


def priced(model: str, band: tuple[str, ...]) -> str:
    """The label of the step that prices a band of one of the two models."""
    return f"{model} {band_name(band)}"


def bands_of(options: RunOptions) -> list[tuple[str, ...]]:
    """The bands of the rungs of a run: those of `BANDS` in order, then presets that are alone."""
    used = dict.fromkeys(map(band_of, options.rungs))
    return sorted(used, key=lambda band: BANDS.index(band) if band in BANDS else len(BANDS))


def prices_of(options: RunOptions) -> list[Price]:
    """The steps that price."""
    models = (ORIGINAL, SMOOTHED) if options.smooths else (ORIGINAL,)
    return [Price(options, model, band) for model in models for band in bands_of(options)]


def swapped_bytes(extent: Extent) -> float:
    """Memory of a model in which tensors are swapped: one is expanded to float32 twice. A small model has a copy."""
    shape, size = extent.shape, cost.model_bytes(extent.shape)
    copy = size + 4 * extent.chunk * shape.vocabulary + cost.cache_bytes(extent) + 8 * shape.largest
    return cost.decoding_bytes(extent) + 8 * shape.largest + copy * copies(size, Decoding(threads=extent.threads))


def below_four_bits(preset: str) -> bool:
    """Whether a preset has fewer than 4 bits a weight in its name, such as Q3_K_M.

    Example:
        >>> below_four_bits("IQ3_S"), below_four_bits("IQ4_XS"), below_four_bits("Q8_0")
        (True, False, False)
    """
    digits = [character for character in preset if character.isdigit()]
    return bool(digits) and int(digits[0]) < 4


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
