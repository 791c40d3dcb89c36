"""A finished run as the report reads it from the run directory."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import pydantic

from bitladder.calibrate import TensorStatistics, read_imatrix, tensor_statistics
from bitladder.errors import BitladderError
from bitladder.evaluate import Figure, NamedFile, Role, RunScores, Scores, read_document, read_scores
from bitladder.gguf import GgufFile
from bitladder.recipe import Recipe, read_recipe
from bitladder.rundir import Layout, Manifest, RunRecord, check_source, complete_manifest, load_manifest, naive
from bitladder.text import ChatTemplate

D = TypeVar("D", bound=pydantic.BaseModel)


class ReportedRecipe(pydantic.BaseModel):
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


class TriedRecipes(pydantic.BaseModel):
    """candidates.json: every recipe that was tried, and the text on which they were measured."""

    text: NamedFile | None = None
    n_ctx: int | None = None
    chunks: int | None = None
    candidates: list[ReportedRecipe] = []


class ReportedPrices(pydantic.BaseModel):
    """What each type of a tensor adds to the mean KLD, nats per token, by the name of the type."""

    kld: dict[str, float]


class ReportedCheck(pydantic.BaseModel):
    """How prices fit swaps that they were not made from: Spearman's correlation, and measured / predicted."""

    pairs: int
    rank_correlation: float
    median_ratio: float


class Prices(pydantic.BaseModel):
    """sensitivity-….json: the price of each type of each tensor, and the rungs that it serves; all if none is named."""

    rungs: list[str] = []
    tensors: dict[str, ReportedPrices] = {}
    check: ReportedCheck | None = None


@dataclasses.dataclass(frozen=True)
class RunModel:
    """A model file of a run, with its figures.

    Parameters:
        label: the name in tables.
        role: what the model is in the run.
        scores: its figures.
        recipe: the types of its tensors; None if they are not known.
    """

    label: str
    role: Role
    scores: RunScores
    recipe: Recipe | None = None

    @property
    def size_order(self) -> tuple[int, bool, str]:
        """A key that sorts from the smallest file to the largest. Of files of equal size the rung comes first."""
        return self.scores.bytes, self.role != "rung", self.label


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Parameters:
        layout: the paths of the run directory.
        manifest: ladder.json.
        record: what the run was asked for.
        full: facts of the full-precision model (`ladder.source.describe`).
        base: the full-precision model.
        rungs: from the smallest file to the largest.
        naive: by rung, the preset by itself.
        others: files of somebody else.
        tried: every recipe that was tried; None if there is no such file.
        prices: files of prices that a rung is planned by: whether they are of the smoothed model → path → prices.
    """

    layout: Layout
    manifest: Manifest
    record: RunRecord
    full: dict[str, Any]
    base: RunModel
    rungs: tuple[RunModel, ...]
    naive: dict[str, RunModel]
    others: tuple[RunModel, ...]
    tried: TriedRecipes | None
    prices: dict[bool, dict[pathlib.Path, Prices]]

    @property
    def name(self) -> str:
        """The name of the model."""
        return str(self.full["general"].get("name") or self.full["stem"])

    @property
    def origin(self) -> str | None:
        """The hub id of the model that was quantized; None if it is not known."""
        return self.record.model_id or self.full.get("origin")

    @property
    def has_full_file(self) -> bool:
        """Whether the run made the full-precision file, which then belongs to the directory and its repository."""
        return bool(self.manifest.steps["convert"].outputs)

    @property
    def beside(self) -> dict[int, int]:
        """Bytes of cache and buffers by the tokens of the context; empty if they are not known."""
        memory = self.manifest.steps.get("memory")
        facts = memory.facts.get("beside", {}) if memory else {}
        return {int(tokens): int(size) for tokens, size in facts.items()}

    @property
    def usual_context(self) -> int | None:
        """Tokens of the context for which files are recommended, of medium length; None if its memory is not known."""
        contexts = sorted(self.beside)
        return contexts[len(contexts) // 2] if contexts else None

    @property
    def other_text(self) -> str | None:
        """The text on which candidates were measured, if it is not that of the scores."""
        tried = self.tried
        if not tried or not tried.text or not any(recipe.kld for recipe in tried.candidates):
            return None
        scored = {text.sha256 for text in self.base.scores.texts_used}
        return tried.text.name if scored != {tried.text.sha256} else None

    @property
    def quants(self) -> list[RunModel]:
        """Rungs, presets by themselves and files of others, from the smallest to the largest."""
        models = [*self.rungs, *self.naive.values(), *self.others]
        return sorted(models, key=lambda model: model.size_order)

    @property
    def texts(self) -> list[str]:
        """The names of several texts that every model was measured on; empty for a single text."""
        names = [text.name for text in self.base.scores.texts_used]
        return names if all(len(model.scores.texts) == len(names) for model in self.models) else []

    def on(self, index: int) -> "FinishedRun":
        """The run with the figures on one of several texts in place of their means."""

        def on_text(model: RunModel) -> RunModel:
            return dataclasses.replace(model, scores=model.scores.on(index))

        return dataclasses.replace(
            self,
            base=on_text(self.base),
            rungs=tuple(map(on_text, self.rungs)),
            naive={rung: on_text(model) for rung, model in self.naive.items()},
            others=tuple(map(on_text, self.others)),
        )

    def prices_for(self, model: RunModel) -> Prices | None:
        """The prices of the model that a file is made of, for its rung; the first ones if they are for no such rung."""
        names = {model.label, model.scores.rung, model.recipe.preset if model.recipe else None}
        of_bands = self.prices.get(model.scores.smoothed, {}).values()
        own = [prices for prices in of_bands if not names.isdisjoint(prices.rungs)]
        return next(iter([*own, *of_bands]), None)

    @property
    def models(self) -> list[RunModel]:
        """The full-precision model and all quants, from the smallest to the largest."""
        return [self.base, *self.quants]


def read_run(folder: pathlib.Path) -> FinishedRun:
    """Reads a run directory, except for the shapes of tensors and the importance matrix.

    Raises:
        BitladderError: the directory has no finished run, or a file of it is missing or has a wrong form.
    """
    layout = Layout(folder)
    manifest, record = complete_manifest(folder)
    check_source(folder, manifest)
    full = manifest.steps["convert"].facts
    rungs = [
        RunModel(rung, "rung", read_scores(layout.scores(rung)), read_recipe(layout.recipe(rung)))
        for rung in record.rungs
    ]
    presets = {
        rung: _model(layout, f"{rung} preset", "naive", naive(rung))
        for rung in record.rungs
        if layout.scores(naive(rung)).is_file()
    }
    return FinishedRun(
        layout=layout,
        manifest=manifest,
        record=record,
        full=full,
        base=RunModel(full["encoding"], "base", read_scores(layout.scores("base"))),
        rungs=tuple(sorted(rungs, key=lambda model: model.size_order)),
        naive=presets,
        others=tuple(_model(layout, name, "third-party", name) for name in record.compared),
        tried=_tried(layout.candidates, record.rungs),
        prices=read_prices(layout, {model.label: model.scores.smoothed for model in rungs}),
    )


def read_prices(layout: Layout, smoothed: Mapping[str, bool]) -> dict[bool, dict[pathlib.Path, Prices]]:
    """The files of prices that rungs are planned by.

    Parameters:
        layout: the paths of the run directory.
        smoothed: rung → whether it is made of the smoothed model.

    Returns:
        Whether the prices are of the smoothed model → path → prices.

    Raises:
        BitladderError: a file is damaged.
    """
    found: dict[bool, dict[pathlib.Path, Prices]] = {}
    for model in sorted(set(smoothed.values())):
        planned = {rung for rung, made_of in smoothed.items() if made_of == model}
        for path in layout.sensitivities(smoothed=model):
            prices = read_document(path, Prices)
            if not prices.rungs or planned & set(prices.rungs):
                found.setdefault(model, {})[path] = prices
    return found


def read_shapes(run: FinishedRun) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in GGUF order, from the header of a model file; empty if there is no such file."""
    path = _any_model(run)
    if path is None:
        return {}
    with GgufFile(path) as file:
        return {tensor.name: tuple(tensor.shape) for tensor in file.tensors.values()}


