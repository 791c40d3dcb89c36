"""Whether a recipe can be carried out on a model, and what it has more or less of than another recipe.

The library decides what can be carried out.
"""

import collections
import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from bitladder.engine import (
    PresetTypes,
    Request,
    TensorType,
    all_types,
    kernel_needs_importance,
    preset_types,
    storable,
    type_by_name,
)
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, block_of, kind_of, one_line, ranges, reading_order
from bitladder.recipe.patterns import exact_patterns, preset_and_pairs
from bitladder.recipe.recipe import Recipe, Shapes, Size, shapes_of, size_of, tensor_bytes

Direction = Literal["up", "down", "level"]


@dataclasses.dataclass(frozen=True)
class RecipeFinding:
    """A finding about tensors of one kind.

    Parameters:
        problem: whether it keeps the recipe from being carried out; otherwise it is a note.
        tensors: names.
        text: the finding.
    """

    problem: bool
    tensors: tuple[str, ...]
    text: str

    def line(self) -> str:
        """The finding in one line, as a problem or a note."""
        return f"{'problem' if self.problem else 'note'}: {self.text_line()}"

    def text_line(self) -> str:
        """The finding in one line, with ranges of layers."""
        first, layers = self.tensors[0], [block_of(name) for name in self.tensors]
        if len(self.tensors) > 1 and None not in layers:
            where = f"{kind_of(first)} of layers {ranges(layer for layer in layers if layer is not None)}"
        else:
            where = ", ".join(self.tensors)
        return one_line(f"{where}: {self.text}")


@dataclasses.dataclass(frozen=True)
class RecipeCheck:
    """A recipe against its model.

    Parameters:
        findings: problems and notes.
        types: the type that each tensor of the model gets.
        size: of all tensors.
        needs_imatrix: whether a type needs an importance matrix.
        ours: the tensors that `bitladder quantize` changes and llama-quantize does not.
    """

    findings: tuple[RecipeFinding, ...]
    types: dict[str, str]
    size: Size
    needs_imatrix: bool
    ours: tuple[str, ...]

    @property
    def problems(self) -> int:
        """The number of findings that are problems."""
        return sum(finding.problem for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "problems": self.problems,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "needs_imatrix": self.needs_imatrix,
            "bytes": self.size.bytes,
            "bpw": self.size.bpw,
            "types": self.types,
        }


class _Findings:
    """Findings tensor by tensor: whether it is a problem, the tensor, the text."""

    def __init__(self) -> None:
        self._rows: list[tuple[bool, str, str]] = []

    def problem(self, name: str, text: str) -> None:
        """Adds a problem: it keeps the recipe from being carried out."""
        self._rows.append((True, name, text))

    def note(self, name: str, text: str) -> None:
        """Adds a note."""
        self._rows.append((False, name, text))

    def grouped(self) -> tuple[RecipeFinding, ...]:
        """Problems first, in reading order. Tensors of a kind with the same text are together."""
        groups: dict[tuple[bool, str, bool, str], list[str]] = collections.defaultdict(list)
        for problem, name, text in sorted(self._rows, key=lambda row: (not row[0], reading_order(row[1]))):
            groups[problem, kind_of(name), block_of(name) is None, text].append(name)
        return tuple(RecipeFinding(problem, tuple(names), text) for (problem, _, _, text), names in groups.items())


def check(recipe: Recipe, file: GgufFile) -> RecipeCheck:
    """Compares a recipe with its model.

    Problems are names that the model does not have, types that the library cannot make or a width cannot hold, tensors
    that are never changed or are quantized already, and tensors that neither the recipe nor a preset decides. Notes are
    types that need an importance matrix, tensors that the preset decides, and tensors that `bitladder quantize` changes
    and llama-quantize does not.

    Parameters:
        recipe: the recipe.
        file: the full-precision model.

    Raises:
        BitladderError: the library refuses the model, or the recipe's preset is unknown.
    """
    findings = _Findings()
    named_types = _without_substitute(_named_types(recipe, file, findings), file, findings)
    base, pairs = preset_and_pairs({name: kind.name for name, kind in named_types.items()}, recipe.preset)
    answer = preset_types(file.path, Request(base, overrides=pairs, imatrix=recipe.imatrix is not None))
    if answer.types.keys() != file.tensors.keys():
        odd = sorted(answer.types.keys() ^ file.tensors.keys())
        raise BitladderError(f"the library and {file.path} disagree on tensors ({odd[0]}, …); is the file damaged?")
    ours = [name for name, kind in named_types.items() if _compare(name, kind, file, answer, findings)]
    changed = {name: kind for name, kind in answer.types.items() if kind != file.tensors[name].type}
    for name in changed.keys() - recipe.tensors.keys():
        if recipe.preset:
            findings.note(name, f"not in the recipe; {recipe.preset} makes it {changed[name].name}")
        else:
            findings.problem(name, "not in the recipe, and there is no preset that decides; name it, or add a preset")
    needy = _in_need(changed, base, file)
    for name, reason in needy.items():
        findings.note(name, reason)
    types = {name: (named_types[name] if name in ours else kind).name for name, kind in answer.types.items()}
    size = size_of(types, shapes_of(file))
    assert size is not None  # every shape is known
    return RecipeCheck(findings.grouped(), types, size, bool(needy), tuple(ours))


