"""Are two files of one model?"""

from bitladder.errors import BitladderError
from bitladder.model.reader import GgufFile


def refuse_other_model(made: GgufFile, original: GgufFile) -> None:
    """Raise BitladderError if a tensor of `made` is not in `original`, in the same shape."""
    for name, tensor in made.tensors.items():
        other = original.tensors.get(name)
        if other is None or other.shape != tensor.shape:
            raise BitladderError(
                f"{made.path} was not made from {original.path}: {name} is "
                f"{'not in it' if other is None else f'{list(other.shape)} there and {list(tensor.shape)} here'}"
            )
