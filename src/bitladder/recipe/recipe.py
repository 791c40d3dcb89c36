"""What a recipe is, its bytes and bits per weight where shapes are known, and its form in TOML."""

import collections
import dataclasses
import difflib
import hashlib
import pathlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import pydantic
import tomli_w

from bitladder.engine import type_by_name
from bitladder.errors import BitladderError
from bitladder.files import PathLike, write_text
from bitladder.gguf import GgufFile, TensorPlan, block_of, kind_of, one_line, reading_order


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


def shapes_of(file: GgufFile) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, in GGUF order."""
    return {name: tensor.shape for name, tensor in file.tensors.items()}


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML: the header, then the tensors kind by kind, layer by layer.

    The same recipe gives the same text, whatever the order of its tensors; reading the text gives the recipe again.
    """
    head = recipe.model_dump(mode="json", exclude={"tensors"}, exclude_none=True)
    head = {key: value for key, value in head.items() if value != {}}
    if recipe.imatrix and not recipe.imatrix.texts:
        head["imatrix"].pop("texts")
    kinds: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name in sorted(recipe.tensors, key=reading_order):
        kinds[kind_of(name)][name] = recipe.tensors[name]
    title = f"The type of each tensor of {recipe.file or 'a quant'}."
    parts = [_comment(title), tomli_w.dumps(head), "\n[tensors]\n"]
    for kind, members in kinds.items():
        if len(members) > 1:
            counts = collections.Counter(members.values()).most_common()
            parts.append(
                "\n" + _comment(f"{kind}: {', '.join(f'{count} × {type_name}' for type_name, count in counts)}")
            )
        parts.append(tomli_w.dumps(members))
    return "".join(parts)


def _comment(text: str) -> str:
    return f"# {one_line(text)}\n"


def write_recipe(path: PathLike, recipe: Recipe) -> None:
    """Writes a recipe in one step. Raises BitladderError if it cannot be written."""
    write_text(path, recipe_toml(recipe))


def read_recipe(path: PathLike) -> Recipe:
    """Reads a recipe of a run, or one written by hand.

    Names of tensors may be without quotes, which TOML reads as nested tables. Raises BitladderError that names the
    file, the line if it is known, and what is wrong.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BitladderError(f"{path} is neither a recipe (TOML) nor a GGUF file") from error
    try:
        data = tomllib.loads(text)
        if isinstance(data.get("tensors"), dict):
            data["tensors"] = _flattened(path, data["tensors"])
    except RecursionError as error:
        raise BitladderError(f"{path} has tables too deep in one another; it is no recipe") from error
    except ValueError as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise BitladderError(f"{path} is not TOML: {error}") from error
    try:
        return Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        # An unknown key is often the reason why another one is missing.
        first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        place = [str(part) for part in first["loc"]]
        line = _line_of(text, place)
        raise BitladderError(f"{path}{f':{line}' if line else ''}: {_complaint(first, place)}") from error


def _flattened(path: PathLike, table: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Joins names without quotes again: {"blk": {"0": {"attn_q": …}}} → {"blk.0.attn_q": …}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        name = before + key
        inner = _flattened(path, value, f"{name}.") if isinstance(value, dict) else {name: value}
        twice = flat.keys() & inner.keys()
        if twice:
            raise BitladderError(f"{path}: tensor {min(twice)} is named twice, with quotes and without")
        flat |= inner
    return flat


def _complaint(error: Any, place: list[str]) -> str:
    """An error of pydantic, in terms of the file."""
    where = ".".join(place)
    if error["type"] == "extra_forbidden":
        known = _known_keys(place[:-1])
        close = difflib.get_close_matches(place[-1], known, n=1)
        return f"unknown key {where}" + (f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}")
    if where == "tensors":
        return 'no tensors: a recipe needs [tensors] with lines such as "blk.0.attn_q.weight" = "q4_K"'
    if place[0] == "tensors" and len(place) > 1:
        return f"{where.removeprefix('tensors.')} needs a type in quotes, not {error['input']!r}"
    if where == "schema_version":
        return f"schema_version is {error['input']!r}; this version of bitladder reads 1"
    return f"{where}: {error['msg'][:1].lower()}{error['msg'][1:]}"


def _known_keys(place: list[str]) -> list[str]:
    """The keys of the table at `place`, such as ["imatrix"]."""
    schema = Recipe.model_json_schema()
    tables = {"source": "FileUsed", "imatrix": "ImatrixUsed", "texts": "TextUsed"}
    names = [part for part in place if not part.isdecimal()]
    table = schema["$defs"][tables[names[-1]]] if names else schema
    return list(table["properties"])


def _line_of(text: str, place: list[str]) -> int | None:
    """The line of the key at `place`; None if it cannot be found."""
    table, key = [part for part in place[:-1] if not part.isdecimal()], place[-1]
    name = ".".join(place[1:]) if place[0] == "tensors" else key
    key_line = re.compile(rf"\s*(\[+\s*)?[\"']?{re.escape(name)}[\"']?\s*[\]=.]")
    header = re.compile(r"\s*\[+\s*([\w.-]+)\s*\]+")
    current: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        opened = header.match(line)
        if opened:
            current = opened[1].split(".")
        inside = current == ([place[0]] if place[0] == "tensors" else table)
        if key_line.match(line) and (inside or (opened and current[-1:] == [key])):
            return number
    return None
