"""Checks of every option and every text against each step that uses it, before hours of work."""

import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bitladder.calibrate import MIN_CALIBRATION_CTX
from bitladder.convert import Checkpoint, ConvertOptions, converter_file
from bitladder.engine import Model
from bitladder.errors import BitladderError, UsageError
from bitladder.gguf import open_model
from bitladder.ladder.options import RunOptions
from bitladder.ladder.source import Source
from bitladder.ladder.steps.step import Step, TextsOfRun
from bitladder.ladder.store import Store
from bitladder.progress import Progress
from bitladder.text import MIN_CHUNKS, Text

CHARACTERS = 32  # of a token: the beginning of a text with so many for each token that is needed is looked at first


def check_options(
    options: RunOptions, source: Source, text: Text, calibration: Sequence[Text], progress: Progress
) -> None:
    """Refuses what a step would refuse later, and warns of options that have no effect.

    Parameters:
        options: the options of the run.
        source: the model.
        text: the text to measure with.
        calibration: the texts to calibrate on.
        progress: who is warned.

    Raises:
        UsageError: names the option, the value and what it must be.
    """
    conversion = options.conversion
    if conversion.converter is not None:
        converter_file(conversion.converter)
    if not source.is_gguf and options.out.resolve() == source.path.resolve():
        raise UsageError(f"--out {options.out} is the directory of the checkpoint; name another one")
    n_ctx = options.decoding.n_ctx
    if n_ctx < MIN_CALIBRATION_CTX:
        raise UsageError(f"--ctx-size is {n_ctx}; calibration needs at least {MIN_CALIBRATION_CTX} tokens")
    # A token has at least one byte, so a text of fewer bytes is too short in any vocabulary.
    needed = MIN_CHUNKS * n_ctx
    for flag, checked in [("--text", text), *(("--calibration", calibrated) for calibrated in calibration)]:
        size = len(checked.text.encode("utf-8", "surrogateescape"))
        if size < needed:
            raise UsageError(
                f"{flag} {checked.name} has {size} bytes; {needed} tokens are needed with --ctx-size {n_ctx}. "
                "Use a longer text or a smaller --ctx-size"
            )
    if source.is_gguf and conversion != ConvertOptions():
        progress.warn("MODEL is already a GGUF: options of its conversion have no effect")
    if text.sha256 in {calibrated.sha256 for calibrated in calibration}:
        progress.warn(f"{text.name} is used to calibrate and to measure: the figures will be better than on other text")


def refuse_other_model(options: RunOptions, source: Source, store: Store) -> None:
    """Refuses a run directory with the ladder of another model, unless --replace is given.

    A model is the same if its weights are the same files, or if it is the full-precision GGUF of the ladder.

    Raises UsageError that names both models.
    """
    convert = store.manifest.steps.get("convert")
    if convert is None or options.replace_model:
        return
    known = set(_weights(convert.inputs["model"])) | {output.sha256 for output in convert.outputs}
    if not known & set(_weights(source.digest(store))):
        raise UsageError(
            f"--out {options.out} has the ladder of {convert.inputs['model']['name']}, whose weights are not those of "
            f"{source.name}; name another directory, or give --replace to replace that ladder"
        )


def _weights(digest: Mapping[str, Any]) -> list[str]:
    """The content hashes of the files of a model that hold weights."""
    return [sha for name, sha in digest["files"].items() if name.endswith((".safetensors", ".bin", ".gguf"))]


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
                if len(vocabulary.tokenize(part.text.text[: CHARACTERS * needed])) > needed:
                    continue
                tokens = len(vocabulary.tokenize(part.text.text))
                if tokens < needed:
                    raise UsageError(
                        f"{part.flag} {part.text.name} has {tokens} tokens; the step {step.name} needs {needed}. "
                        "Use a longer text or a smaller --ctx-size"
                    )


# Bits per weight of a preset, for a model of 7B weights or more. The embeddings are a larger share of a small model,
# which needs more.
NOMINAL_BPW = {
    "IQ3_S": 3.6,
    "IQ3_M": 3.8,
    "Q3_K_S": 3.6,
    "Q3_K_M": 4.0,
    "Q3_K_L": 4.3,
    "IQ4_NL": 4.6,
    "Q4_K_S": 4.7,
    "Q4_K_M": 4.9,
    "Q5_K_S": 5.6,
    "Q5_K_M": 5.7,
    "Q6_K": 6.6,
    "Q8_0": 8.5,
}
OTHER_BPW = 8.5
MARGIN = 1.1


def check_room(options: RunOptions, source: Source, parameters: int, present: Iterable[str]) -> None:
    """Refuses a run whose files do not fit on the disk.

    Parameters:
        options: the options of the run.
        source: the model.
        parameters: number of its weights.
        present: names of the steps whose files are there already.

    Raises:
        BitladderError: names the bytes that are needed, and those that are free.
    """
    done = set(present)
    rungs = [rung for rung in options.rungs if f"quantize {rung}" not in done]
    convert = not source.is_gguf and "convert" not in done
    needed = bytes_needed(parameters, rungs, options.conversion.outtype if convert else None)
    if options.smooths and "smooth" not in done:
        needed += bytes_needed(parameters, (), options.conversion.outtype)
    free = shutil.disk_usage(options.out).free
    if needed > free:
        raise BitladderError(
            f"--out {options.out}: the ladder needs about {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB"
            " free; choose fewer rungs (--ladder) or another disk"
        )


def bytes_needed(parameters: int, rungs: Iterable[str], outtype: str | None) -> int:
    """About how many bytes the rungs have.

    Parameters:
        parameters: number of weights of the model.
        rungs: names of the presets.
        outtype: type of a full-precision file that is counted too, or None.
    """
    bits = sum(NOMINAL_BPW.get(rung, OTHER_BPW) for rung in rungs) * MARGIN
    if outtype is not None:
        bits += 32 if outtype == "f32" else 16
    return int(parameters * bits / 8)


def parameters_of(source: Source) -> int:
    """The number of weights of the model, from headers only. Raises BitladderError if it is not a model."""
    if source.is_gguf:
        with open_model(source.path) as file:
            return sum(tensor.elements for tensor in file.tensors.values())
    old = [path for path in source.files().values() if path.suffix == ".bin"]
    if old:
        return sum(path.stat().st_size for path in old) // 2  # pickled; most have two bytes for each weight
    return sum(tensor.elements for tensor in Checkpoint(pathlib.Path(source.path)).tensors.values())
