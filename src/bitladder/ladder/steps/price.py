"""The step that prices every type that a rung may need."""

from collections.abc import Mapping
from typing import Any

from bitladder.evaluate import BASE
from bitladder.ladder.context import Run
from bitladder.ladder.steps.quantize import round_amount
from bitladder.ladder.steps.step import Extent, Part, Product, Step
from bitladder.plan import PRICES, price_rungs
from bitladder.quantize import QuantizeOptions
from bitladder.refine import OUTPUT_ROUNDING

TYPES = 12  # that are rendered to price a ladder, about


class Price(Step):
    """models, imatrices, moments, calibration text → what each type of each tensor costs in KLD."""

    verb = "price"
    algorithms = (PRICES, OUTPUT_ROUNDING, BASE)

    @property
    def needs(self) -> tuple[str, ...]:
        """What rungs are made of."""
        return planned_from(self, self.options.rungs)

    def decides(self) -> Mapping[str, Any]:
        """Which rungs there are, how swaps are measured, and how blocks are rounded."""
        presets = [QuantizeOptions(rung) for rung in sorted(self.options.rungs)]
        return {"presets": presets, **planning(self)}

    def parts(self, extent: Extent) -> list[Part]:
        """Every type is rendered; then single tensors and whole kinds are swapped and measured."""
        prices, share = self.options.planning.prices, self.options.planning.prices.group_share
        kind, amount = round_amount(self.options, extent)
        passes = self.options.refine.rounding.passes
        amount *= (1 + min(passes, prices.price_passes)) / (1 + passes)
        checked = prices.check_pairs * prices.probe_chunks * self.options.planning.decoding.n_ctx
        return [
            Part(kind, TYPES * amount, "render every tensor"),
            Part("swaps", prices.probe_tokens * (1 - share), "probe tensors"),
            Part("swaps", prices.probe_tokens * share, "whole kinds"),
            Part("swaps", checked, "check single swaps"),
        ]

    def make(self, run: Run) -> Product:
        """Prices the types of each material."""
        files = []
        materials = {run.smoothed(rung) for rung in self.options.rungs}
        for smoothed in sorted(materials, reverse=True):
            rungs = [rung for rung in self.options.rungs if run.smoothed(rung) == smoothed]
            out = run.layout.sensitivity(plain=len(materials) > 1 and not smoothed)
            price_rungs(run.planner(smoothed=smoothed), rungs).save(out)
            files.append(out)
        return Product(files)


def planned_from(step: Step, rungs: tuple[str, ...]) -> tuple[str, ...]:
    """What a plan of some rungs reads."""
    options = step.options
    needs = ["convert", "imatrix", "calibration"]
    needs += ["moments"] if options.rounds else []
    needs += ["smooth", *(f"trial {rung}" for rung in rungs)] if options.smooths else []
    return tuple(needs)


def planning(step: Step) -> dict[str, Any]:
    """The options that decide prices and plans."""
    options = step.options
    return {"planning": options.planning, "rounding": options.refine.rounding, "gpu": options.decoding.gpu_layers != 0}
