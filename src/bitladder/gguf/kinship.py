"""Are two files of one model?"""

import numpy as np

from bitladder.errors import BitladderError
from bitladder.gguf.reader import GgufFile


def refuse_other_model(made: GgufFile, original: GgufFile) -> None:
    """Raise BitladderError if a tensor of `made` is not in `original`, in the same shape."""
    for name, tensor in made.tensors.items():
        other = original.tensors.get(name)
        if other is None or other.shape != tensor.shape:
            raise BitladderError(
                f"{made.path} was not made from {original.path}: {name} is "
                f"{'not in it' if other is None else f'{list(other.shape)} there and {list(tensor.shape)} here'}"
            )


def refuse_other_vectors(made: GgufFile, original: GgufFile) -> None:
    """Raise BitladderError if a norm or bias is not the original's, to the bit.

    Quantizing leaves them as they are, so this tells a model from one of the same shapes: a fine-tuned one, or one that
    was smoothed.
    """
    for name, tensor in made.tensors.items():
        other = original.tensors[name]
        if (
            len(tensor.shape) == 1
            and tensor.type == other.type
            and not np.array_equal(made.read(tensor), original.read(other))
        ):
            raise BitladderError(
                f"{made.path} was not made from {original.path}, but from a model of the same shapes: {name} has other "
                "values. Name the file that it was made from (the smoothed one, if it was)"
            )
