"""The difference of two recipes as tables for the terminal."""

import collections
from collections.abc import Iterator

from rich.table import Table

from bitladder.gguf.names import kind_of, one_line, ranges
from bitladder.recipe import RecipeDiff
from bitladder.show.recipe_tables import cell, size_text, table_of

_ARROWS = {"up": ("▲", "green"), "down": ("▼", "red"), "level": ("=", "")}


def difference(changes: RecipeDiff) -> Iterator[str | Table]:
    """Lines and tables, in the order in which they are printed."""
    for name, size in (("A", changes.size_a), ("B", changes.size_b)):
        if size:
            yield f"{name}: {size_text(size)}"
    if changes.size_a and changes.size_b:
        gained = changes.size_b.bytes - changes.size_a.bytes
        yield f"B less A: {gained:+,} bytes ({100 * gained / changes.size_a.bytes:+.2f} %)"
    for name, only in (("A", changes.only_a), ("B", changes.only_b)):
        for tensor, kind in only.items():
            yield one_line(f"only in {name}: {tensor} ({kind})")
    if changes.moves:
        yield ""
        yield _moves(changes)
        yield ""
        yield _kinds(changes)
    count = len(changes.moves)
    yield f"{count} tensor{' differs' if count == 1 else 's differ'}, {changes.same} are the same"


def _moves(changes: RecipeDiff) -> Table:
    """The tensors with another type, by kind and types, with their layers and the bytes that B has more."""
    sized = None not in changes.bytes_by_kind().values()
    table = table_of("kind", "", "A → B", "tensors", "layers", *(("bytes",) if sized else ()))
    for group in changes.groups():
        arrow, colour = _ARROWS[group.direction]
        cells = [f"{group.before} → {group.after}", str(group.count), ranges(group.layers), _gain(group.bytes)]
        table.add_row(cell(group.kind), cell(arrow, colour), *(cells if sized else cells[:-1]))
    return table


def _kinds(changes: RecipeDiff) -> Table:
    """How many tensors of each kind went up and down, and the bytes that B has more."""
    gains = changes.bytes_by_kind()
    moved: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in gains}
    for move in changes.moves:
        moved[kind_of(move.name)][move.direction] += 1
    table = table_of("kind", "up", "down", "bytes")
    for kind, gain in gains.items():
        table.add_row(cell(kind), str(moved[kind]["up"]), str(moved[kind]["down"]), _gain(gain))
    known = [gain for gain in gains.values() if gain is not None]
    total = sum(moved.values(), collections.Counter())
    table.add_section()
    table.add_row("all", str(total["up"]), str(total["down"]), _gain(sum(known) if len(known) == len(gains) else None))
    return table


def _gain(gain: int | None) -> str:
    return "–" if gain is None else f"{gain:+,}"
