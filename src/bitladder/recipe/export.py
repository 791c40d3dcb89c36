"""A recipe for llama-quantize: lines for --tensor-type-file, and the command that uses them."""

import dataclasses
import shlex
from collections.abc import Collection

from bitladder.engine.presets import presets
from bitladder.errors import BitladderError
from bitladder.files import PathLike
from bitladder.gguf.reader import GgufFile
from bitladder.recipe.check_recipe import changeable, check
from bitladder.recipe.patterns import base_preset, preset_and_pairs, preset_name
from bitladder.recipe.schema import Recipe


@dataclasses.dataclass(frozen=True)
class Export:
    """The lines, the preset that goes with them, the whole command, and what there is to say about them."""

    lines: tuple[str, ...]
    preset: str
    command: str
    notes: tuple[str, ...]


def export(recipe: Recipe, types: str, model: PathLike | None = None) -> Export:
    """Lines and command for a recipe; `types` is the name of the file that the lines will be in.

    With `model`, the F16, BF16 or F32 GGUF that llama-quantize will read, tensors that it never changes are left out.
    Raises BitladderError if llama-quantize cannot make the recipe from it.
    """
    if model is None:
        return _export(recipe, types, export_lines(recipe))
    with GgufFile(model) as file:
        checked = check(recipe, file)
        against = [one for one in checked.findings if one.problem or set(one.tensors) & set(checked.ours)]
        if against:
            more = f" (and {len(against) - 1} more; see `bitladder recipe check`)" if len(against) > 1 else ""
            raise BitladderError(f"llama-quantize cannot make this of {model}: {against[0].text_line()}{more}")
        lines = export_lines(recipe, changeable(file))
    imatrix = "imatrix.gguf" if checked.needs_imatrix and recipe.imatrix is None else None
    notes = tuple(finding.text_line() for finding in checked.findings)
    return _export(recipe, types, lines, str(model), imatrix, notes)


def export_lines(recipe: Recipe, names: Collection[str] | None = None) -> list[str]:
    """Lines PATTERN=TYPE for llama-quantize --tensor-type-file; see `patterns.exact_patterns`.

    llama-quantize reads words between whitespace and cuts them at the first "=", so patterns have neither. `names` are
    those of the recipe's tensors that are wanted (all, unless given). Raises BitladderError for a type that the library
    does not know.
    """
    chosen = {name: kind for name, kind in recipe.tensors.items() if names is None or name in names}
    _, pairs = preset_and_pairs(chosen, recipe.preset)
    return [f"{pattern}={kind.name}" for pattern, kind in pairs]


def export_command(recipe: Recipe, types: str, *, model: str | None = None, imatrix: str | None = None) -> str:
    """The llama-quantize command that makes the recipe's tensors from `model` with the lines in the file `types`.

    `model` and `imatrix` are those that the recipe names, unless given. general.file_type becomes the recipe's preset
    even where another one is needed as the base.
    """
    words = ["llama-quantize"]
    imatrix = imatrix or (recipe.imatrix.name if recipe.imatrix else None)
    if imatrix:
        words += ["--imatrix", imatrix]
    base = base_preset(recipe.tensors, recipe.preset)
    own = preset_name(recipe.preset) if recipe.preset else base
    if own != base:
        words += ["--override-kv", f"general.file_type=int:{presets()[own]}"]
    model = model or (recipe.source.name if recipe.source else "F16.gguf")
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
