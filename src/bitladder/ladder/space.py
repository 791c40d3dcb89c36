"""The room that a run needs on the disk, checked before the work."""

import pathlib
import shutil
from collections.abc import Iterable

from bitladder.convert import Checkpoint
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile
from bitladder.ladder.options import RunOptions
from bitladder.ladder.source import Source

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


def check_room(options: RunOptions, source: Source, present: Iterable[str]) -> None:
    """Refuses a run whose files do not fit on the disk.

    Parameters:
        options: the options of the run.
        source: the model.
        present: names of the steps whose files are there already.

    Raises:
        BitladderError: names the bytes that are needed, and those that are free.
    """
    done = set(present)
    rungs = [rung for rung in options.rungs if f"quantize {rung}" not in done]
    convert = not source.is_gguf and "convert" not in done
    parameters = parameters_of(source)
    needed = bytes_needed(parameters, rungs, options.outtype if convert else None)
    if options.smooths and "smooth" not in done:
        needed += bytes_needed(parameters, (), options.outtype)
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
        with GgufFile(source.path) as file:
            return sum(tensor.elements for tensor in file.tensors.values())
    old = [path for path in source.files().values() if path.suffix == ".bin"]
    if old:
        return sum(path.stat().st_size for path in old) // 2  # pickled; most have two bytes for each weight
    return sum(tensor.elements for tensor in Checkpoint(pathlib.Path(source.path)).tensors.values())
