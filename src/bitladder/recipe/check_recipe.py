"""Whether a recipe can be carried out on a model: the library is asked what it would make of it."""

import collections
import difflib
from collections.abc import Mapping

from bitladder.engine.presets import PresetTypes, Request, kernel_needs_importance, preset_types, storable
from bitladder.engine.types import TensorType, all_types, type_by_name
from bitladder.errors import BitladderError
from bitladder.gguf.names import block_of
from bitladder.gguf.reader import GgufFile
from bitladder.recipe.extract import shapes_of
from bitladder.recipe.findings import Checked, Findings
from bitladder.recipe.patterns import exact_patterns, preset_and_pairs
from bitladder.recipe.schema import Recipe
from bitladder.recipe.sizes import size_of


def check(recipe: Recipe, file: GgufFile) -> Checked:
    """Compare a recipe with the model that it is for.

    Problems are names that the model has not, types that the library cannot make or a width cannot hold, tensors that
    are never changed or are quantized already, and tensors that neither the recipe nor a preset decides. Notes are
    types that need an importance matrix, tensors that the preset decides, and those that llama-quantize would not
    change as `bitladder quantize` does. Raises BitladderError if the library refuses the model, or the recipe's preset
    is unknown.
    """
    found = Findings()
    wanted = _without_substitute(_wanted(recipe, file, found), file, found)
    base, pairs = preset_and_pairs({name: kind.name for name, kind in wanted.items()}, recipe.preset)
    answer = preset_types(file.path, Request(base, overrides=pairs, imatrix=recipe.imatrix is not None))
    if answer.types.keys() != file.tensors.keys():
        odd = sorted(answer.types.keys() ^ file.tensors.keys())
        raise BitladderError(f"the library and {file.path} disagree on tensors ({odd[0]}, …); is the file damaged?")
    ours = [name for name, kind in wanted.items() if _compare(name, kind, file, answer, found)]
    changed = {name: kind for name, kind in answer.types.items() if kind != file.tensors[name].type}
    for name in changed.keys() - recipe.tensors.keys():
        if recipe.preset:
            found.note(name, f"not in the recipe; {recipe.preset} makes it {changed[name].name}")
        else:
            found.problem(name, "not in the recipe, and there is no preset that decides; name it, or add a preset")
    needy = _in_need(changed, base, file)
    for name, reason in needy.items():
        found.note(name, reason)
    types = {name: (wanted[name] if name in ours else kind).name for name, kind in answer.types.items()}
    size = size_of(types, shapes_of(file))
    assert size is not None  # every shape is known
    return Checked(found.grouped(), types, size, bool(needy), tuple(ours))


def changeable(file: GgufFile) -> set[str]:
    """The tensors to which llama-quantize gives another type at all: matrices, but no norms, routers and the like."""
    # Under a preset that does not quantize, every tensor it touches gets the preset's type, and the rest keep theirs.
    first, second = (preset_types(file.path, Request(preset)).types for preset in ("F16", "BF16"))
    return {name for name, kind in first.items() if kind != second[name]}


def _wanted(recipe: Recipe, file: GgufFile, found: Findings) -> dict[str, TensorType]:
    """The recipe's tensors that the model has and that get a type that exists."""
    known = {kind.name.lower(): kind for kind in all_types().values()}
    stored = [lower for lower, kind in known.items() if storable(kind)]
    wanted: dict[str, TensorType] = {}
    for name, written in recipe.tensors.items():
        kind = known.get(written.lower())
        if name not in file.tensors:
            close = difflib.get_close_matches(name, file.tensors, n=1, cutoff=0.8)
            found.problem(name, "the model has no such tensor" + (f"; did you mean {close[0]}?" if close else ""))
        elif kind is None or not (storable(kind) or kind == file.tensors[name].type):
            close = difflib.get_close_matches(written.lower(), stored, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the library has {', '.join(stored)}"
            found.problem(name, f"weights cannot be stored as {written!r}; {hint}")
        else:
            wanted[name] = kind
    return wanted


def _without_substitute(wanted: dict[str, TensorType], file: GgufFile, found: Findings) -> dict[str, TensorType]:
    """Leave out types that a width cannot hold and for which the library has no substitute: it refuses them."""
    misfits: dict[TensorType, list[str]] = collections.defaultdict(list)
    for name, kind in wanted.items():
        if file.tensors[name].width % kind.block:
            misfits[kind].append(name)
    for kind, names in misfits.items():
        try:
            preset_types(file.path, Request("Q8_0", overrides=exact_patterns(dict.fromkeys(names, kind))))
        except BitladderError:
            for name in names:
                found.problem(name, f"{_misfit(name, kind, file)}, and the library has no substitute")
            wanted = {name: kind for name, kind in wanted.items() if name not in names}
    return wanted


def _compare(name: str, kind: TensorType, file: GgufFile, answer: PresetTypes, found: Findings) -> bool:
    """What the library would do with a tensor, against what the recipe wants.

    Returns whether `bitladder quantize` would do what the recipe wants, and llama-quantize would not.
    """
    given, have = answer.types[name], file.tensors[name].type
    if name in answer.misfits:
        found.problem(name, f"{_misfit(name, kind, file)}; {given.name} would be used instead")
    elif given != kind and not kind.quantized and not have.quantized and len(file.tensors[name].shape) > 1:
        found.note(name, f"llama-quantize leaves it {given.name}; only bitladder makes it {kind.name}")
        return True
    elif given != kind:
        found.problem(name, f"it cannot be {kind.name}: it is never quantized, and stays {given.name}")
    elif kind != have and have.quantized:
        found.problem(name, f"it is {have.name} in {file.path.name}; for {kind.name} take an F16, BF16 or F32 model")
    return False


def _misfit(name: str, kind: TensorType, file: GgufFile) -> str:
    return f"a row of {file.tensors[name].width} weights cannot be {kind.name} (blocks of {kind.block})"


def _in_need(types: Mapping[str, TensorType], base: str, file: GgufFile) -> dict[str, str]:
    """Tensors that cannot be made without an importance matrix, and why; `types` are those that change."""
    groups: dict[tuple[TensorType, str], list[str]] = collections.defaultdict(list)
    for name, kind in types.items():
        # The rule differs for embedding and head; within the blocks it is the type's.
        groups[kind, name if block_of(name) is None else "blocks"].append(name)
    harmless = (".*", type_by_name("q8_0"))
    reasons: dict[str, str] = {}
    for (kind, _), names in groups.items():
        # All others get a type that needs none, so the answer is about these.
        request = Request(base, overrides=(*exact_patterns(dict.fromkeys(names, kind)), harmless))
        if kernel_needs_importance(kind) and block_of(names[0]) is None:
            reasons |= dict.fromkeys(names, f"{kind.name} needs an importance matrix with an entry for it")
        elif kind.quantized and preset_types(file.path, request).needs_imatrix:
            reasons |= dict.fromkeys(names, f"{kind.name} needs an importance matrix")
    return reasons
