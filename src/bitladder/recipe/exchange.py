"""Recipes and the files of other tools: taken from a GGUF of any maker, and handed to llama-quantize.

For llama-quantize there are lines for --tensor-type-file, and the command that uses them.
"""

import dataclasses
import os
import pathlib
import shlex
from collections.abc import Collection
from typing import Any

from bitladder.engine import presets
from bitladder.errors import BitladderError
from bitladder.files import PathLike, sha256_file
from bitladder.gguf import GgufFile, joined_sha256, open_model
from bitladder.recipe.check_recipe import changeable, check
from bitladder.recipe.patterns import base_preset, preset_and_pairs, preset_name
from bitladder.recipe.recipe import ImatrixUsed, Recipe, Shapes, read_recipe, shapes_of

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


@dataclasses.dataclass(frozen=True)
class Export:
    """A recipe for llama-quantize.

    Parameters:
        lines: for --tensor-type-file.
        preset: the preset beside them.
        command: the whole command.
        notes: remarks for the user.
    """

    lines: tuple[str, ...]
    preset: str
    command: str
    notes: tuple[str, ...]


def export(recipe: Recipe, types: str, model: PathLike | None = None) -> Export:
    """The lines and the command for a recipe.

    Parameters:
        recipe: the recipe.
        types: name of the file that the lines go to.
        model: the full-precision GGUF that llama-quantize reads: the recipe is checked against it, and tensors that
            llama-quantize never changes are left out. None for no check.

    Raises:
        BitladderError: llama-quantize cannot make the recipe from this model.
    """
    if model is None:
        return _export(recipe, types, export_lines(recipe))
    with open_model(model) as file:
        checked = check(recipe, file)
        against = [
            finding for finding in checked.findings if finding.problem or set(finding.tensors) & set(checked.ours)
        ]
        if against:
            more = f" (and {len(against) - 1} more; see `bitladder recipe check`)" if len(against) > 1 else ""
            raise BitladderError(f"llama-quantize cannot make this of {model}: {against[0].text_line()}{more}")
        lines = export_lines(recipe, changeable(file))
    imatrix = "imatrix.gguf" if checked.needs_imatrix and recipe.imatrix is None else None
    notes = tuple(finding.text_line() for finding in checked.findings)
    return _export(recipe, types, lines, str(model), imatrix, notes)


def export_lines(recipe: Recipe, names: Collection[str] | None = None) -> list[str]:
    """Lines PATTERN=TYPE for llama-quantize --tensor-type-file, as of `exact_patterns`.

    llama-quantize reads words between whitespace and cuts them at the first "=", so that patterns have neither.

    Parameters:
        recipe: the recipe.
        names: the tensors to export; None for all.

    Raises:
        BitladderError: the library does not know a type.
    """
    chosen = {name: kind for name, kind in recipe.tensors.items() if names is None or name in names}
    _, pairs = preset_and_pairs(chosen, recipe.preset)
    return [f"{pattern}={kind.name}" for pattern, kind in pairs]


def export_command(recipe: Recipe, types: str, *, model: str | None = None, imatrix: str | None = None) -> str:
    """The llama-quantize command that makes the recipe's tensors.

    general.file_type becomes the recipe's preset even where another preset is needed as the base.

    Parameters:
        recipe: the recipe.
        types: name of the file with the lines.
        model: name of the full-precision GGUF; None for the one that the recipe names.
        imatrix: name of the importance matrix; None for the one that the recipe names.
    """
    words = ["llama-quantize"]
    if imatrix is None and recipe.imatrix is not None:
        imatrix = recipe.imatrix.name
    if imatrix is not None:
        words += ["--imatrix", imatrix]
    base = base_preset(recipe.tensors, recipe.preset)
    own = preset_name(recipe.preset) if recipe.preset else base
    if own != base:
        words += ["--override-kv", f"general.file_type=int:{presets()[own]}"]
    if model is None:
        model = recipe.source.name if recipe.source is not None else "F16.gguf"
    return shlex.join([*words, "--tensor-type-file", types, model, "OUT.gguf", base])


def _export(
    recipe: Recipe,
    types: str,
    lines: list[str],
    model: str | None = None,
    imatrix: str | None = None,
    notes: tuple[str, ...] = (),
) -> Export:
    command = export_command(recipe, types, model=model, imatrix=imatrix)
    return Export(tuple(lines), base_preset(recipe.tensors, recipe.preset), command, notes)
