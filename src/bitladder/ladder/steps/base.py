"""The step that keeps the full-precision model's predictions, which all rungs are compared with."""

from collections.abc import Mapping
from typing import Any

from bitladder import evaluate
from bitladder.ladder.context import Run
from bitladder.ladder.steps.step import CutText, Extent, Part, Product, Step, TextsOfRun


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
        return [Part("base", extent.text)]

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """The text that all models are measured on."""
        return [CutText("--text", texts.text, self.options.decoding.n_ctx)]

    def make(self, run: Run) -> Product:
        """Computes the base."""
        out = run.layout.folder / evaluate.cache_path(run.full, run.text, self.options.decoding.n_ctx).name
        evaluate.make_base(run.full, run.text, out, run.settings(), progress=run.progress)
        return Product([out])
