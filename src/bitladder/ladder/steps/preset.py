"""The step that makes the plain preset of a rung."""

from collections.abc import Mapping
from typing import Any

from bitladder import quantize
from bitladder.ladder.context import Run
from bitladder.ladder.steps.quantize import library_part, preset_decides, quant_bytes, quantizing_bytes, recipe_of
from bitladder.ladder.steps.step import Extent, Part, Product, Room, Step
from bitladder.recipe import write_recipe
from bitladder.rundir import naive


class MakePreset(Step):
    """full-precision GGUF, imatrix → the preset as llama-quantize makes it, and its recipe.

    Only steps read the file: the trial of smoothing, the measurement of the preset, and that of speeds.
    """

    verb = "preset"
    anywhere = True
    algorithms = (quantize.QUANTIZE,)

    @property
    def needs(self) -> tuple[str, ...]:
        """What is quantized, and by what."""
        return ("convert", "imatrix")

    def decides(self) -> Mapping[str, Any]:
        """The types of the preset."""
        return preset_decides(self.options, self.label)

    def parts(self, extent: Extent) -> list[Part]:
        """Quantization by the library. A tensor that an earlier preset has in the same type is copied."""
        return [library_part(self.options.rungs, self.label, extent)]

    def memory(self, extent: Extent) -> float:
        """That of the library's kernels."""
        return quantizing_bytes(extent)

    def room(self, extent: Extent) -> Room:
        """The file."""
        return Room(work=quant_bytes(self.label, extent))

    def make(self, run: Run) -> Product:
        """Makes the file."""
        rung, out = self.label, run.layout.preset(self.label)
        out.parent.mkdir(parents=True, exist_ok=True)
        result = quantize.quantize(
            run.full,
            out,
            run.options.quantization(rung),
            imatrix=run.files("imatrix")[0],
            threads=run.options.decoding.threads,
            progress=run.progress,
            same=run.presets(),
        )
        recipe = run.layout.recipe(naive(rung))
        write_recipe(recipe, recipe_of(run, result, run.layout.quant(run.facts("convert")["stem"], rung).name))
        return Product([out, recipe], {"bytes": result.bytes, "bpw": result.bpw})
