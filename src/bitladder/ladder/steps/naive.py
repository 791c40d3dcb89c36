"""The step that measures a preset by itself. Its file is not kept."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from bitladder import evaluate, quantize
from bitladder.files import write_json
from bitladder.ladder.context import Run
from bitladder.ladder.steps.measure import divergence, keep_tokens, measure, measured_with, scoring, task_parts
from bitladder.ladder.steps.quantize import library_part, preset_decides, quant_bytes, recipe_of
from bitladder.ladder.steps.step import Extent, Part, Product, Room, Step
from bitladder.recipe import write_recipe
from bitladder.rundir import naive


class Naive(Step):
    """full-precision GGUF, imatrix → figures without speeds and recipe of the preset, as llama-quantize makes it."""

    verb = "naive"
    anywhere = True
    algorithms = (quantize.QUANTIZE, evaluate.MEASURE, evaluate.TASKS)

    @property
    def needs(self) -> tuple[str, ...]:
        """What quantization and measurement read."""
        return tuple(dict.fromkeys(("convert", "imatrix", *measured_with(self))))

    def decides(self) -> Mapping[str, Any]:
        """The preset, and how it is measured."""
        return {**preset_decides(self.options, self.label), **scoring(self)}

    def parts(self, extent: Extent) -> list[Part]:
        """Quantization by the library, and a measurement."""
        return [library_part(self.label, extent), divergence(extent), *task_parts(self, extent)]

    def room(self, extent: Extent) -> Room:
        """The file, while it is measured."""
        return Room(beside=quant_bytes(self.label, extent))

    def make(self, run: Run) -> Product:
        """Makes the file, measures it, and removes it."""
        rung, label = self.label, naive(self.label)
        out, recipe, file = run.layout.measured(label), run.layout.recipe(label), run.layout.naive_quant(rung)
        with preset_file(run, rung) as result:
            name = run.layout.quant(run.facts("convert")["stem"], rung).name
            measured = measure(run, file)
            write_json(out, measured.scores.model_copy(update={"model": name}).to_json())
            write_recipe(recipe, recipe_of(run, result, name))
            tokens = keep_tokens(run, label, measured)
        return Product([out, recipe, tokens], {"bytes": result.bytes, "bpw": result.bpw})


@contextlib.contextmanager
def preset_file(run: Run, rung: str) -> Iterator[quantize.QuantizeResult]:
    """Makes the preset by itself, and removes its file (`Layout.naive_quant`) in the end."""
    file = run.layout.naive_quant(rung)
    try:
        yield quantize.quantize(
            run.full,
            file,
            run.options.quantization(rung),
            imatrix=run.files("imatrix")[0],
            threads=run.options.decoding.threads,
            progress=run.progress,
            same=run.by_library(smoothed=False),
        )
    finally:
        file.unlink(missing_ok=True)
