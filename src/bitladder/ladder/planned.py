"""Rungs with planned recipes: the files that planning reads and writes in a run directory."""

import pathlib
from collections.abc import Sequence

from bitladder.closing import Closing
from bitladder.files import write_json
from bitladder.plan import PlanInputs, Planner, PlanOptions, RungMode, load_prices, plan_rung, price_rungs
from bitladder.progress import Progress
from bitladder.rounding import RoundingOptions
from bitladder.text import Text, joined

SENSITIVITY = "sensitivity.json"
PLANNED = "planned"  # a folder: what each rung's plan tried
WORK = ".planning"  # a folder: what planning and rounding keep
OPTIONS = PlanOptions()


class PlannedRungs(Closing):
    """The planner of a run. It is opened when it is first used; a run that has everything never does."""

    def __init__(
        self,
        folder: pathlib.Path,
        model: pathlib.Path,
        imatrix: pathlib.Path,
        calibration: list[Text],
        *,
        threads: int | None,
        gpu_layers: int,
        progress: Progress,
        rounding: RoundingOptions,
        moments: Sequence[pathlib.Path],
        work: pathlib.Path,
    ) -> None:
        self._folder, self._progress = folder, progress
        moments = () if rounding.method == "stock" else tuple(moments)
        self._inputs = PlanInputs(model, imatrix, joined(calibration), moments, rounding, work)
        self._options = OPTIONS.replace(decoding=OPTIONS.decoding.replace(threads=threads, gpu_layers=gpu_layers))
        self._planner: Planner | None = None

    def close(self) -> None:
        """Free the loaded model."""
        if self._planner is not None:
            self._planner.close()
        self._planner = None

    def _opened(self) -> Planner:
        if self._planner is None:
            self._planner = Planner(self._inputs, self._options, self._progress)
        return self._planner

    def price(self, rungs: tuple[str, ...], out: pathlib.Path) -> pathlib.Path:
        """Price every type that a rung may need, as sensitivity.json has it."""
        price_rungs(self._opened(), rungs).save(out)
        return out

    def plan(self, rung: str, mode: RungMode, prices: pathlib.Path) -> pathlib.Path:
        """Plan a rung by its prices: planned/RUNG.json, with its types and every recipe that was tried."""
        out = self._folder / PLANNED / f"{rung}.json"
        write_json(out, plan_rung(self._opened(), rung, mode, load_prices(prices)))
        return out
