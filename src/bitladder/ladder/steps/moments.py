"""The step that collects the second moments that rounding needs."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder import calibrate
from bitladder.engine import device_key, give_back_memory
from bitladder.ladder import cost
from bitladder.ladder.context import Run
from bitladder.ladder.steps.step import CutText, Extent, Job, Part, Product, Room, Step, TextsOfRun
from bitladder.machines import wait_for
from bitladder.progress import SILENT, Progress
from bitladder.text import Reading

KINDS: tuple[calibrate.RoundingMoments, ...] = ("weighted", "plain")


class CollectMoments(Step):
    """full-precision GGUF, calibration texts → second moments: weighted ones, and plain ones of more tokens."""

    verb = "moments"
    anywhere = True
    algorithms = (calibrate.MOMENTS,)

    @property
    def needs(self) -> tuple[str, ...]:
        """The model and the calibration texts."""
        return ("convert", "calibration")

    def decides(self) -> Mapping[str, Any]:
        """How the texts are decoded, how much of them, and how tokens are weighted."""
        # Options that a run does not offer have the defaults of `bitladder calibrate`.
        reading = Reading(expert_coverage=self.options.expert_coverage)
        defaults = {"collected": calibrate.MomentsOptions(), "reading": reading}
        device = device_key(self.options.decoding.device)
        return {"decoding": self.options.decoding, "moments": self.options.moments, **defaults, **device}

    def surroundings(self, run: Run) -> Mapping[str, Any]:
        """Tokens are weighted by gradients only where torch is installed and knows the model."""
        return {"weighting": calibrate.usual_weighting(run.full)}

    def parts(self, extent: Extent) -> list[Part]:
        """Plain moments decode every token; weighted ones go back through the model too."""
        return [
            Part("second moments", cost.plain_moments(extent.shape, extent.plain_moments, extent.chunk)),
            Part("gradients", cost.weighted_moments(extent.shape, extent.moments), rate="blas"),
        ]

    def memory(self, extent: Extent) -> float:
        """The model's file, and sums within a limit."""
        return cost.gradient_bytes(extent)

    def room(self, extent: Extent) -> Room:
        """Both files; and beside them what is finished of one of them, the state of what is not, and sums of texts."""
        files = [cost.moments_bytes(extent.shape, gradients=weighted) for weighted in (extent.gradients, False)]
        text = min(extent.limit, cost.moments_sums(extent.shape, gradients=False))
        return Room(work=sum(files), beside=2 * max(files) + (len(self.options.calibration) - 1) * text)

    def cuts(self, texts: TextsOfRun) -> list[CutText]:
        """Each calibration text."""
        return texts.calibration_cuts(self.options.decoding.n_ctx)

    def make(self, run: Run) -> Product:
        """Collects both files."""
        return self._product(run, [self.collect(run, name) for name in ("plain", "weighted")])

    def jobs(self, run: Run) -> list[Job]:
        """Each file, the weighted one first, which takes most of the time; of several texts, each text of each file."""
        if len(run.calibration) == 1:
            return [("collect", name) for name in KINDS]
        return [("collect_text", name, number) for name in KINDS for number in range(len(run.calibration))]

    def collect(self, run: Run, name: calibrate.RoundingMoments) -> calibrate.MomentsResult:
        """Collects one of the two files."""
        result = calibrate.collect_job(self._job(run, name, run.progress), self._out(run, name))
        give_back_memory()
        return result

    def collect_text(self, run: Run, name: calibrate.RoundingMoments, number: int) -> str:
        """Collects the sums of a text for one of the files. Returns the last file of them, below the work folder."""
        job = self._job(run, name, SILENT)  # what a token counts by is said once, where texts are joined
        complete = calibrate.collect_text(job, self._out(run, name), number)
        return complete.relative_to(run.layout.work).as_posix()

    def joined(self, run: Run, results: Sequence[Any]) -> Product:
        """Both files, of what was collected by file or by text."""
        if len(run.calibration) > 1:
            wait_for([run.layout.work / complete for complete in results])
            jobs = [self._job(run, name, run.progress) for name in KINDS]
            results = [calibrate.join_texts(job, self._out(run, name)) for job, name in zip(jobs, KINDS, strict=True)]
        return self._product(run, results)

    def _product(self, run: Run, results: Sequence[calibrate.MomentsResult]) -> Product:
        """Both files, and what the weighted one is made of."""
        weighted = next(result for result in results if result.path.name == run.layout.moments.name)
        facts = {"chunks": weighted.chunks, "weighting": weighted.weighting}
        return Product([run.layout.moments, run.layout.plain_moments], facts)

    def _job(self, run: Run, name: calibrate.RoundingMoments, progress: Progress) -> calibrate.MomentsJob:
        return calibrate.job_for_rounding(
            run.full,
            run.calibration,
            name,
            decoding=self.options.decoding,
            options=self.options.moments,
            expert_coverage=self.options.expert_coverage,
            progress=progress,
        )

    @staticmethod
    def _out(run: Run, name: calibrate.RoundingMoments) -> pathlib.Path:
        run.layout.work.mkdir(parents=True, exist_ok=True)
        return run.layout.moments if name == "weighted" else run.layout.plain_moments
