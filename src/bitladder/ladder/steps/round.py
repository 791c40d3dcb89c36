"""The step that rounds the tensors of all rungs: second moments of a tensor are factored once for all its types."""

from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.engine import device_key
from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.steps.quantize import (
    DRAWN,
    KEPT,
    ROUNDED,
    preset_decides,
    quant_bytes,
    read_for,
    rounding_part,
    types_of_rung,
)
from bitladder.ladder.steps.step import Extent, Job, Part, Product, Room, Step
from bitladder.refine import OUTPUT_ROUNDING, RoundAhead
from bitladder.trial import RENDERING, Pair


class Round(Step):
    """models, imatrices, moments, plans of all rungs → rounded blocks, from which the rungs are made.

    The blocks are no product: a rung whose blocks are not there rounds its tensors itself.
    """

    verb = "round"
    anywhere = True
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
        """The blocks, and those that the guard of the rungs adds."""
        rungs = self.options.rungs
        mean = sum(quant_bytes(rung, extent) for rung in rungs) / len(rungs)
        return Room(work=cost.kept_blocks(extent.shape, KEPT * mean * self._types, self.options.planning.cache_bytes))

    def make(self, run: Run) -> Product:
        """Rounds what the rungs without a file need."""
        for smoothed, rungs in self._rungs(run).items():
            self.render(run, smoothed, rungs)
        return Product([])

    def jobs(self, run: Run) -> list[Job]:
        """Shares of the tensors."""
        jobs: list[Job] = []
        for smoothed, rungs in self._rungs(run).items():
            with self._ahead(run, smoothed, rungs) as ahead:
                jobs += [("render", smoothed, rungs, share) for share in ahead.shares(*run.machines)]
        return jobs

    def render(self, run: Run, smoothed: bool, rungs: Sequence[str], pairs: Sequence[Pair] | None = None) -> None:
        """Rounds what some rungs need, or only some pairs of tensor and type of it."""
        with self._ahead(run, smoothed, rungs) as ahead:
            ahead.render(pairs)

    def _ahead(self, run: Run, smoothed: bool, rungs: Sequence[str]) -> RoundAhead:
        return RoundAhead(
            run.material(smoothed=smoothed),
            [types_of_rung(run, rung)[1] for rung in rungs],
            self.options.refine.rounding,
            run.layout.material_work(smoothed=smoothed) / ROUNDED,
            decoding=run.decoding,
            progress=run.progress,
        )

    def joined(self, run: Run, results: Sequence[Any]) -> Product:
        """The blocks are no product."""
        del run, results
        return Product([])

    @staticmethod
    def _rungs(run: Run) -> dict[bool, list[str]]:
        """The rungs without a file, by whether they are made of the smoothed model."""
        stem, missing = run.facts("convert")["stem"], dict[bool, list[str]]()
        for rung in run.options.rungs:
            if not run.layout.quant(stem, rung).exists():
                missing.setdefault(run.smoothed(rung), []).append(rung)
        return dict(sorted(missing.items()))
