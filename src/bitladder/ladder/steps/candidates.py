"""The step that puts together every recipe that the plans of a run tried."""

from bitladder.files import write_json
from bitladder.ladder.context import Run, read_json
from bitladder.ladder.steps.step import Product, Step
from bitladder.plan import candidates


class Candidates(Step):
    """plans → candidates.json."""

    verb = "candidates"

    @property
    def needs(self) -> tuple[str, ...]:
        """The plans of all rungs."""
        return tuple(f"plan {rung}" for rung in self.options.rungs)

    def make(self, run: Run) -> Product:
        """Joins the plans."""
        write_json(run.layout.candidates, candidates(read_json(run.files(need)[0]) for need in self.needs))
        return Product([run.layout.candidates])
