"""Sums that fit into memory: segments of a model's blocks, and the sums of each of several texts.

The sums of a text are kept in a folder of unfinished work. They are added up in the order of the texts.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from bitladder.calibrate.gradients.entry_sums import (
    COLUMNS,
    ROOTS,
    Array,
    EntryPlan,
    EntrySums,
    OutputShape,
    sums_bytes,
)
from bitladder.calibrate.gradients.forward import HEAD_ROWS, TorchModel
from bitladder.calibrate.gradients.weighted_moments import GradientOptions
from bitladder.calibrate.unfinished import UnfinishedWork
from bitladder.engine import threads_available
from bitladder.errors import GradientsError, UsageError
from bitladder.gguf import block_of, kind_of

MOST_STATE = 2 << 30  # bytes of sums of a segment: what is saved each minute
BASE_BYTES = 600 << 20  # of a process that has loaded torch and the library
_HEADS, _WIDE = ("attn_q", "attn_k"), ("ffn_gate", "ffn_up")
_SHARED = {"ffn_up": "ffn_gate", "ffn_up_exps": "ffn_gate_exps"}  # kinds with one input


@dataclasses.dataclass(frozen=True)
class Segment:
    """Blocks first…stop−1, which are differentiated together; behind the last block comes the head.

    Parameters:
        first: the first block.
        stop: the block behind the last one.
        entries: what is collected there, from the last in the computation to the first.
    """

    first: int
    stop: int
    entries: tuple[EntryPlan, ...]


def choose_matrices(model: TorchModel, names: Collection[str] | None) -> list[str]:
    """The names (None: all matrices, and embeddings), from the last in the computation to the first.

    Raises UsageError for a name that is neither.
    """
    known = [*model.matrices[::-1], *([] if model.embedding is None else [model.embedding])]
    if names is None:
        return known
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"{model.path.name} does not multiply by a weight called {unknown[0]!r}")
    return [name for name in known if name in names]


def plan_entries(model: TorchModel, names: Sequence[str], options: GradientOptions) -> list[EntryPlan]:
    """The entries of some weights, in the order of the names: gate and up share one."""
    plans = []
    gates = {name: name.replace(kind, _SHARED[kind]) for name in names if (kind := kind_of(name)) in _SHARED}
    ups = {gate: up for up, gate in gates.items() if gate in names}
    for name in names:
        if gates.get(name) in ups:
            continue
        shared = (name, ups[name]) if name in ups else (name,)
        shapes = tuple(_output_shape(model, weight, options) for weight in shared)
        plans.append(EntryPlan(shared, model.shape(name)[1], shapes, model.experts(name)))
    return plans


def _output_shape(model: TorchModel, name: str, options: GradientOptions) -> OutputShape | None:
    n_out, kind = model.shape(name)[0], kind_of(name)
    if not options.outputs or name in (model.head, model.embedding) or model.experts(name) > 1:
        return None
    if kind in _WIDE:
        return OutputShape(1, n_out, options.rank)
    head = model.modules.head_dim
    return OutputShape(head, n_out // head) if kind in _HEADS else OutputShape(n_out, 1)


def lanes_of(model: TorchModel, memory: int, length: int, threads: int | None) -> int:
    """Chunks that are computed side by side: one for each thread, in a quarter of the memory. A device computes one."""
    if model.device is not None:
        return 1
    largest = max(_graph_bytes(model, block, length) for block in range(model.modules.blocks))
    return max(1, min(threads or threads_available(), memory // 4 // (_head_bytes(model) + largest)))


def _head_bytes(model: TorchModel) -> int:
    """Bytes of logits that are in memory at once while a chunk is computed."""
    return 5 * 4 * HEAD_ROWS * model.n_vocab


def plan_segments(
    model: TorchModel, plans: Sequence[EntryPlan], stop: int, memory: int, length: int, sketch: int, lanes: int
) -> list[Segment]:
    """The segments below block `stop` down to the lowest that has an entry, from the last to the first.

    Parameters:
        model: the model.
        plans: all entries.
        stop: the block behind the last one.
        memory: bytes for the sums of a segment and for what its backward pass keeps. A block is never cut.
        length: tokens of a chunk.
        sketch: as of `GradientOptions`.
        lanes: chunks that are computed side by side.
    """
    by_block: dict[int, list[EntryPlan]] = {}
    for plan in plans:
        block = 0 if plan.names[0] == model.embedding else block_of(plan.names[0])
        by_block.setdefault(model.modules.blocks if block is None else block, []).append(plan)
    lowest = min(by_block)
    segments: list[Segment] = []
    entries = by_block.get(stop, []) if stop == model.modules.blocks else []
    sums = sum(sums_bytes(plan, sketch) for plan in entries)
    kept, last = 0, stop
    for block in range(stop - 1, lowest - 1, -1):
        own = sum(sums_bytes(plan, sketch) for plan in by_block.get(block, []))
        graph = lanes * _graph_bytes(model, block, length)
        if block + 1 < last and (sums + own > MOST_STATE or sums + own + kept + graph > memory):
            segments.append(Segment(block + 1, last, tuple(entries)))
            entries, sums, kept, last = [], 0, 0, block + 1
        entries = [*entries, *by_block.get(block, [])]
        sums, kept = sums + own, kept + graph
    return [*segments, Segment(min(lowest, last), last, tuple(entries))]


def room_for_sums(model: TorchModel, plans: Sequence[EntryPlan], memory: int, lanes: int) -> int:
    """Bytes of `memory` that are left for sums, beside the weights, and beside torch, some logits and factors.

    Raises GradientsError where the experts of one block have larger sums than that: a block is never cut.
    """
    widest = max(model.shape(name)[1] for name in model.matrices)
    fixed = BASE_BYTES + lanes * _head_bytes(model) + 3 * 4 * widest * widest
    room = memory - model.weights.most_bytes - fixed
    sizes: collections.Counter[int | None] = collections.Counter()
    for plan in plans:
        if plan.experts > 1:
            sizes[block_of(plan.names[0])] += sums_bytes(plan, 0)
    block, size = max(sizes.items(), key=lambda item: item[1], default=(None, 0))
    if size > max(room, 0):
        raise GradientsError(
            f"{model.path.name}: the sums of the experts of block {block} take {size / 2**30:.2g} GiB, and "
            f"{max(room, 0) / 2**30:.2g} GiB of memory are left for them; gradients need a larger --memory"
        )
    return room


def _graph_bytes(model: TorchModel, block: int, length: int) -> int:
    """Bytes that the backward pass of a block keeps: some arrays of each width, as measured."""
    rows = 0
    for name in model.matrices:
        if block_of(name) == block:
            rows += model.shape(name)[0] * (model.modules.used_experts if model.experts(name) > 1 else 1)
    return 4 * length * (3 * rows + 12 * model.modules.width)


def kept_of_text(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Those arrays of an entry (`EntrySums.arrays`) that `add_text` needs of a text."""
    return {name: array for name, array in arrays.items() if not name.startswith(ROOTS)}