def changeable(file: GgufFile) -> set[str]:
    """The tensors that llama-quantize can give another type: matrices, but no norms, routers and the like."""
    # Under a preset that does not quantize, these tensors get the preset's type, and all others keep their own.
    first, second = (preset_types(file.path, Request(preset)).types for preset in ("F16", "BF16"))
    return {name for name, kind in first.items() if kind != second[name]}


def _named_types(recipe: Recipe, file: GgufFile, findings: _Findings) -> dict[str, TensorType]:
    """The recipe's tensors that the model has, where the type exists."""
    known = {kind.name.lower(): kind for kind in all_types().values()}
    stored = [lower for lower, kind in known.items() if storable(kind)]
    named_types: dict[str, TensorType] = {}
    for name, written in recipe.tensors.items():
        kind = known.get(written.lower())
        if name not in file.tensors:
            close = difflib.get_close_matches(name, file.tensors, n=1, cutoff=0.8)
            findings.problem(name, "the model has no such tensor" + (f"; did you mean {close[0]}?" if close else ""))
        elif kind is None or not (storable(kind) or kind == file.tensors[name].type):
            close = difflib.get_close_matches(written.lower(), stored, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the library has {', '.join(stored)}"
            findings.problem(name, f"weights cannot be stored as {written!r}; {hint}")
        else:
            named_types[name] = kind
    return named_types


def _without_substitute(
    named_types: dict[str, TensorType], file: GgufFile, findings: _Findings
) -> dict[str, TensorType]:
    """Leaves out types that a width cannot hold and that the library has no substitute for: it refuses them."""
    misfits: dict[TensorType, list[str]] = collections.defaultdict(list)
    for name, kind in named_types.items():
        if file.tensors[name].width % kind.block:
            misfits[kind].append(name)
    for kind, names in misfits.items():
        try:
            preset_types(file.path, Request("Q8_0", overrides=exact_patterns(dict.fromkeys(names, kind))))
        except BitladderError:
            for name in names:
                findings.problem(name, f"{_misfit(name, kind, file)}, and the library has no substitute")
            named_types = {name: kind for name, kind in named_types.items() if name not in names}
    return named_types


def _compare(name: str, kind: TensorType, file: GgufFile, answer: PresetTypes, findings: _Findings) -> bool:
    """Compares the library's type of a tensor with the recipe's.

    Returns whether `bitladder quantize` makes the recipe's type and llama-quantize does not.
    """
    library_kind, have = answer.types[name], file.tensors[name].type
    if name in answer.misfits:
        findings.problem(name, f"{_misfit(name, kind, file)}; {library_kind.name} would be used instead")
    elif library_kind != kind and not kind.quantized and not have.quantized and len(file.tensors[name].shape) > 1:
        findings.note(name, f"llama-quantize leaves it {library_kind.name}; only bitladder makes it {kind.name}")
        return True
    elif library_kind != kind:
        findings.problem(name, f"it cannot be {kind.name}: it is never quantized, and stays {library_kind.name}")
    elif kind != have and have.quantized:
        findings.problem(name, f"it is {have.name} in {file.path.name}; for {kind.name} take an F16, BF16 or F32 model")
    return False


def _misfit(name: str, kind: TensorType, file: GgufFile) -> str:
    return f"a row of {file.tensors[name].width} weights cannot be {kind.name} (blocks of {kind.block})"


def _in_need(types: Mapping[str, TensorType], base: str, file: GgufFile) -> dict[str, str]:
    """Tensor → why it needs an importance matrix, for those of the changed tensors (`types`) that do."""
    groups: dict[tuple[TensorType, str], list[str]] = collections.defaultdict(list)
    for name, kind in types.items():
        # Within the blocks the rule depends on the type alone. For embeddings and head it may be another.
        groups[kind, name if block_of(name) is None else "blocks"].append(name)
    harmless = (".*", type_by_name("q8_0"))
    reasons: dict[str, str] = {}
    for (kind, _), names in groups.items():
        # All others get a type that needs no importance matrix, so that the answer is about these.
        request = Request(base, overrides=(*exact_patterns(dict.fromkeys(names, kind)), harmless))
        if kernel_needs_importance(kind) and block_of(names[0]) is None:
            reasons |= dict.fromkeys(names, f"{kind.name} needs an importance matrix with an entry for it")
        elif kind.quantized and preset_types(file.path, request).needs_imatrix:
            reasons |= dict.fromkeys(names, f"{kind.name} needs an importance matrix")
    return reasons


@dataclasses.dataclass(frozen=True)
class TypeMove:
    """A tensor with another type in B than in A.

    Parameters:
        name: of the tensor.
        before: its type in A.
        after: its type in B.
        bpw: bits per weight that B has more.
        bytes: bytes that B has more; None without a shape.
    """

    name: str
    before: str
    after: str
    bpw: float
    bytes: int | None

    @property
    def direction(self) -> Direction:
        """Up to more bits, down to fewer, or level (q4_K and iq4_nl both have 4.5)."""
        return "up" if self.bpw > 0 else "down" if self.bpw < 0 else "level"


@dataclasses.dataclass(frozen=True)
class TypeMoveGroup:
    """Tensors of a kind with the same change of type.

    Parameters:
        kind: such as attn_v.
        before: their type in A.
        after: their type in B.
        direction: by bits per weight.
        count: number of tensors.
        layers: their blocks.
        bytes: bytes that B has more for all of them; None without a shape.
    """

    kind: str
    before: str
    after: str
    direction: Direction
    count: int
    layers: tuple[int, ...]
    bytes: int | None


@dataclasses.dataclass(frozen=True)
class RecipeDiff:
    """The differences of two recipes.

    Parameters:
        moves: tensors with another type.
        only_a: tensor → type, of tensors that only A has.
        only_b: tensor → type, of tensors that only B has.
        same: number of tensors with the same type.
        size_a: size of all tensors of A; None where a shape is not known.
        size_b: the same of B.
    """

    moves: tuple[TypeMove, ...]
    only_a: dict[str, str]
    only_b: dict[str, str]
    same: int
    size_a: Size | None
    size_b: Size | None

    def groups(self) -> list[TypeMoveGroup]:
        """The moves by kind and types, in reading order."""
        groups: dict[tuple[str, str, str], list[TypeMove]] = collections.defaultdict(list)
        for move in self.moves:
            groups[kind_of(move.name), move.before, move.after].append(move)
        return [_group(kind, moves) for (kind, _, _), moves in groups.items()]

    def bytes_by_kind(self) -> dict[str, int | None]:
        """Bytes that B has more, for each kind with moves; None where a shape is not known."""
        groups: dict[str, list[TypeMove]] = collections.defaultdict(list)
        for move in self.moves:
            groups[kind_of(move.name)].append(move)
        return {kind: _total(moves) for kind, moves in groups.items()}

    def to_json(self) -> dict[str, Any]:
        """The differences as JSON; bytes are B minus A."""
        sizes = [size and {"bytes": size.bytes, "bpw": size.bpw} for size in (self.size_a, self.size_b)]
        return {
            "moves": [dataclasses.asdict(move) | {"direction": move.direction} for move in self.moves],
            "kinds": self.bytes_by_kind(),
            "only_a": self.only_a,
            "only_b": self.only_b,
            "same": self.same,
            "a": sizes[0],
            "b": sizes[1],
        }


def diff(a: Recipe, b: Recipe, shapes: Shapes) -> RecipeDiff:
    """Compares two recipes of one model.

    Parameters:
        a: the first recipe.
        b: the second recipe.
        shapes: the known shapes of their tensors, as of `joined_shapes`.

    Raises:
        BitladderError: the library does not know a type, or a type cannot hold a tensor's rows.
    """
    both = sorted(a.tensors.keys() & b.tensors.keys(), key=reading_order)
    moved = [name for name in both if a.tensors[name].lower() != b.tensors[name].lower()]
    return RecipeDiff(
        tuple(_move(name, a.tensors[name], b.tensors[name], shapes) for name in moved),
        _missing(a, b),
        _missing(b, a),
        len(both) - len(moved),
        size_of(a.tensors, shapes),
        size_of(b.tensors, shapes),
    )


def _missing(of: Recipe, other: Recipe) -> dict[str, str]:
    return {name: of.tensors[name] for name in sorted(of.tensors.keys() - other.tensors.keys(), key=reading_order)}


def _move(name: str, before: str, after: str, shapes: Shapes) -> TypeMove:
    old, new = type_by_name(before), type_by_name(after)
    shape = shapes.get(name)
    gained = None if shape is None else tensor_bytes(name, after, shape) - tensor_bytes(name, before, shape)
    return TypeMove(name, old.name, new.name, new.bpw - old.bpw, gained)


def _group(kind: str, moves: list[TypeMove]) -> TypeMoveGroup:
    first = moves[0]
    layers = tuple(layer for layer in (block_of(move.name) for move in moves) if layer is not None)
    return TypeMoveGroup(kind, first.before, first.after, first.direction, len(moves), layers, _total(moves))


def _total(moves: Iterable[TypeMove]) -> int | None:
    gained = [move.bytes for move in moves]
    return None if None in gained else sum(bytes_gained for bytes_gained in gained if bytes_gained is not None)
