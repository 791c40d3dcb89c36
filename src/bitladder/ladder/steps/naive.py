"""The step that measures the plain preset of a rung."""

from collections.abc import Mapping
from typing import Any

from bitladder import evaluate
from bitladder.files import write_json
from bitladder.ladder.context import Run
from bitladder.ladder.steps.measure import divergence, keep_tokens, measure, measured_with, scoring, task_parts
from bitladder.ladder.steps.step import Extent, Part, Product, Step
from bitladder.rundir import naive


class Naive(Step):
    """plain preset → its figures without speeds, and what each token scored."""

    verb = "naive"
    anywhere = True
    algorithms = (evaluate.MEASURE, evaluate.TASKS)

    @property
    def needs(self) -> tuple[str, ...]:
        """The file, and what measurement reads."""
        return (f"preset {self.label}", *measured_with(self))

    def decides(self) -> Mapping[str, Any]:
        """How it is measured."""
        return scoring(self)

    def parts(self, extent: Extent) -> list[Part]:
        """A measurement."""
        return [divergence(extent), *task_parts(self, extent)]

    def make(self, run: Run) -> Product:
        """Measures the file."""
        rung, label = self.label, naive(self.label)
        out = run.layout.measured(label)
        measured = measure(run, run.layout.preset(rung))
        name = run.layout.quant(run.facts("convert")["stem"], rung).name
        write_json(out, measured.scores.model_copy(update={"model": name}).to_json())
        return Product([out, keep_tokens(run, label, measured)])