def clear_sums(arrays: Mapping[str, Array]) -> None:
    """Starts the sums of an entry again from 0."""
    for name, array in kept_of_text(arrays).items():
        if not name.endswith(COLUMNS):
            array[...] = 0


def add_text(arrays: Mapping[str, Array], text: Mapping[str, Array]) -> None:
    """Adds the sums of a text to those of an entry. The columns are the same for all texts."""
    for name, array in kept_of_text(arrays).items():
        if name.endswith(COLUMNS):
            array[...] = text[name]
        else:
            np.add(array, text[name], out=array)


def of_text(plan: EntryPlan, text: int) -> str:
    """The name of the piece with the sums of a text."""
    return f"{plan.names[0]}.text {text}"


def keep_text(work: UnfinishedWork, entry: EntrySums, text: int) -> None:
    """Keeps the sums of an entry over one text."""
    arrays = entry.arrays()
    work.put_arrays(of_text(entry.plan, text), kept_of_text(arrays))


def joined_entry(plan: EntryPlan, options: GradientOptions, length: int, works: Sequence[UnfinishedWork]) -> EntrySums:
    """The sums of an entry over all texts, from those that `keep_text` kept of each.

    Parameters:
        plan: the entry.
        options: how tokens are weighted.
        length: tokens of a chunk.
        works: where the sums of each text are.
    """
    entry = EntrySums(plan, options, length)
    arrays = entry.arrays()
    for text, work in enumerate(works):
        add_text(arrays, work.get_arrays(of_text(plan, text)))
    return entry
