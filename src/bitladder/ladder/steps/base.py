"""The step that keeps the full-precision model's predictions, which all rungs are compared with."""

from collections.abc import Mapping
from typing import Any

from bitladder import evaluate
from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.steps.step import CutText, Extent, Part, Product, Room, Step, TextsOfRun


def base_part(extent: Extent, tokens: float, n_ctx: int) -> Part:
    """The work of computing a base."""
    return Part("base", cost.decoding(extent.shape, tokens, n_ctx) + cost.scoring(extent.shape, tokens), "base of")


class Base(Step):
    """full-precision GGUF, text → base file."""

    verb = "base"
    algorithms = (evaluate.BASE,)

    @property
    def needs(self) -> tuple[str, ...]:
        """The model and the text."""
        return ("convert", "text")

    def decides(self) -> Mapping[str, Any]:
        """How the text is decoded, and how much of it."""
        return {"decoding": self.options.decoding, "chunks": self.options.chunks}

    def parts(self, extent: Extent) -> list[Part]:
        """Every token is decoded."""
        return [base_part(extent, extent.text, extent.chunk)]

    def room(self, extent: Extent) -> Room:
        """A hidden state of each scored token, in two bytes a number."""
        return Room(extent.text / 2 * (2 * extent.shape.width + 16))

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """The text that all models are measured on."""
        return [CutText("--text", texts.text, self.options.decoding.n_ctx)]

    def make(self, run: Run) -> Product:
        """Computes the base."""
        out = run.layout.folder / evaluate.cache_path(run.full, run.text, self.options.decoding.n_ctx).name
        evaluate.make_base(run.full, run.text, out, run.settings(), progress=run.progress)
        return Product([out])
