"""Two recipes compared: which tensors have more or fewer bits, and the bytes of that."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from bitladder.engine import type_by_name
from bitladder.gguf import block_of, kind_of, reading_order
from bitladder.recipe.recipe import Recipe, Shapes, Size, size_of, tensor_bytes

Direction = Literal["up", "down", "level"]


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
