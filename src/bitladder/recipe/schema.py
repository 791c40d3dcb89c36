"""What a recipe is, and the bytes and bits per weight of one where the shapes of the tensors are known."""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import pydantic

from bitladder.engine import type_by_name
from bitladder.errors import BitladderError
from bitladder.gguf import TensorPlan, block_of


class _Table(pydantic.BaseModel):
    """A table of the file. An unknown key is an error, because it may be a typing error."""

    model_config = pydantic.ConfigDict(extra="forbid")


class TextUsed(_Table):
    """A text, by name and content."""

    name: str
    sha256: str


class FileUsed(_Table):
    """A file, by name (without its path) and content."""

    name: str
    sha256: str | None = None


class ImatrixUsed(FileUsed):
    """The importance matrix. A quant of llama-quantize has no `n_ctx` and no `texts`.

    Attributes:
        dataset: name of the first text.
        entries: number of weights.
        chunks: number of chunks.
        n_ctx: tokens of a chunk.
        texts: what they were read from.
    """

    dataset: str | None = None
    entries: int | None = None
    chunks: int | None = None
    n_ctx: int | None = None
    texts: list[TextUsed] = []


class Recipe(_Table):
    """The recipe of one GGUF. Only `tensors` is needed.

    Attributes:
        model: name of the model.
        file: name of the quant.
        sha256: of its content.
        preset: the preset of general.file_type, which decides the types of tensors that are not named.
        budget: the target, as the user wrote it.
        bytes: size of the file, of all shards.
        bpw: bits per weight over all weights, tensor bytes only.
        made: the command, or a sentence.
        source: the full-precision file.
        imatrix: the importance matrix.
        versions: of the programs.
        metadata: the file's own bitladder.* keys.
        tensors: exact name → type as ggml names it, in any case.
    """

    schema_version: Literal[1] = 1
    model: str | None = None
    file: str | None = None
    sha256: str | None = None
    preset: str | None = None
    budget: str | None = None
    bytes: int | None = None
    bpw: float | None = None
    made: str | None = None
    source: FileUsed | None = None
    imatrix: ImatrixUsed | None = None
    versions: dict[str, str] = {}
    metadata: dict[str, bool | int | float | str] = {}
    tensors: dict[str, str] = pydantic.Field(min_length=1)


def recipe_sha256(tensors: Mapping[str, str]) -> str:
    """The hash of the types, in hexadecimal digits; a quant keeps it as bitladder.recipe.sha256.

    It is the SHA-256 of the UTF-8 lines "NAME=TYPE\\n", names sorted by code point, types in lower case. Recipes with
    the same types have the same hash, whatever their header, order and formatting.
    """
    lines = (f"{name}={tensors[name].lower()}\n" for name in sorted(tensors))
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()


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
