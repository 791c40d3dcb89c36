"""Rungs with planned recipes: prices once, then for each rung the best of several recipes by measured KLD."""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.calibrate.moments.moments_file import MomentsFile
from bitladder.closing import Closing
from bitladder.engine.types import type_by_name
from bitladder.errors import BitladderError
from bitladder.evaluate import Settings
from bitladder.files import sha256_bytes, write_json
from bitladder.gguf.writer import TensorPlan
from bitladder.plan import FeedbackEffort, Planner, PlanOptions, PlanResult, Preset, Subject, Target, rivals
from bitladder.plan.prices.document import load_sensitivity
from bitladder.plan.prices.menu import ABOVE, BELOW, Window
from bitladder.plan.prices.price import Effort
from bitladder.progress import Progress
from bitladder.refine.round.output_rounding import OutputRounding
from bitladder.refine.smooth import KEY
from bitladder.rounding import RoundingOptions
from bitladder.text.texts import Text

SENSITIVITY = "sensitivity.json"
PLANNED = "planned"  # a folder: what each rung's plan tried
WORK = ".planning"  # a folder: what planning and rounding keep
N_CTX = 256
# Tokens are spent so that a rung's search takes about as long as scoring a few quants.
EFFORT = Effort(tokens=100_000)
FEEDBACK = FeedbackEffort(chunks=12, move_chunks=6, judge_chunks=12)
# What a file says of its rounding and smoothing takes so many bytes at most; planned files are not larger than presets.
SAID = 384
STATISTIC = {"sum": "Σ(Act²)", "zd": "ZD", "cossim": "CosSim"}


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
        self._work = work
        self._folder, self._model, self._imatrix = folder, model, imatrix
        self._rounding, self._paths = rounding, moments
        self._moments: list[MomentsFile] = []
        self._text = joined(calibration)
        self._settings = Settings(n_ctx=N_CTX, threads=threads, gpu_layers=gpu_layers)
        self._progress = progress
        self._subject: Subject | None = None
        self._planner: Planner | None = None

    def close(self) -> None:
        """Free the loaded model."""
        if self._planner is not None:
            self._planner.__exit__(None, None, None)
        if self._subject is not None:
            self._subject.close()
        for file in self._moments:
            file.close()
        self._planner = self._subject = None
        self._moments = []

    def _opened(self) -> Planner:
        if self._planner is None:
            self._subject = Subject(self._model, self._imatrix)
            rounding = None
            if self._rounding.method != "stock":
                # Types are priced by the errors of the blocks that will be written.
                self._moments = [MomentsFile(path) for path in self._paths]
                rounding = OutputRounding(self._moments, self._rounding)
            options = PlanOptions(
                settings=self._settings,
                effort=EFFORT,
                feedback=FEEDBACK,
                work=self._work,
                rounding=rounding,
            )
            self._planner = Planner(self._subject, self._text, options, self._progress)
        return self._planner

    def price(self, rungs: tuple[str, ...], out: pathlib.Path) -> pathlib.Path:
        """Price every type that a rung may need, as sensitivity.json has it."""
        planner = self._opened()
        presets = [planner.subject.preset(rung) for rung in rungs]
        bpw = [8 * preset.bytes / planner.subject.weights() for preset in presets]
        window = Window(min(bpw) - BELOW, max(bpw) + ABOVE)
        menus = planner.menus(window)
        for preset in presets:
            for name, menu in planner.menus(window, preset).items():
                menus[name] = tuple(sorted({*menus.get(name, ()), *menu}, key=lambda kind: (kind.bpw, kind.name)))
        planner.price_menus(menus).save(out)
        return out

    def plan(self, rung: str, mode: str, prices: pathlib.Path) -> pathlib.Path:
        """Plan a rung by its prices: planned/RUNG.json, with its types and every recipe that was tried."""
        planner = self._opened()
        preset = planner.subject.preset(rung)
        sensitivity = load_sensitivity(prices)
        marked = self._rounding.method != "stock" or planner.subject.file.get(KEY)
        room = preset.bytes - (SAID if marked else 0)
        target = Target(f"like {rung}", max_bytes=room)
        if mode == "size":
            goal = planner.measured_kld(preset)
            target = Target(f"KLD of {rung}", max_kld=goal)
        result = planner.plan(target, sensitivity, preset, self._rivals(planner, preset, sensitivity))
        out = self._folder / PLANNED / f"{rung}.json"
        write_json(out, _document(planner, result, rung, mode))
        return out

    def _rivals(self, planner: Planner, preset: Preset, sensitivity: Any) -> dict[str, Mapping[str, str]]:
        """What else could be done with the same bytes: the preset moved by statistics, and simpler allocations."""
        problem, places = planner.build_priced(sensitivity), planner.subject.places
        size = Target("", max_bytes=preset.bytes)
        found: dict[str, Mapping[str, str] | None] = {}
        if planner.subject.imatrix is not None:
            for statistic, label in STATISTIC.items():
                found[f"preset moved by {label}"] = rivals.by_statistic(
                    problem, preset.types, planner.subject.imatrix, statistic, places, preset.bytes
                )
        found["weighted error"] = rivals.weighted_error(sensitivity, planner.build, size)
        found["greedy"] = rivals.greedy_types(problem, preset.bytes)
        return {name: types for name, types in found.items() if types is not None}


def joined(texts: list[Text]) -> Text:
    """Several texts as one."""
    if len(texts) == 1:
        return texts[0]
    text = "\n\n".join(one.text for one in texts)
    return Text(" + ".join(one.name for one in texts), text, sha256_bytes(text.encode("utf-8", "surrogateescape")))


def candidates(folder: pathlib.Path, rungs: tuple[str, ...], load: Any) -> dict[str, Any]:
    """candidates.json: what all rungs tried."""
    parts = [load(folder / PLANNED / f"{rung}.json") for rung in rungs]
    if not parts:
        raise BitladderError("no rung was planned")
    first = parts[0]
    return {
        "schema_version": 1,
        "text": first["text"],
        "n_ctx": first["n_ctx"],
        "chunks": first["chunks"],
        "candidates": [one for part in parts for one in part["candidates"]],
    }


def _document(planner: Planner, result: PlanResult, rung: str, mode: str) -> dict[str, Any]:
    found = result.found
    assert found is not None  # a run always measures
    rows = []
    for one in found.tried:
        figure = one.judged or one.measured
        types = result.types | one.types
        row = {
            "rung": rung,
            "name": one.name,
            "bytes": one.bytes,
            "bpw": _bpw(planner, types),
            "kld": {"value": figure.kld, "error": figure.error},
            "types": dict(collections.Counter(one.types.values()).most_common()),
            "naive": one.name.startswith("preset ") and "moved" not in one.name,
            "chosen": one.types == found.best.types,
        }
        if one.predicted is not None:
            row["predicted_kld"] = one.predicted
        rows.append(row)
    return {
        "mode": mode,
        "made": found.best.name,
        "predicted_kld": result.allocation.cost + found.correction.offset,
        "text": {"name": planner.text.name, "sha256": planner.text.sha256},
        "n_ctx": planner.settings.n_ctx,
        "chunks": FEEDBACK.judge_chunks,
        "types": result.types,
        "candidates": rows,
    }


def _bpw(planner: Planner, types: Mapping[str, str]) -> float:
    shapes = planner.subject.file.tensors
    nbytes = sum(TensorPlan(name, shapes[name].shape, type_by_name(kind)).nbytes for name, kind in types.items())
    return 8 * nbytes / planner.subject.weights()
