"""The figures of a prepared quant before any work: types, bytes, fallbacks, memory and disk."""

import collections
import dataclasses
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Sequence

from bitladder.engine import AHEAD, Request, preset_types, threads_available, type_by_name
from bitladder.errors import BitladderError
from bitladder.gguf import F32, GgufWriter, TensorPlan, file_size, name_in_block, scalar, split_sizes, string, u32
from bitladder.quantize.prepare import PreparedQuant
from bitladder.quantize.write_quant import PIECE
from bitladder.units import number_of


@dataclasses.dataclass(frozen=True)
class KindRow:
    """The tensors of one kind ("attn_v.weight", over all blocks) that get one type, with their bytes."""

    kind: str
    type: str
    count: int
    bytes: int
    bpw: float


@dataclasses.dataclass(frozen=True)
class Fallback:
    """A tensor whose width cannot hold a type.

    Parameters:
        tensor: name.
        width: weights in a row.
        requested: the type that the width cannot hold.
        used: the type that it gets.
        extra_bytes: bytes more than the bits per weight of `requested` take.
    """

    tensor: str
    width: int
    requested: str
    used: str
    extra_bytes: int


@dataclasses.dataclass(frozen=True)
class PatternRow:
    """A pattern of --tensor-type: the tensors that it matches, and those that it gives its type."""

    pattern: str
    type: str
    matched: tuple[str, ...]
    decided: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Preflight:
    """All figures of the preflight.

    Parameters:
        kinds: types by kind.
        patterns: the match table of --tensor-type.
        fallbacks: tensors that get another type.
        files: exact size of the file or of each shard, bytes.
        bpw: bits per weight over all tensors.
        bpw_blocks: bits per weight over the repeating blocks.
        memory: largest memory beside the program itself, bytes.
        weighted: number of tensors that are quantized with importance.
        unweighted: tensors that are quantized without importance although there is an imatrix.
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


def preflight(prepared: PreparedQuant, *, threads: int | None = None) -> Preflight:
    """The figures of a prepared quant. Nothing is read or written."""
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


def check_room(prepared: PreparedQuant, out: str | os.PathLike[str]) -> None:
    """Raises BitladderError if the disk of `out` has less room than the new file needs.

    A file that is replaced stays until the new one is complete, so that it frees no room before.
    """
    folder = next(parent for parent in pathlib.Path(out).absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if prepared.bytes > free:
        raise BitladderError(
            f"{out} needs {number_of(prepared.bytes, 'byte')}, and the disk has {number_of(free, 'byte')} free: make "
            "room first"
        )


def _kinds(prepared: PreparedQuant) -> tuple[KindRow, ...]:
    sums: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for plan in prepared.plans:
        entry = sums[name_in_block(plan.name), plan.type.name]
        for index, amount in enumerate((1, plan.nbytes, math.prod(plan.shape))):
            entry[index] += amount
    return tuple(
        KindRow(kind, name, count, size, 8 * size / weights) for (kind, name), (count, size, weights) in sums.items()
    )


def _fallbacks(prepared: PreparedQuant) -> tuple[Fallback, ...]:
    fallbacks = []
    for tensor in prepared.choice.tensors:
        if tensor.requested == tensor.type:
            continue
        source = tensor.source
        used = tensor.type.row_bytes(source.width) * source.rows
        extra = used - math.ceil(source.elements * tensor.requested.bpw / 8)
        fallbacks.append(Fallback(tensor.name, source.width, tensor.requested.name, tensor.type.name, extra))
    return tuple(fallbacks)


def _memory(prepared: PreparedQuant, threads: int) -> int:
    """Bytes of importance, and of each piece in work: its rows as stored, as float32 and as written."""
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


def substitutes(widths: Iterable[int], types: Sequence[str]) -> dict[int, dict[str, str]]:
    """What llama-quantize uses where the width of a row cannot hold a type.

    The library is asked, with a file that has a tensor of each width and no weights.

    Parameters:
        widths: weights in a row.
        types: names of types.

    Returns:
        Width → type → the type that is used instead, for those that do not fit.
    """
    plans = [TensorPlan(f"blk.0.w{width}.weight", (width, 32), type_by_name("f32")) for width in sorted(set(widths))]
    counts = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
    metadata = {"general.architecture": string("llama"), **{f"llama.{key}": u32(1) for key in (*counts, "vocab_size")}}
    metadata["llama.attention.layer_norm_rms_epsilon"] = scalar(F32, 1e-5)
    used: dict[int, dict[str, str]] = {plan.shape[0]: {} for plan in plans}
    with tempfile.TemporaryDirectory(prefix="bitladder.") as folder:
        path = pathlib.Path(folder) / "widths.gguf"
        with path.open("wb") as stream:
            GgufWriter(stream, metadata, plans)
            stream.truncate(file_size(metadata, plans))
        for name in types:
            answer = preset_types(path, Request("Q8_0", overrides=((".*", type_by_name(name)),)))
            for plan in plans:
                if plan.name in answer.misfits:
                    used[plan.shape[0]][name] = answer.types[plan.name].name
    return {width: instead for width, instead in used.items() if instead}
