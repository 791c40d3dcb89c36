"""Bytes and bits per weight of recipes, where the shapes of the tensors are known."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from bitladder.engine import type_by_name
from bitladder.errors import BitladderError
from bitladder.gguf import TensorPlan, block_of

# Tensor name → shape in GGUF order: shape[0] is the row width.
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes of tensors without padding, and the weights in them."""

    bytes: int
    weights: int

    @property
    def bpw(self) -> float:
        """Bits per weight; 0 if there are no weights."""
        return 8 * self.bytes / self.weights if self.weights else 0.0


def tensor_bytes(name: str, kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor as `kind`. Raises BitladderError that names it if the type is unknown or cannot hold a row."""
    try:
        return TensorPlan(name, shape, type_by_name(kind)).nbytes
    except BitladderError as error:
        raise BitladderError(f"{name}: {error}") from error


def size_of(tensors: Mapping[str, str], shapes: Shapes, names: Iterable[str] | None = None) -> Size | None:
    """The size of a recipe's tensors, without padding.

    Parameters:
        tensors: tensor → type.
        shapes: tensor → shape.
        names: the tensors to count; None for all.

    Returns:
        The size; None if a shape is unknown.

    Raises:
        BitladderError: as `tensor_bytes`.

    Example:
        >>> size_of({"blk.0.attn_v.weight": "q4_K"}, {"blk.0.attn_v.weight": (256, 2)})
        Size(bytes=288, weights=512)
    """
    chosen = list(tensors if names is None else names)
    if not all(name in shapes for name in chosen):
        return None
    return Size(
        sum(tensor_bytes(name, tensors[name], shapes[name]) for name in chosen),
        sum(int(np.prod(shapes[name], dtype=np.int64)) for name in chosen),
    )


def block_size(tensors: Mapping[str, str], shapes: Shapes) -> Size | None:
    """The size of the repeating blocks, without embeddings, head and other tensors; None if there are none."""
    inside = [name for name in tensors if block_of(name) is not None]
    return size_of(tensors, shapes, inside) if inside else None
