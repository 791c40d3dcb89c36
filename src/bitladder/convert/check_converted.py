"""What another converter wrote is checked as our own output is: whole, finite, and loaded by the library."""

import collections
import dataclasses
import pathlib

import numpy as np
import numpy.typing as npt

from bitladder.convert.checkpoint import Checkpoint
from bitladder.convert.tensors import first_not_finite
from bitladder.engine import Model
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, TensorInfo
from bitladder.progress import Progress

# Types of weights that can be infinite, and how their bits are read (see `checkpoint.Raw`).
READ_AS = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a GGUF says of itself: its architecture, the type of most of its weights, and the number of its tensors."""

    architecture: str
    outtype: str
    tensors: int


def check_finite_file(path: pathlib.Path, progress: Progress) -> int:
    """The number of weights of a GGUF. Raises BitladderError that names a tensor with a value that is not finite."""
    with (
        GgufFile(path) as file,
        progress.task("Checking the converted weights", file.tensor_bytes) as bar,
    ):
        for tensor in file.tensors.values():
            bar.note(tensor.name)
            refuse_not_finite(tensor, file.read(tensor))
            bar.advance(tensor.nbytes)
        return sum(tensor.elements for tensor in file.tensors.values())


def check_converted(path: pathlib.Path, checkpoint: pathlib.Path, progress: Progress, beside: int = 0) -> Converted:
    """Checks a GGUF that another converter wrote.

    Every value is finite, and the library loads the file, so no tensor that its architecture needs is missing. A
    number of weights that differs from the checkpoint's is a warning: a vision part or further heads may be left out.

    Parameters:
        path: the GGUF file.
        checkpoint: directory of the checkpoint.
        progress: gets the warning.
        beside: number of weights in the projector beside it.

    Raises:
        BitladderError: names the tensor that is not finite, or has the library's reason.
    """
    weights = check_finite_file(path, progress) + beside
    with GgufFile(path) as file:
        converted = Converted(file.architecture, _outtype(file), len(file.tensors))
    with Model(path):
        pass
    if list(checkpoint.glob("*.safetensors")):
        own = Checkpoint(checkpoint).parameters
        if weights < 0.98 * own:
            progress.warn(
                f"the GGUF has {weights:,} weights and the checkpoint {own:,}: llama.cpp's converter leaves parts out "
                "(a vision part, prediction heads)"
            )
    return converted


def _outtype(file: GgufFile) -> str:
    """The type of most weights."""
    counts: collections.Counter[str] = collections.Counter()
    for tensor in file.tensors.values():
        counts[tensor.type.name] += tensor.elements
    return counts.most_common(1)[0][0] if counts else "f32"


def refuse_not_finite(tensor: TensorInfo, data: npt.NDArray[np.uint8]) -> None:
    """Raises BitladderError that names a tensor with a NaN or an infinity. Types of blocks are not looked at."""
    if tensor.type.name not in READ_AS:
        return
    first = first_not_finite(data.reshape(-1).view(READ_AS[tensor.type.name]))
    if first is not None:
        raise BitladderError(
            f"{tensor.name} has a value that {tensor.type.name} cannot hold, at index {first[0]}; "
            "use --outtype bf16, unless the checkpoint has it too"
        )
