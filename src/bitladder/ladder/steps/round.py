"""The step that rounds the tensors of all rungs: second moments of a tensor are factored once for all its types."""

from collections.abc import Mapping
from typing import Any

from bitladder.engine import device_key
from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.steps.quantize import (
    ROUNDED,
    preset_decides,
    quant_bytes,
    read_for,
    rounding_part,
    types_of_rung,
)
from bitladder.ladder.steps.step import Extent, Part, Product, Room, Step
from bitladder.refine import OUTPUT_ROUNDING, round_ahead
from bitladder.trial import RENDERING

# Types from which the rungs of a planned ladder draw a tensor's, about: in twelve rungs of the embedded model a tensor
# has 5.0 different ones, in four 2.8, in two 1.8.
DRAWN = 5.5


class Round(Step):
    """models, imatrices, moments, plans of all rungs → rounded blocks, from which the rungs are made.

    The blocks are no product: a rung whose blocks are not there rounds its tensors itself.
    """

    verb = "round"
    cache = ROUNDED
    algorithms = (RENDERING, OUTPUT_ROUNDING)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the rungs are made of."""
        options, rungs = self.options, self.options.rungs
        needs = ["convert", "imatrix", "moments"]
        needs += ["smooth", *(f"trial {rung}" for rung in rungs)] if options.smooths else []
        needs += [f"plan {rung}" for rung in rungs] if options.plans else []
        return tuple(needs)

    def reads(self, run: Run | None = None) -> tuple[str, ...]:
        """Only what the rungs are made of."""
        return read_for(self, run, *self.options.rungs)

    def decides(self) -> Mapping[str, Any]:
        """The presets, and how blocks are rounded."""
        return {
            **preset_decides(self.options, *self.options.rungs),
            "rounding": self.options.refine.rounding,
        } | device_key(self.options.decoding.device)

    def parts(self, extent: Extent) -> list[Part]:
        """Each tensor is rounded in all types that it has in some rung."""
        return [rounding_part(self.options, extent, types=self._types)]

    @property
    def _types(self) -> float:
        """Different types of a tensor in all rungs, about."""
        return DRAWN * (1 - (1 - 1 / DRAWN) ** len(self.options.rungs))

    def memory(self, extent: Extent) -> float:
        """That of rounding."""
        return cost.rounding_bytes(extent.shape, extent.rounding_threads)

    def room(self, extent: Extent) -> Room:
        """The blocks."""
        rungs = self.options.rungs
        mean = sum(quant_bytes(rung, extent) for rung in rungs) / len(rungs)
        return Room(work=cost.kept_blocks(extent.shape, mean * self._types, self.options.planning.cache_bytes))

    def make(self, run: Run) -> Product:
        """Rounds what the rungs without a file need."""
        stem = run.facts("convert")["stem"]
        rungs = [rung for rung in self.options.rungs if not run.layout.quant(stem, rung).exists()]
        for smoothed in (False, True):
            quants = [types_of_rung(run, rung)[1] for rung in rungs if run.smoothed(rung) == smoothed]
            if quants:
                round_ahead(
                    run.material(smoothed=smoothed),
                    quants,
                    self.options.refine.rounding,
                    run.layout.material_work(smoothed=smoothed) / ROUNDED,
                    decoding=run.decoding,
                    progress=run.progress,
                )
        return Product([])
