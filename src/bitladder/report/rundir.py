"""A run directory as the report reads it: what is needed, and what happens to be there."""

import dataclasses
import pathlib
from typing import Any

import pydantic

from bitladder.calibrate import read_imatrix
from bitladder.calibrate.statistics import TensorStatistics, tensor_statistics
from bitladder.gguf.reader import GgufFile
from bitladder.ladder.manifest import Manifest, RunRecord, complete_manifest
from bitladder.recipe import Recipe, read_recipe
from bitladder.report.numbers import Figure
from bitladder.report.scores import Role, Scores, TextMeasured, read_model, read_scores

CANDIDATES, SENSITIVITY, IMATRIX = "candidates.json", "sensitivity.json", "imatrix.gguf"


class Candidate(pydantic.BaseModel):
    """A recipe that was tried for a rung: predicted, measured or both; KLD in nats per token."""

    rung: str
    name: str
    bytes: int = pydantic.Field(gt=0)
    bpw: float | None = None
    predicted_kld: float | None = None
    kld: Figure | None = None
    types: dict[str, int] = {}
    naive: bool = False
    chosen: bool = False


class Candidates(pydantic.BaseModel):
    """candidates.json: everything that was tried, and the text it was measured on."""

    text: TextMeasured | None = None
    n_ctx: int | None = None
    chunks: int | None = None
    candidates: list[Candidate] = []


class TensorCost(pydantic.BaseModel):
    """What each type of a tensor adds to the mean KLD, nats per token, by the type's name in any case."""

    kld: dict[str, float]

    def of(self, kind: str) -> float | None:
        """The cost of one type; None if it was not priced."""
        return next((cost for name, cost in self.kld.items() if name.lower() == kind.lower()), None)


class Check(pydantic.BaseModel):
    """How prices fit swaps that they were not made from: Spearman's correlation and measured / predicted."""

    pairs: int
    rank_correlation: float
    median_ratio: float


class Sensitivity(pydantic.BaseModel):
    """sensitivity.json: the price of each type of each tensor."""

    tensors: dict[str, TensorCost] = {}
    check: Check | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model file and its figures; `label` is what tables call it, `recipe` None where its types are not known."""

    label: str
    role: Role
    scores: Scores
    recipe: Recipe | None = None

    @property
    def size(self) -> tuple[int, bool, str]:
        """A key that sorts from the smallest file to the largest; of equals the rung comes first."""
        return self.scores.bytes, self.role != "rung", self.label


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run. `full` holds the facts of the full-precision model (`ladder.source.describe`).

    `rungs` go from the smallest file to the largest; `naive` has, by rung, the preset by itself.
    """

    folder: pathlib.Path
    manifest: Manifest
    record: RunRecord
    full: dict[str, Any]
    base: Measured
    rungs: tuple[Measured, ...]
    naive: dict[str, Measured]
    others: tuple[Measured, ...]
    candidates: Candidates | None
    sensitivity: Sensitivity | None

    @property
    def name(self) -> str:
        """What the model is called."""
        return str(self.full["general"].get("name") or self.full["stem"])

    @property
    def origin(self) -> str | None:
        """The hub id of the model that was quantized, if it is known."""
        return self.record.model_id or self.full.get("origin")

    @property
    def quants(self) -> list[Measured]:
        """Rungs, presets by themselves and files of others, from the smallest to the largest."""
        return sorted([*self.rungs, *self.naive.values(), *self.others], key=lambda one: one.size)


def read_run(folder: pathlib.Path) -> Run:
    """Read a run directory, except for tensors' shapes and the importance matrix.

    Raises BitladderError if it holds no finished run, or if a file of it is missing or cannot be understood.
    """
    manifest, record = complete_manifest(folder)
    full = manifest.steps["convert"].facts
    rungs = [
        Measured(rung, "rung", _scores(folder, rung), read_recipe(folder / "recipes" / f"{rung}.toml"))
        for rung in record.rungs
    ]
    naive = {
        rung: Measured(f"{rung} preset", "naive", _scores(folder, name), _recipe(folder, name))
        for rung in record.rungs
        if (folder / "scores" / f"{(name := f'{rung}.naive')}.json").is_file()
    }
    others = [Measured(name, "third-party", _scores(folder, name), _recipe(folder, name)) for name in record.compared]
    return Run(
        folder=folder,
        manifest=manifest,
        record=record,
        full=full,
        base=Measured(full["encoding"], "base", _scores(folder, "base")),
        rungs=tuple(sorted(rungs, key=lambda one: one.size)),
        naive=naive,
        others=tuple(others),
        candidates=_optional(folder / CANDIDATES, Candidates),
        sensitivity=_optional(folder / SENSITIVITY, Sensitivity),
    )


def read_shapes(run: Run) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in GGUF order, from the header of a model file of the directory; empty without one."""
    names = [run.full["file"], *(one.scores.model for one in run.rungs)]
    for name in names:
        path = run.folder / name
        if path.is_file():
            with GgufFile(path) as file:
                return {tensor.name: tuple(tensor.shape) for tensor in file.tensors.values()}
    return {}


def read_importance(run: Run) -> list[TensorStatistics]:
    """What the importance matrix says of each tensor; empty without one. Raises BitladderError if it is damaged."""
    path = run.folder / IMATRIX
    return tensor_statistics(read_imatrix(path)) if path.is_file() else []


def _scores(folder: pathlib.Path, name: str) -> Scores:
    return read_scores(folder / "scores" / f"{name}.json")


def _recipe(folder: pathlib.Path, name: str) -> Recipe | None:
    path = folder / "recipes" / f"{name}.toml"
    return read_recipe(path) if path.is_file() else None


def _optional(path: pathlib.Path, kind: Any) -> Any:
    return read_model(path, kind) if path.is_file() else None
