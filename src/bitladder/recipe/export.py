"""A recipe for llama-quantize: lines for --tensor-type-file, and the command that uses them."""

import dataclasses
import shlex
from collections.abc import Collection

from bitladder.engine import presets
from bitladder.errors import BitladderError
from bitladder.files import PathLike
from bitladder.gguf import open_model
from bitladder.recipe.check_recipe import changeable, check
from bitladder.recipe.patterns import base_preset, preset_and_pairs, preset_name
from bitladder.recipe.recipe import Recipe


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
