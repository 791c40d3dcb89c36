"""The step that writes the smoothed model."""

from collections.abc import Mapping
from typing import Any

from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.steps.step import Extent, Part, Product, Room, Step
from bitladder.refine import (
    CHECKED_TOKENS,
    ORDER_LENGTH,
    SMOOTHING,
    ModelFiles,
    SmoothingError,
    may_be_ordered,
    smooth_model,
)

RESCALE, WRITE = 3e-9, 3e-8  # seconds for each weight
MOMENTS = 4e-9  # seconds for each byte of second moments


class Smooth(Step):
    """full-precision GGUF, imatrix, second moments → the same of the smoothed model."""

    verb = "smooth"
    algorithms = (SMOOTHING,)

    @property
    def needs(self) -> tuple[str, ...]:
        """The model, and what follows it by arithmetic."""
        return ("convert", "imatrix", *(("moments",) if self.options.rounds else ()))

    def decides(self) -> Mapping[str, Any]:
        """How channels are rescaled and ordered."""
        return {"smoothing": self.options.refine.smoothing}

    def parts(self, extent: Extent) -> list[Part]:
        """Reading the model, an order of its channels, writing it, a check of its logits, and its second moments."""
        shape, smoothing = extent.shape, self.options.refine.smoothing
        ordered = smoothing.order and may_be_ordered(tied=shape.tied, width=shape.width)
        order = cost.decoding(shape, ORDER_LENGTH * smoothing.order_chunks, ORDER_LENGTH, logits=0) if ordered else 0
        check = cost.decoding(shape, 2 * CHECKED_TOKENS, CHECKED_TOKENS, logits=1)
        return [
            Part("rescale", RESCALE * shape.weights + order),
            Part("write the smoothed", WRITE * shape.weights + check + MOMENTS * self._moments(extent), rate="blas"),
        ]

    def memory(self, extent: Extent) -> float:
        """The matrices of a block as float32, or second moments of the widest input."""
        widest = max(matrix.width for matrix in extent.shape.matrices)
        return cost.PROCESS + max(8 * extent.shape.active / extent.shape.blocks, 12 * widest**2) + 4 * extent.shape.head

    def room(self, extent: Extent) -> Room:
        """The model and its second moments once more."""
        return Room(work=cost.model_bytes(extent.shape) + self._moments(extent))

    def _moments(self, extent: Extent) -> float:
        """Bytes of both files of second moments."""
        files = (extent.gradients, False) if self.options.rounds else ()
        return sum(cost.moments_bytes(extent.shape, gradients=weighted) for weighted in files)

    def make(self, run: Run) -> Product:
        """Writes the files. There are none, and a remark, if the channels of the model cannot be rescaled."""
        paths = run.layout.smoothed
        moments = (paths.moments, paths.plain_moments) if self.options.rounds else ()
        out = ModelFiles(paths.model, paths.imatrix, moments)
        out.model.parent.mkdir(parents=True, exist_ok=True)
        source = {name: run.facts("convert")[name] for name in ("file", "sha256")}
        try:
            result = smooth_model(
                run.material(smoothed=False),
                out,
                self.options.refine.smoothing,
                threads=self.options.decoding.threads,
                progress=run.progress,
            )
        except SmoothingError as error:
            out.model.unlink(missing_ok=True)  # of another model that was here before
            run.progress.warn(f"the model is not smoothed: {error}")
            return Product([], source)
        return Product([paths.model, paths.imatrix, *moments], source | {"links": result.links})
