"""Checks of a run: of its options and texts before hours of work, and of its quants when it is finished.

Every option and every text is checked against each step that uses it. The tensors of a finished run's quants are
derived again from what lies in its directory.
"""

import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from bitladder.calibrate import MIN_CALIBRATION_CTX
from bitladder.convert import ConvertOptions, converter_file, read_chat_templates, refuse_checkpoint
from bitladder.engine import Model, main_memory
from bitladder.errors import BitladderError, UsageError
from bitladder.files import sha256_file
from bitladder.gguf import joined_sha256, shards_of
from bitladder.hub import check_repository
from bitladder.ladder.estimate import Estimate
from bitladder.ladder.options import RunOptions
from bitladder.ladder.source import Source
from bitladder.ladder.steps.step import Step, TextsOfRun
from bitladder.ladder.store import Store
from bitladder.progress import SILENT, Progress
from bitladder.quantize import AS_PRESET
from bitladder.recipe import target_type
from bitladder.refine import VerifiedQuant, verify
from bitladder.rounding import RoundingOptions
from bitladder.rundir import Layout, Manifest, OutputFile, complete_manifest
from bitladder.text import MIN_CHUNKS, Text
from bitladder.units import number_of

SURELY = 1.3  # an estimate of memory that is above what there is by this factor is surely right in that
CHARACTERS = 32  # of a token: the beginning of a text with so many for each token that is needed is looked at first


def check_options(
    options: RunOptions, source: Source, texts: Sequence[Text], calibration: Sequence[Text], progress: Progress
) -> None:
    """Refuses what a step would refuse later, and warns of options that have no effect.

    Parameters:
        options: the options of the run.
        source: the model.
        texts: the texts to measure with.
        calibration: the texts to calibrate on.
        progress: who is warned.

    Raises:
        UsageError: names the option, the value and what it must be.
    """
    _check_conversion(options.conversion, source, progress)
    if not source.is_gguf and options.out.resolve() == source.path.resolve():
        raise UsageError(f"--out {options.out} is the directory of the checkpoint; name another one")
    if options.repo is not None:
        check_repository(options.repo)
    if options.unreached_type != AS_PRESET:
        target_type(options.unreached_type, "--unreached-type")
    elif options.plans:
        raise UsageError(f"--unreached-type {AS_PRESET} needs --mode naive: a plan has no preset that gives a type")
    n_ctx = options.decoding.n_ctx
    if n_ctx < MIN_CALIBRATION_CTX:
        raise UsageError(f"--ctx-size is {n_ctx}; calibration needs at least {MIN_CALIBRATION_CTX} tokens")
    # A token has at least one byte, so a text of fewer bytes is too short in any vocabulary.
    needed = MIN_CHUNKS * n_ctx
    used = [("--text", text) for text in texts] + [("--calibration", text) for text in calibration]
    for flag, checked in used:
        size = len(checked.text.encode("utf-8", "surrogateescape"))
        if size < needed:
            raise UsageError(
                f"{flag} {checked.name} has {number_of(size, 'byte')}; {number_of(needed, 'token')} are needed with "
                f"--ctx-size {n_ctx}. Use a longer text or a smaller --ctx-size"
            )
    talks = next((text.name for text in [*texts, *calibration] if text.conversations), None)
    if talks and not source.is_gguf and "default" not in read_chat_templates(source.path, SILENT):
        raise UsageError(f"{talks} holds conversations, but {source.name} has no chat template: give plain text")
    for text in texts:
        if text.sha256 in {calibrated.sha256 for calibrated in calibration}:
            progress.warn(
                f"{text.name} is used to calibrate and to measure: the figures will be better than on other text"
            )


def _check_conversion(conversion: ConvertOptions, source: Source, progress: Progress) -> None:
    if conversion.converter is not None:
        converter_file(conversion.converter)
    if not source.is_gguf:
        refuse_checkpoint(source.path, conversion)
    elif conversion != ConvertOptions():
        progress.warn("MODEL is already a GGUF: options of its conversion have no effect")


