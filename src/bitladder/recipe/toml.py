"""Recipes as TOML that a person can read and edit."""

import collections
import difflib
import pathlib
import re
import tomllib
from typing import Any

import pydantic
import tomli_w

from bitladder.errors import BitladderError
from bitladder.files import PathLike, write_text
from bitladder.gguf import kind_of, one_line, reading_order
from bitladder.recipe.schema import Recipe


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
