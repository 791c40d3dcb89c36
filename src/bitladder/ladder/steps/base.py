"""The step that keeps the full-precision model's predictions, which all rungs are compared with."""

from collections.abc import Mapping
from typing import Any

from bitladder import evaluate
from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.steps.step import CutText, Extent, Part, Product, Room, Step, TextsOfRun


def shared_base(step: Step, extent: Extent, tokens: float, n_ctx: int) -> list[Part]:
    """The work of computing a base of decisions that the first rung's step keeps for the steps of the others."""
    return [base_part(extent, tokens, n_ctx, cost.DECIDING)] if step.label == step.options.rungs[0] else []


def base_part(extent: Extent, tokens: float, n_ctx: int, scored: float = cost.SCORED) -> Part:
    """The work of computing a base, in which a share of the tokens is scored."""
    seconds = cost.decoding(extent.shape, tokens, n_ctx, scored) + cost.scoring(extent.shape, tokens * scored)
    return Part("base", seconds, "base of")


class MakeBase(Step):
    """full-precision GGUF, texts → a base file of each."""

    verb = "base"
    anywhere = True
    algorithms = (evaluate.BASE,)

    @property
    def needs(self) -> tuple[str, ...]:
        """The model and the texts."""
        return ("convert", "text")

    def decides(self) -> Mapping[str, Any]:
        """How texts are decoded, how much of each, and how the file is laid out."""
        return {"decoding": self.options.decoding, "chunks": self.options.chunks, "format": evaluate.BASE_FORMAT}

    def parts(self, extent: Extent) -> list[Part]:
        """Every token is decoded."""
        return [base_part(extent, extent.text, extent.chunk)]

    def room(self, extent: Extent) -> Room:
        """A hidden state of each scored token, in two bytes a number."""
        return Room(work=extent.text / 2 * (2 * extent.shape.width + 16))

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """The texts that all models are measured on."""
        return [CutText("--text", text, self.options.decoding.n_ctx) for text in texts.texts]

    def make(self, run: Run) -> Product:
        """Computes the base of each text."""
        n_ctx, folder = self.options.decoding.n_ctx, run.layout.work
        folder.mkdir(exist_ok=True)
        files = [folder / evaluate.cache_path(run.full, text, n_ctx).name for text in run.texts]
        for text, out in zip(run.texts, files, strict=True):
            evaluate.make_base(run.full, text, out, run.settings(), progress=run.progress)
        return Product(files)
