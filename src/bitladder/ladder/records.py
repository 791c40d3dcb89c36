"""What a run notes down: of itself, of each recipe, and of the code that decides a step."""

import importlib.metadata
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder import quantize
from bitladder.engine import native
from bitladder.ladder.manifest import RunRecord
from bitladder.ladder.others import Other
from bitladder.ladder.plan import RunOptions, Step, command_line
from bitladder.ladder.source import Source
from bitladder.recipe import FileUsed, ImatrixUsed, Recipe, TextUsed
from bitladder.text.texts import Text

IMATRIX = "imatrix.gguf"


def run_record(options: RunOptions, source: Source, others: list[Other]) -> RunRecord:
    """What was asked for."""
    return RunRecord(
        command=command_line(options, source.name, quantize.RUNGS),
        model=source.name,
        model_id=options.model_id or source.model_id,
        datasets=options.datasets,
        rungs=options.rungs,
        n_ctx=options.n_ctx,
        quantized_by=options.quantized_by,
        mode=options.mode if options.mode != "naive" else None,
        compared=tuple(other.name for other in others),
    )


def score_path(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Where the scores of a rung, of "base" or of somebody else's file are."""
    return folder / "scores" / f"{name}.json"


def read_json(path: pathlib.Path) -> Any:
    """A JSON file of the run directory."""
    return json.loads(path.read_text(encoding="utf-8"))


def recipe_of(
    result: quantize.QuantizeResult,
    name: str,
    converted: Mapping[str, Any],
    calibrated: Mapping[str, Any],
    imatrix_sha256: str,
    n_ctx: int,
    calibration: Sequence[Text],
) -> Recipe:
    """The recipe of a quant called `name`; `converted` and `calibrated` are the facts of those two steps."""
    return Recipe(
        model=str(converted["general"].get("name") or converted["stem"]),
        file=name,
        preset=result.preset,
        bytes=result.bytes,
        bpw=result.bpw,
        source=FileUsed(name=converted["file"], sha256=converted["sha256"]),
        imatrix=ImatrixUsed(
            name=IMATRIX,
            sha256=imatrix_sha256,
            chunks=calibrated["chunks"],
            n_ctx=n_ctx,
            texts=[text_used(text) for text in calibration],
        ),
        versions=native.versions(),
        tensors=result.types,
    )


def text_used(text: Text) -> TextUsed:
    """A text as recipes and steps name it."""
    return TextUsed(name=text.name, sha256=text.sha256)


def library_of(step: Step) -> str:
    """The library whose code decides the step's result."""
    if step.kind == "convert":
        return f"gguf {importlib.metadata.version('gguf')}"
    return native.library()
