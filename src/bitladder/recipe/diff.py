"""Two recipes compared: which tensors moved up or down, and what that costs."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

from bitladder.engine.types import type_by_name
from bitladder.gguf.names import block_of, kind_of, reading_order
from bitladder.recipe.schema import Recipe
from bitladder.recipe.sizes import Shapes, Size, size_of, tensor_bytes

Direction = Literal["up", "down", "level"]


@dataclasses.dataclass(frozen=True)
class Move:
    """A tensor with another type: `bpw` and `bytes` are what B has more than A (bytes: None without a shape)."""

    name: str
    before: str
    after: str
    bpw: float
    bytes: int | None

    @property
    def direction(self) -> Direction:
        """Up to more bits, down to fewer, or level (q4_K and iq4_nl have both 4.5)."""
        return "up" if self.bpw > 0 else "down" if self.bpw < 0 else "level"


@dataclasses.dataclass(frozen=True)
class MoveGroup:
    """Tensors of a kind that moved alike; `layers` are their blocks, `bytes` what B has more for all of them."""

    kind: str
    before: str
    after: str
    direction: Direction
    count: int
    layers: tuple[int, ...]
    bytes: int | None


@dataclasses.dataclass(frozen=True)
class RecipeDiff:
    """What B has other than A: tensors that moved, tensors only in one, the number that are `same`.

    `size_a`, `size_b` are of all tensors; None where a shape is not known.
    """

    moves: tuple[Move, ...]
    only_a: dict[str, str]
    only_b: dict[str, str]
    same: int
    size_a: Size | None
    size_b: Size | None

    def groups(self) -> list[MoveGroup]:
        """Moves by kind and types, in reading order."""
        found: dict[tuple[str, str, str], list[Move]] = collections.defaultdict(list)
        for move in self.moves:
            found[kind_of(move.name), move.before, move.after].append(move)
        return [_group(kind, moves) for (kind, _, _), moves in found.items()]

    def bytes_by_kind(self) -> dict[str, int | None]:
        """Bytes that B has more, for each kind with moves; None where a shape is not known."""
        found: dict[str, list[Move]] = collections.defaultdict(list)
        for move in self.moves:
            found[kind_of(move.name)].append(move)
        return {kind: _total(moves) for kind, moves in found.items()}

    def to_json(self) -> dict[str, Any]:
        """For `--json`: bytes are B minus A."""
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
    """Compare two recipes of one model.

    `shapes` are those that are known, of either's tensors; see `joined_shapes`. Raises BitladderError for a type that
    the library does not know, or that cannot hold a tensor's rows.
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


def _move(name: str, before: str, after: str, shapes: Shapes) -> Move:
    old, new = type_by_name(before), type_by_name(after)
    shape = shapes.get(name)
    gained = None if shape is None else tensor_bytes(name, after, shape) - tensor_bytes(name, before, shape)
    return Move(name, old.name, new.name, new.bpw - old.bpw, gained)


def _group(kind: str, moves: list[Move]) -> MoveGroup:
    first = moves[0]
    layers = tuple(layer for layer in (block_of(move.name) for move in moves) if layer is not None)
    return MoveGroup(kind, first.before, first.after, first.direction, len(moves), layers, _total(moves))


def _total(moves: Iterable[Move]) -> int | None:
    gained = [move.bytes for move in moves]
    return None if None in gained else sum(one for one in gained if one is not None)
