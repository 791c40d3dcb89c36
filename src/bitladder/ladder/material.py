"""What a rung is made of: the full-precision model as it is, or the smoothed one; and the plans for each."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from bitladder.closing import Closing
from bitladder.ladder.plan import RunOptions
from bitladder.ladder.planned import SENSITIVITY, WORK, PlannedRungs
from bitladder.ladder.records import IMATRIX
from bitladder.ladder.rounded import MOMENTS, PLAIN, rounding_options
from bitladder.ladder.smoothed import SMOOTH, SMOOTH_IMATRIX, SMOOTH_MOMENTS, SMOOTH_PLAIN
from bitladder.progress import Progress
from bitladder.text.texts import Text

# Prices of the model as it is, where other rungs have those of the smoothed one in SENSITIVITY.
SENSITIVITY_PLAIN = "sensitivity-plain.json"


@dataclasses.dataclass(frozen=True)
class Material:
    """A full-precision file, its imatrix, its second moments (which exist if anything is rounded for outputs), and the
    folder of what planning and rounding keep of it."""

    smoothed: bool
    model: pathlib.Path
    imatrix: pathlib.Path
    moments: tuple[pathlib.Path, ...]
    work: pathlib.Path


class Materials(Closing):
    """Both materials of a run, and a planner for one of them at a time: it holds a loaded model.

    `full` is the full-precision file; `smoothed` says of a rung whether it is made of the smoothed one.
    """

    def __init__(
        self,
        options: RunOptions,
        folder: pathlib.Path,
        full: pathlib.Path,
        calibration: Sequence[Text],
        smoothed: Callable[[str], bool],
        progress: Progress,
    ) -> None:
        self._options, self._calibration, self._progress = options, list(calibration), progress
        self._folder, self._smoothed = folder, smoothed
        work = folder / WORK
        self._plain = Material(False, full, folder / IMATRIX, (folder / MOMENTS, folder / PLAIN), work / "plain")
        moments = folder / SMOOTH_MOMENTS, folder / SMOOTH_PLAIN
        self._smooth = Material(True, folder / SMOOTH, folder / SMOOTH_IMATRIX, moments, work / "smoothed")
        self._open: tuple[Material, PlannedRungs] | None = None

    def close(self) -> None:
        """Free the planner's model."""
        if self._open is not None:
            self._open[1].close()
        self._open = None

    def of(self, rung: str) -> Material:
        """What a rung is made of."""
        return self._smooth if self._smoothed(rung) else self._plain

    def price(self) -> list[pathlib.Path]:
        """Price every type that the run's rungs may need, of each material that they need."""
        found = []
        for material in (self._smooth, self._plain):
            rungs = tuple(rung for rung in self._options.rungs if self.of(rung) == material)
            if rungs:
                found.append(self._planner(material).price(rungs, self._sensitivity(material)))
        return found

    def plan(self, rung: str) -> pathlib.Path:
        """Plan a rung; see PlannedRungs."""
        material, mode = self.of(rung), self._options.mode
        assert mode != "naive"  # such a run has no step that plans
        return self._planner(material).plan(rung, mode, self._sensitivity(material))

    def _sensitivity(self, material: Material) -> pathlib.Path:
        both = len({self._smoothed(rung) for rung in self._options.rungs}) > 1
        return self._folder / (SENSITIVITY_PLAIN if both and not material.smoothed else SENSITIVITY)

    def _planner(self, material: Material) -> PlannedRungs:
        if self._open is not None and self._open[0] == material:
            return self._open[1]
        self.close()
        planner = PlannedRungs(
            self._folder,
            material.model,
            material.imatrix,
            self._calibration,
            threads=self._options.threads,
            gpu_layers=self._options.gpu_layers,
            progress=self._progress,
            rounding=rounding_options(self._options),
            moments=material.moments,
            work=material.work,
        )
        self._open = (material, planner)
        return planner
