"""What a prepared quant will be, told before any work: types, bytes, fallbacks, and the room it needs."""

import collections
import dataclasses
import math
import os
import pathlib
import shutil

from bitladder.engine.types import threads_available
from bitladder.errors import BitladderError
from bitladder.gguf.names import name_in_block
from bitladder.gguf.split_writer import split_sizes
from bitladder.quantize.prepare import Prepared
from bitladder.quantize.stream import AHEAD, PIECE


@dataclasses.dataclass(frozen=True)
class KindRow:
    """The tensors of one kind ("attn_v.weight", over all blocks) that get one type: how many, and their bytes."""

    kind: str
    type: str
    count: int
    bytes: int
    bpw: float


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A tensor whose row `width` cannot hold the `wanted` type; `extra_bytes` is what the `used` one costs more.

    A type that cannot be is priced at its bits per weight.
    """

    tensor: str
    width: int
    wanted: str
    used: str
    extra_bytes: int


@dataclasses.dataclass(frozen=True)
class PatternRow:
    """A --tensor-type pattern: in how many names it is found, and how many tensors it gave its type."""

    pattern: str
    type: str
    matched: tuple[str, ...]
    decided: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Preflight:
    """All figures of the preflight; sizes in bytes.

    `files` are the sizes of the file or shards, to the byte; `memory` is what is held at a time beside the program
    itself; `unweighted` are tensors that are quantized without importance although there is an imatrix.
    """

    kinds: tuple[KindRow, ...]
    patterns: tuple[PatternRow, ...]
    fallbacks: tuple[Fallback, ...]
    files: tuple[int, ...]
    bpw: float
    bpw_blocks: float
    memory: int
    weighted: int
    unweighted: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of the file or of all shards."""
        return sum(self.files)


def preflight(prepared: Prepared, *, threads: int | None = None) -> Preflight:
    """Look at a prepared quant; nothing is read or written."""
    quantized = [tensor for tensor in prepared.choice.tensors if tensor.changes and tensor.type.quantized]
    weighted = [tensor.name for tensor in quantized if tensor.name in prepared.importance]
    uses_imatrix = bool(prepared.importance)
    return Preflight(
        kinds=_kinds(prepared),
        patterns=tuple(
            PatternRow(use.pattern, use.type.name, use.matched, use.decided) for use in prepared.choice.patterns
        ),
        fallbacks=_fallbacks(prepared),
        files=tuple(split_sizes(prepared.metadata, prepared.groups)),
        bpw=prepared.bpw,
        bpw_blocks=prepared.bpw_blocks,
        memory=_memory(prepared, threads or threads_available()),
        weighted=len(weighted),
        unweighted=tuple(t.name for t in quantized if t.name not in prepared.importance) if uses_imatrix else (),
    )


def check_room(prepared: Prepared, out: str | os.PathLike[str]) -> None:
    """Raise BitladderError if the disk of `out` has less room than the new file needs.

    A file that is replaced stays until the new one is complete, so it gives no room.
    """
    folder = next(parent for parent in pathlib.Path(out).absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if prepared.bytes > free:
        raise BitladderError(f"{out} needs {prepared.bytes} bytes, and the disk has {free} bytes free: make room first")


def _kinds(prepared: Prepared) -> tuple[KindRow, ...]:
    sums: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for plan in prepared.plans:
        entry = sums[name_in_block(plan.name), plan.type.name]
        for index, amount in enumerate((1, plan.nbytes, math.prod(plan.shape))):
            entry[index] += amount
    return tuple(
        KindRow(kind, name, count, size, 8 * size / weights) for (kind, name), (count, size, weights) in sums.items()
    )


def _fallbacks(prepared: Prepared) -> tuple[Fallback, ...]:
    found = []
    for tensor in prepared.choice.tensors:
        if tensor.wanted == tensor.type:
            continue
        source = tensor.source
        used = tensor.type.row_bytes(source.width) * source.rows
        extra = used - math.ceil(source.elements * tensor.wanted.bpw / 8)
        found.append(Fallback(tensor.name, source.width, tensor.wanted.name, tensor.type.name, extra))
    return tuple(found)


def _memory(prepared: Prepared, threads: int) -> int:
    """Importance, and for each piece under way its rows as stored, as float32 and as written."""
    importance = sum(columns.nbytes for columns in prepared.importance.values())
    piece = 0
    for tensor in prepared.choice.tensors:
        width = tensor.source.width
        rows = min(max(1, PIECE // width), tensor.source.rows)
        row = tensor.source.type.row_bytes(width)
        if tensor.changes:
            row += 4 * width + tensor.type.row_bytes(width)
        piece = max(piece, rows * row)
    return importance + piece * threads * (AHEAD + 1)
