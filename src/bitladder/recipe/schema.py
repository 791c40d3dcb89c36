"""A recipe: which type each tensor of a quant has, and what is known of how the quant was made."""

import hashlib
from collections.abc import Mapping
from typing import Literal

import pydantic


class _Table(pydantic.BaseModel):
    """A table of the file. A key that is not known is an error: a typing error must not pass for a wish."""

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
    """The importance matrix: `chunks` of `n_ctx` tokens were read from `texts`.

    A quant of llama-quantize keeps less: the file's name, `dataset` (the first text's name), `entries` and `chunks`.
    """

    dataset: str | None = None
    entries: int | None = None
    chunks: int | None = None
    n_ctx: int | None = None
    texts: list[TextUsed] = []


class Recipe(_Table):
    """The recipe of one GGUF. Only `tensors` is needed; a hand-written recipe may have nothing else.

    `tensors` maps exact names to types as ggml names them, in any case. `preset` is the base: what general.file_type
    says and what decides where `tensors` is silent. `budget` is what was asked for, as it was written; `made` the
    command or a sentence. `bytes` is the file's size (all splits), `sha256` its content, `bpw` counts all weights and
    tensor bytes only. `metadata` holds the file's own bitladder.* keys.
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
    """The hash of what a recipe decides, in hex; it is kept in a quant as bitladder.recipe.sha256.

    SHA-256 over the UTF-8 lines "NAME=TYPE\\n", names sorted by code point and types in lower case. Files with the same
    types have the same hash, whatever their header, order and formatting.
    """
    lines = (f"{name}={tensors[name].lower()}\n" for name in sorted(tensors))
    return hashlib.sha256("".join(lines).encode("utf-8")).hexdigest()
