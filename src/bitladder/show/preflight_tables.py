"""The preflight of `bitladder quantize` as tables."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitladder.quantize.preflight import Fallback, Preflight

SHOWN = 6  # names in a cell; how many more there are is said


def as_json(found: "Preflight") -> dict[str, Any]:
    """The preflight as a JSON value."""
    return {**dataclasses.asdict(found), "bytes": found.bytes}


def tables(found: "Preflight") -> list[Any]:
    """Kinds × types, and where there is something to say: patterns, and tensors that get another type."""
    made = [_kinds(found)]
    if found.patterns:
        uses = [
            (row.pattern, row.type, str(len(row.matched)), str(len(row.decided)), _names(row.decided))
            for row in found.patterns
        ]
        made.append(_table(("--tensor-type", "type", "found in", "decides", "tensors"), uses, right=(2, 3)))
    if found.fallbacks:
        heads = ("width does not hold it", "blocks", "width", "wanted", "used", "bytes more")
        made.append(_table(heads, _forced(found), right=(2, 5)))
    return made


def lines(found: "Preflight") -> list[str]:
    """What the tables leave to say: coverage, size, room."""
    said = []
    if found.weighted or found.unweighted:
        said.append(f"imatrix: {found.weighted} tensors weighted, {len(found.unweighted)} quantized without data")
        if found.unweighted:
            said[-1] += f" ({_names(found.unweighted)})"
    shards = f" in {len(found.files)} shards" if len(found.files) > 1 else ""
    said.append(
        f"{found.bytes} bytes{shards}, {found.bpw:.4f} bpw ({found.bpw_blocks:.4f} in the blocks); disk needed "
        f"{found.bytes / 1e6:,.1f} MB, memory about {found.memory / 1e6:,.0f} MB beside the program"
    )
    return said


def _kinds(found: "Preflight") -> Any:
    rows = [
        (row.kind, row.type, str(row.count), f"{row.bytes:,}", f"{row.bpw:.3f}")
        for row in sorted(found.kinds, key=lambda row: (row.kind, -row.bytes))
    ]
    return _table(("kind", "type", "tensors", "bytes", "bpw"), rows, right=(2, 3, 4))


def _forced(found: "Preflight") -> list[tuple[str, ...]]:
    """Tensors that get another type, those of a kind together: every one is told by kind and block."""
    from bitladder.gguf.names import block_of, name_in_block, ranges

    groups: dict[tuple[str, int, str, str], list[Fallback]] = {}
    for one in found.fallbacks:
        groups.setdefault((name_in_block(one.tensor), one.width, one.wanted, one.used), []).append(one)
    rows: list[tuple[str, ...]] = []
    for (kind, width, wanted, used), members in groups.items():
        blocks = ranges([block for one in members if (block := block_of(one.tensor)) is not None])
        rows.append((kind, blocks, str(width), wanted, used, f"{sum(one.extra_bytes for one in members):+,}"))
    return rows


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], *, right: tuple[int, ...]) -> Any:
    from rich.table import Table
    from rich.text import Text

    made = Table()
    for index, head in enumerate(heads):
        made.add_column(head, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def _names(names: tuple[str, ...]) -> str:
    more = f", … ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
