"""The step that measures a preset by itself. Its file is not kept."""

from collections.abc import Mapping
from typing import Any

from bitladder import evaluate, quantize
from bitladder.files import write_json
from bitladder.ladder.context import Run
from bitladder.ladder.steps.measure import divergence, keep_tokens, measure, measured_with, scoring, task_parts
from bitladder.ladder.steps.quantize import library_part, quant_bytes, recipe_of
from bitladder.ladder.steps.step import Extent, Part, Product, Room, Step
from bitladder.recipe import write_recipe
from bitladder.rundir import naive


class Naive(Step):
    """full-precision GGUF, imatrix → figures and recipe of the preset, as llama-quantize makes it."""

    verb = "naive"
    algorithms = (quantize.QUANTIZE, evaluate.MEASURE, evaluate.TASKS)

    @property
    def needs(self) -> tuple[str, ...]:
        """What quantization and measurement read."""
        return tuple(dict.fromkeys(("convert", "imatrix", *measured_with(self))))

    def decides(self) -> Mapping[str, Any]:
        """The preset, and how it is measured."""
        return {"quantization": quantize.QuantizeOptions(self.label), **scoring(self)}

    def parts(self, extent: Extent) -> list[Part]:
        """Quantization by the library, and a measurement."""
        return [library_part(self.label, extent), divergence(extent), *task_parts(self, extent)]

    def room(self, extent: Extent) -> Room:
        """The file, while it is measured."""
        return Room(beside=quant_bytes(self.label, extent))

    def make(self, run: Run) -> Product:
        """Makes the file, measures it, and removes it."""
        rung, label = self.label, naive(self.label)
        out, recipe, file = run.layout.scores(label), run.layout.recipe(label), run.layout.naive_quant(rung)
        try:
            result = quantize.quantize(
                run.full,
                file,
                quantize.QuantizeOptions(rung),
                imatrix=run.files("imatrix")[0],
                threads=self.options.decoding.threads,
                progress=run.progress,
            )
            name = run.layout.quant(run.facts("convert")["stem"], rung).name
            measured = measure(run, file)
            place = {"model": name, "role": "naive", "rung": rung, "mode": "naive"}
            scores = evaluate.RunScores.of(measured.scores, **place)
            write_json(out, scores.to_json())
            write_recipe(recipe, recipe_of(run, result, name))
            tokens = keep_tokens(run, label, measured)
        finally:
            file.unlink(missing_ok=True)
        return Product([out, recipe, tokens], {"bytes": result.bytes, "bpw": result.bpw})
