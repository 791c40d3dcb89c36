"""A recipe from a GGUF of any maker."""

import dataclasses
import os
import pathlib
from typing import Any

from bitladder.engine import presets
from bitladder.errors import BitladderError
from bitladder.files import PathLike, sha256_file
from bitladder.gguf import GgufFile, joined_sha256, open_model
from bitladder.recipe.recipe import ImatrixUsed, Recipe, Shapes, read_recipe

RECIPE_KEY = "bitladder.recipe.sha256"
_OURS = "bitladder."


@dataclasses.dataclass(frozen=True)
class OpenedRecipe:
    """A recipe, and the shapes of its tensors where they are known (a TOML recipe has none)."""

    recipe: Recipe
    shapes: Shapes


def open_recipe(path: PathLike, model: PathLike | None = None) -> OpenedRecipe:
    """Reads the recipe of a .toml or a .gguf file, without hashing the file. The content tells which it is.

    Parameters:
        path: the file.
        model: a GGUF of the same model, for the shapes of a TOML recipe's tensors; None for no shapes.

    Raises:
        BitladderError: the file is neither.
    """
    if _is_gguf(path):
        with open_model(path) as file:
            return OpenedRecipe(recipe_of(file), shapes_of(file))
    recipe = read_recipe(path)
    if model is None:
        return OpenedRecipe(recipe, {})
    with open_model(model) as file:
        return OpenedRecipe(recipe, shapes_of(file))


def joined_shapes(a: OpenedRecipe, b: OpenedRecipe) -> dict[str, tuple[int, ...]]:
    """The shapes of both. Raises BitladderError if a tensor has two shapes: they are not of one model."""
    for name in a.shapes.keys() & b.shapes.keys():
        if a.shapes[name] != b.shapes[name]:
            raise BitladderError(
                f"these are not of one model: {name} is {list(a.shapes[name])} in the one, {list(b.shapes[name])} in "
                "the other"
            )
    return {**a.shapes, **b.shapes}


def extract(path: str | os.PathLike[str]) -> Recipe:
    """The recipe of a GGUF of any maker: the types of its tensors, and what its metadata say of how it was made.

    The file (all shards of a split model) is read in full, for its hash. Raises BitladderError if it is not a model.
    """
    with open_model(path) as file:
        recipe = recipe_of(file)
        return recipe.model_copy(update={"sha256": joined_sha256([sha256_file(part) for part in file.parts])})


def recipe_of(file: GgufFile) -> Recipe:
    """The recipe of an open GGUF, without its hash. Raises BitladderError if it is not a model."""
    if not file.tensors:
        raise BitladderError(f"{file.path} holds no tensors: there is no recipe in it")
    own = {key: file.get(key) for key in file.metadata if key.startswith(_OURS)}
    return Recipe(
        model=_text(file, "general.name"),
        file=file.path.name,
        preset=_preset(file),
        bytes=file.size,
        bpw=file.bpw,
        imatrix=_imatrix(file),
        metadata={key: value for key, value in own.items() if isinstance(value, bool | int | float | str)},
        tensors={name: tensor.type.name for name, tensor in file.tensors.items()},
    )


def shapes_of(file: GgufFile) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, in GGUF order."""
    return {name: tensor.shape for name, tensor in file.tensors.items()}


def _is_gguf(path: PathLike) -> bool:
    try:
        with pathlib.Path(path).open("rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error


def _preset(file: GgufFile) -> str | None:
    """The preset of general.file_type, if there is one and the library knows it."""
    number = file.get("general.file_type")
    return next((name for name, known in presets().items() if known == number), None)


def _imatrix(file: GgufFile) -> ImatrixUsed | None:
    """What llama-quantize wrote of the importance matrix, with names instead of paths."""
    name, dataset = _text(file, "quantize.imatrix.file"), _text(file, "quantize.imatrix.dataset")
    if name is None:
        return None
    return ImatrixUsed(
        name=_file_name(name),
        dataset=_file_name(dataset) if dataset else None,
        entries=_count(file, "quantize.imatrix.entries_count"),
        chunks=_count(file, "quantize.imatrix.chunks_count"),
    )


def _file_name(path: str) -> str:
    """The last part of a path of any system."""
    return pathlib.PureWindowsPath(path).name or path


def _text(file: GgufFile, key: str) -> str | None:
    value: Any = file.get(key)
    return value if isinstance(value, str) and value else None


def _count(file: GgufFile, key: str) -> int | None:
    value: Any = file.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
