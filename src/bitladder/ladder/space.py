"""Whether the disk has room for a run, asked before hours of work."""

import pathlib
import shutil
from collections.abc import Iterable

from bitladder.convert import Checkpoint
from bitladder.errors import BitladderError
from bitladder.gguf.reader import open_model
from bitladder.ladder.options import RunOptions
from bitladder.ladder.source import Source

# Bits per weight of a preset on a model of some size; small models, with more of them in the embeddings, need more.
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
    """Raise BitladderError if the files still to be made need more room than the disk has.

    `present` names the steps whose files are there already.
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
    """An estimate, in bytes, for the rungs and, with an `outtype`, the full-precision file."""
    bits = sum(NOMINAL_BPW.get(rung, OTHER_BPW) for rung in rungs) * MARGIN
    if outtype is not None:
        bits += 32 if outtype == "f32" else 16
    return int(parameters * bits / 8)


def parameters_of(source: Source) -> int:
    """How many weights the model has, from headers only. Raises BitladderError if it is no model."""
    if source.is_gguf:
        with open_model(source.path) as file:
            return sum(tensor.elements for tensor in file.tensors.values())
    old = [path for path in source.files().values() if path.suffix == ".bin"]
    if old:
        return sum(path.stat().st_size for path in old) // 2  # pickled, mostly two bytes a weight
    return sum(tensor.elements for tensor in Checkpoint(pathlib.Path(source.path)).tensors.values())
