"""A recipe: which type each tensor of a quant has, and how the quant was made. TOML that a person can read and edit."""

import collections
import pathlib
import re
import tomllib
from typing import Literal

import pydantic
import tomli_w

from bitladder.errors import BitladderError
from bitladder.files import write_text

_BLOCK = re.compile(r"^blk\.\d+\.")


class TextUsed(pydantic.BaseModel):
    """A text, by name and content."""

    name: str
    sha256: str


class FileUsed(pydantic.BaseModel):
    """A file, by name (without its path) and content."""

    name: str
    sha256: str


class ImatrixUsed(FileUsed):
    """The importance matrix: `chunks` of `n_ctx` tokens were read from `texts`."""

    chunks: int
    n_ctx: int
    texts: list[TextUsed]


class Recipe(pydantic.BaseModel):
    """The recipe of one GGUF. `bytes` is the file's size, `bpw` counts all weights, `tensors` is in file order."""

    schema_version: Literal[1] = 1
    model: str
    file: str
    preset: str
    bytes: int
    bpw: float
    source: FileUsed
    imatrix: ImatrixUsed | None = None
    versions: dict[str, str]
    tensors: dict[str, str]


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML. The same recipe gives the same text."""
    head = recipe.model_dump(mode="json", exclude={"tensors"}, exclude_none=True)
    lines = [
        f"# How {recipe.file} was made, and the type of each of its tensors.",
        tomli_w.dumps(head).rstrip("\n"),
        "",
        "[tensors]",
    ]
    kinds: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name, kind in recipe.tensors.items():
        kinds[tensor_kind(name)][name] = kind
    for label, members in kinds.items():
        counts = collections.Counter(members.values())
        if len(members) > 1:
            lines.append(f"# {label}: {', '.join(f'{count} × {kind}' for kind, count in counts.most_common())}")
        lines.append(tomli_w.dumps(members).rstrip("\n"))
    return "\n".join(lines) + "\n"


def write_recipe(path: pathlib.Path, recipe: Recipe) -> None:
    """Write a recipe in one step."""
    write_text(path, recipe_toml(recipe))


def read_recipe(path: pathlib.Path) -> Recipe:
    """Read a recipe. Raises BitladderError that names the file and what is wrong in it."""
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BitladderError(f"{path} is not TOML: {error}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise BitladderError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def tensor_kind(name: str) -> str:
    """A tensor's name without its block: "blk.7.attn_k.weight" → "attn_k.weight"."""
    return _BLOCK.sub("", name)
