"""A recipe: the type of each tensor of a quant, and what is known of how the quant was made."""

import hashlib
from collections.abc import Mapping
from typing import Literal

import pydantic


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
