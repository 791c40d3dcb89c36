"""The steps that plan a rung, the type of each tensor, and that join the plans of all rungs."""

from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.evaluate import BASE
from bitladder.files import write_json
from bitladder.ladder import cost
from bitladder.ladder.context import Run, read_json
from bitladder.ladder.steps.price import ORIGINAL, SMOOTHED, planned_from, planning, priced, swapped_bytes
from bitladder.ladder.steps.quantize import preset_decides
from bitladder.ladder.steps.step import Extent, Part, Product, Step
from bitladder.plan import PLANNING, RENDERED, band_name, band_of, candidates, load_prices, plan_rung
from bitladder.refine import OUTPUT_ROUNDING
from bitladder.trial import RENDERING, MeasuredRecipe, Wanted

PUT_IN = 0.5  # share of the weights that differ from the recipe before, about
SIMPLER = 5  # recipes of simpler methods, about


class PlanRung(Step):
    """prices, calibration text → the types of a rung, and every recipe that was tried."""

    verb = "plan"
    cache = RENDERED
    algorithms = (PLANNING, RENDERING, OUTPUT_ROUNDING, BASE)

    @property
    def needs(self) -> tuple[str, ...]:
        """The text, and which model the rung is made of."""
        return ("calibration", *((f"trial {self.label}",) if self.options.smooths else ()))

    @property
    def anywhere(self) -> bool:  # type: ignore[override]
        """Each of several rungs is planned on one machine. The recipes of a rung that is alone are spread."""
        return len(self.options.rungs) > 1

    def surroundings(self, run: Run) -> Mapping[str, Any]:
        """The model that the rung is made of, and its prices."""
        return {part: run.digest(part) for part in self._material(smoothed=run.smoothed(self.label))}

    def _material(self, *, smoothed: bool) -> tuple[str, ...]:
        prices = priced(SMOOTHED if smoothed else ORIGINAL, band_of(self.label))
        return (f"price {prices}", *planned_from(self, smoothed=smoothed))

    def reads(self, run: Run | None = None) -> tuple[str, ...]:
        """The files of the model that the rung is made of, and its prices."""
        either = {False, self.options.smooths} if run is None else {run.smoothed(self.label)}
        return tuple(part for smoothed in either for part in self._material(smoothed=smoothed))

    def decides(self) -> Mapping[str, Any]:
        """The target, how recipes are measured, and how blocks are rounded."""
        return {**preset_decides(self.options, self.label), "mode": self.options.mode, **planning(self)}

    def parts(self, extent: Extent) -> list[Part]:
        """Recipes are measured."""
        feedback, n_ctx = self.options.planning.feedback, self.options.planning.decoding.n_ctx
        kinds = len({matrix.kind for matrix in extent.shape.matrices}) + 1
        rivals = 1 + SIMPLER * self.options.planning.rivals.simpler
        tried = rivals + 1 + feedback.rounds + feedback.exchanges
        taught = 2 * kinds + (feedback.random_recipes if feedback.rounds > 1 else 0)
        judged = feedback.finalists + rivals
        chunks = tried * feedback.chunks + taught * feedback.teaching_chunks + judged * feedback.judging_chunks
        recipes, weights = tried + taught + judged, PUT_IN * extent.shape.weights
        seconds = cost.swapping(extent.shape, recipes, chunks * n_ctx, n_ctx, weights)
        return [Part("recipes", seconds, "measure recipes")]

    def memory(self, extent: Extent) -> float:
        """The loaded model, and what is swapped."""
        return swapped_bytes(extent)

    def make(self, run: Run) -> Product:
        """Plans the rung."""
        rung, out = self.label, run.layout.plan(self.label)
        smoothed, mode = run.smoothed(rung), self.options.mode
        assert mode != "naive"  # such a run has no step that plans
        prices = load_prices(run.layout.sensitivity(band_name(band_of(rung)), smoothed=smoothed))
        write_json(out, plan_rung(run.planner(smoothed=smoothed, step=self), rung, mode, prices))
        return Product([out])

    def measure(self, run: Run, wanted: Sequence[Wanted]) -> list[MeasuredRecipe]:
        """Measures a share of the recipes (`trial.Helpers`)."""
        return run.planner(smoothed=run.smoothed(self.label)).measure_share(wanted)


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
