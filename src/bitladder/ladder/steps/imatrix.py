"""The step that collects the importance matrix."""

from collections.abc import Mapping
from typing import Any

from bitladder import calibrate
from bitladder.ladder import cost
from bitladder.ladder.context import Run, text_used
from bitladder.ladder.steps.step import CutText, Extent, Part, Product, Step, TextsOfRun
from bitladder.text import Reading
from bitladder.units import number_of

MATRIX = calibrate.ImatrixOptions()
WATCHED = 1.1  # time of a token whose inputs are added up, of that of one that is decoded


class CollectImatrix(Step):
    """full-precision GGUF, calibration texts → importance matrix."""

    verb = "imatrix"
    anywhere = True
    algorithms = (calibrate.IMATRIX,)

    @property
    def needs(self) -> tuple[str, ...]:
        """The model and the calibration texts."""
        return ("convert", "calibration")

    def _reading(self) -> Reading:
        coverage = self.options.expert_coverage
        return Reading(chunks=self.options.imatrix_chunks, spread=False, expert_coverage=coverage)

    def decides(self) -> Mapping[str, Any]:
        """How the texts are decoded, and how much of them."""
        return {"decoding": self.options.decoding, "reading": self._reading(), "matrix": MATRIX}

    def parts(self, extent: Extent) -> list[Part]:
        """Every token is decoded."""
        return [Part("imatrix", WATCHED * cost.decoding(extent.shape, extent.imatrix, extent.chunk, logits=0))]

    def memory(self, extent: Extent) -> float:
        """The model, and logits of the batches that are decoded at once."""
        decoding = self.options.decoding.replace(threads=extent.threads)
        batches = calibrate.batches_at_once(decoding, extent.shape.vocabulary)
        return cost.decoding_bytes(extent, batches * decoding.n_batch)

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """Each calibration text."""
        return texts.calibration_cuts(self.options.decoding.n_ctx)

    def make(self, run: Run) -> Product:
        """Collects the matrix."""
        out, limit = run.layout.imatrix, self.options.imatrix_chunks
        result = calibrate.collect_imatrix(
            run.full,
            run.calibration,
            out,
            reading=self._reading(),
            decoding=self.options.decoding,
            options=MATRIX,
            progress=run.progress,
        )
        if limit is not None and result.chunks < limit * len(run.calibration):
            run.progress.warn(
                f"the calibration text has only {number_of(result.chunks, 'chunk')}, fewer than --imatrix-chunks "
                f"{limit}"
            )
        texts = [text_used(text).model_dump() for text in run.calibration]
        matrix = calibrate.read_imatrix(out)
        unreached = calibrate.expert_lines(calibrate.find_gaps(matrix).unreached, "never reached")
        # The file's own figure, which every reader of it shows; it may be one less than was read (docs/imatrix.md).
        facts = {"entries": result.entries, "chunks": matrix.chunk_count, "texts": texts, "unreached": unreached}
        return Product([out], facts)