def refuse_other_model(options: RunOptions, source: Source, store: Store) -> None:
    """Refuses a run directory with the ladder of another model, unless --replace is given.

    A model is the same if its files are, texts about it aside, or if it is the full-precision GGUF of the ladder. Of
    the checkpoint of a ladder that was made of a GGUF this is found when it is converted (`steps.convert`).

    Raises UsageError that names both models.
    """
    convert = store.manifest.steps.get("convert")
    if convert is None or options.replace_model or source.is_full_model_of(convert, store):
        return
    before, now = _deciding(convert.inputs["model"]), _deciding(source.digest(store))
    if before == now or (not source.is_gguf and not convert.outputs):
        return
    differing = next(name for name in sorted({**before, **now}) if before.get(name) != now.get(name))
    raise UsageError(
        f"--out {options.out} has the ladder of {convert.inputs['model']['name']}, and {source.name} is another model "
        f"({differing} differs); name another directory, or give --replace to replace that ladder"
    )


def _deciding(digest: Mapping[str, Any]) -> dict[str, str]:
    """The content hashes of the files of a model, without texts about it and the template of conversations."""
    about = ("README.md", "generation_config.json")
    return {name: sha for name, sha in digest["files"].items() if name not in about and not name.endswith(".jinja")}


def check_texts(steps: Sequence[Step], texts: TextsOfRun) -> None:
    """Refuses a text that is too short for a step. Only the vocabulary of the model is loaded.

    Parameters:
        steps: the steps of the run.
        texts: the texts, and the model whose vocabulary counts.

    Raises:
        UsageError: names the option, the text, its tokens, the step, and the tokens that it needs.
    """
    checked = set[tuple[str, int]]()
    with Model(texts.full, vocab_only=True) as vocabulary:
        for step in steps:
            for part in step.cuts(texts):
                if (part.text.sha256, part.n_ctx) in checked:
                    continue
                checked.add((part.text.sha256, part.n_ctx))
                needed = MIN_CHUNKS * part.n_ctx
                special = part.text.special
                if len(vocabulary.tokenize(part.text.text[: CHARACTERS * needed], parse_special=special)) > needed:
                    continue
                tokens = len(vocabulary.tokenize(part.text.text, parse_special=special))
                if tokens < needed:
                    raise UsageError(
                        f"{part.flag} {part.text.name} has {number_of(tokens, 'token')}; the step {step.name} needs "
                        f"{needed:,}. Use a longer text or a smaller --ctx-size"
                    )


def check_room(options: RunOptions, cost: Estimate, released: Estimate, progress: Progress) -> None:
    """Refuses a run that does not fit into memory or on the disk.

    Parameters:
        options: the options of the run.
        cost: of the steps that are left.
        released: of the same steps with --release.
        progress: is warned if memory may not suffice.

    Raises:
        BitladderError: names the step, the bytes that it needs, and those that there are.
    """
    free, largest = shutil.disk_usage(options.out).free, max(cost.stages, key=lambda stage: stage.disk_bytes)
    if largest.disk_bytes > free:
        less = f"--release, which needs {released.disk_bytes / 1e9:.3g} GB, " if released.disk_bytes <= free else ""
        raise BitladderError(
            f"--out {options.out}: the step {largest.name} needs about {largest.disk_bytes / 1e9:.3g} GB of the disk, "
            f"which has {free / 1e9:.3g} GB free; choose {less}fewer rungs (--ladder) or another disk"
        )
    memory, hungriest = main_memory(), max(cost.stages, key=lambda stage: stage.memory_bytes)
    if not memory or hungriest.memory_bytes <= memory:
        return
    needs = (
        f"the step {hungriest.name} needs about {hungriest.memory_bytes / 1e9:.1f} GB of memory, and this machine has "
        f"{memory / 1e9:.1f} GB"
    )
    if hungriest.memory_bytes > SURELY * memory:
        raise BitladderError(
            f"{needs}; try --effort normal or fast, or --tune-chunks 0 (bitladder estimate shows what each step needs)"
        )
    progress.warn(needs)


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
