"""Are the quants of a finished run what its directory says: their tensors are derived again from what lies there."""

import pathlib
from typing import Any

from bitladder.errors import BitladderError, UsageError
from bitladder.files import sha256_file
from bitladder.gguf import joined_sha256, shards_of
from bitladder.progress import SILENT, Progress
from bitladder.refine import VerifiedQuant, verify
from bitladder.rounding import RoundingOptions
from bitladder.rundir import Layout, Manifest, OutputFile, complete_manifest


def verify_run(
    folder: pathlib.Path,
    *,
    model: pathlib.Path | None = None,
    sample: int | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, VerifiedQuant]:
    """Derives tensors of all rungs of a finished run again, and compares bytes.

    Each file that is read must be the one that the run recorded, by size and SHA-256.

    Parameters:
        folder: the run directory.
        model: the full-precision GGUF, if the run was given one, which is not in its directory.
        sample: how many tensors of each rung, drawn at random; None takes all.
        threads: threads of the CPU; None takes all.
        progress: where work is shown.

    Returns:
        How the tensors came about, by rung.

    Raises:
        BitladderError: the run is not finished, or a file is missing or not the one that was recorded.
    """
    manifest, record = complete_manifest(folder)
    inputs = _Inputs(folder, manifest, model)
    verified = {}
    for rung in record.rungs:
        step = manifest.steps.get(f"quantize {rung}")
        if step is None:
            raise BitladderError(f"{Layout(folder).manifest} has no step quantize {rung}; give the run's command again")
        smoothed = bool(inputs.facts(f"trial {rung}").get("smoothed"))
        full, imatrix, *moments = inputs.smoothed() if smoothed else inputs.original()
        rounding = step.inputs.get("options", {}).get("rounding")
        verified[rung] = verify(
            inputs.file(step.outputs[0]),
            full,
            imatrix=imatrix,
            moments=moments if rounding else (),
            rounding=_options(rounding),
            sample=sample,
            threads=threads,
            progress=progress,
        )
    return verified


def _options(recorded: dict[str, Any] | None) -> RoundingOptions | None:
    """Options of rounding as a key holds them."""
    if not recorded:
        return None
    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()
        }
        return RoundingOptions(**values)
    except (TypeError, UsageError) as error:
        raise BitladderError(f"the run was rounded by another version of bitladder ({error}); run it again") from error


class _Inputs:
    """What the rungs of a run were made of. A file is checked when it is first asked for."""

    def __init__(self, folder: pathlib.Path, manifest: Manifest, model: pathlib.Path | None) -> None:
        self._folder, self._steps, self._model = folder, manifest.steps, model
        self._checked: dict[str, pathlib.Path] = {}

    def facts(self, step: str) -> dict[str, Any]:
        """The facts of a step; empty if the run has no such step."""
        return self._steps[step].facts if step in self._steps else {}

    def original(self) -> list[pathlib.Path]:
        """The full-precision model, its imatrix and its second moments."""
        return [self._full(), *self._files("imatrix"), *self._files("moments")]

    def smoothed(self) -> list[pathlib.Path]:
        """The smoothed model, its imatrix and its second moments."""
        return self._files("smooth")

    def _files(self, step: str) -> list[pathlib.Path]:
        return [self.file(output) for output in self._steps[step].outputs] if step in self._steps else []

    def _full(self) -> pathlib.Path:
        files = self._files("convert")
        if files:
            return files[0]
        name, digest = self.facts("convert").get("file"), self.facts("convert").get("sha256")
        if self._model is None:
            raise UsageError(f"the run was given the model {name}, which is not in {self._folder}: name it with -m")
        if str(self._model) not in self._checked:
            if joined_sha256([sha256_file(part) for part in shards_of(self._model)]) != digest:
                raise BitladderError(
                    f"{self._model} is not the model {name} that the run was given: its content differs"
                )
            self._checked[str(self._model)] = self._model
        return self._model

    def file(self, output: OutputFile) -> pathlib.Path:
        """A file that a step wrote, if it is still there and the same."""
        if output.path not in self._checked:
            path = self._folder / output.path
            if not path.resolve().is_relative_to(self._folder.resolve()):
                raise BitladderError(f"{path} lies outside {self._folder}: files of the run were tampered with")
            if not path.is_file():
                raise BitladderError(
                    f"{path} is missing, and nothing can be derived without it; a run in another directory makes it"
                )
            if path.stat().st_size != output.bytes or sha256_file(path) != output.sha256:
                raise BitladderError(f"{path} was changed after the run; give the run's command again")
            self._checked[output.path] = path
        return self._checked[output.path]
