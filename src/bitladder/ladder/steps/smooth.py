"""The step that writes the smoothed model."""

from collections.abc import Mapping
from typing import Any

from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.steps.step import Extent, Part, Product, Room, Step
from bitladder.refine import SMOOTHING, ModelFiles, SmoothingError, smooth_model

RESCALE, WRITE = 3e-9, 3e-9  # seconds for each weight


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
        """Reading and writing the model."""
        weights = extent.shape.weights
        return [Part("rescale", RESCALE * weights, rate="blas"), Part("write the smoothed", WRITE * weights)]

    def memory(self, extent: Extent) -> float:
        """The matrices of a block as float32, or second moments of the widest input."""
        widest = max(matrix.width for matrix in extent.shape.matrices)
        return cost.PROCESS + max(8 * extent.shape.active / extent.shape.blocks, 12 * widest**2) + 4 * extent.shape.head

    def room(self, extent: Extent) -> Room:
        """The model and its second moments once more."""
        moments = (extent.gradients, False) if self.options.rounds else ()
        files = (cost.moments_bytes(extent.shape, gradients=weighted) for weighted in moments)
        return Room(work=cost.model_bytes(extent.shape) + sum(files))

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