def read_chat_template(run: FinishedRun) -> ChatTemplate | None:
    """The chat template of the model; None if it has none, or if there is no model file that can be read."""
    path = _any_model(run)
    with contextlib.suppress(BitladderError):
        return ChatTemplate.of(path) if path else None
    return None


def _any_model(run: FinishedRun) -> pathlib.Path | None:
    """The path of one of the model files; None if there is none."""
    paths = (run.layout.model(name) for name in (run.full["file"], *(rung.scores.model for rung in run.rungs)))
    return next((path for path in paths if path.is_file()), None)


def read_importance(run: FinishedRun) -> list[TensorStatistics]:
    """The statistics of the importance matrix; empty without one. Raises BitladderError if it is damaged."""
    path = run.layout.imatrix
    return tensor_statistics(read_imatrix(path)) if path.is_file() else []


@dataclasses.dataclass(frozen=True)
class UnfinishedRun:
    """What there is of a run that is not complete.

    Parameters:
        record: what the run was asked for.
        measured: figures without speeds by label: "base" and rungs.
        missing: the rungs that are not made or measured yet.
    """

    record: RunRecord
    measured: dict[str, Scores]
    missing: tuple[str, ...]


def read_unfinished(folder: pathlib.Path) -> UnfinishedRun | None:
    """What there is of the run that is under way, or was interrupted, in a directory; None if it is complete.

    Raises BitladderError if the directory is none of a run, or a file cannot be read.
    """
    manifest, layout = load_manifest(folder), Layout(folder)
    if manifest is None or manifest.run is None or manifest.run.complete:
        return None
    labels = ("base", *manifest.run.rungs)
    there = [label for label in labels if f"measure {label}" in manifest.steps and layout.measured(label).is_file()]
    measured = {label: read_document(layout.measured(label), Scores) for label in there}
    return UnfinishedRun(manifest.run, measured, tuple(label for label in labels[1:] if label not in measured))


def _tried(path: pathlib.Path, rungs: Collection[str]) -> TriedRecipes | None:
    """The recipes that were tried for some rungs. A run that is under way may have tried others already."""
    tried = _optional(path, TriedRecipes)
    if tried is None:
        return None
    return tried.model_copy(update={"candidates": [recipe for recipe in tried.candidates if recipe.rung in rungs]})


def _model(layout: Layout, label: str, role: Role, name: str) -> RunModel:
    recipe = layout.recipe(name)
    return RunModel(label, role, read_scores(layout.scores(name)), read_recipe(recipe) if recipe.is_file() else None)


def _optional(path: pathlib.Path, kind: type[D]) -> D | None:
    return read_document(path, kind) if path.is_file() else None
