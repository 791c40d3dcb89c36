"""Which entries moments by gradients have, and which blocks of the model are differentiated together."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from bitladder.calibrate.gradients.entry_sums import EntryPlan, OutputShape, sums_bytes
from bitladder.calibrate.gradients.options import GradientOptions
from bitladder.errors import UsageError
from bitladder.gguf import block_of, kind_of

if TYPE_CHECKING:
    from bitladder.calibrate.gradients.forward import TorchModel

MOST_STATE = 2 << 30  # bytes of sums of a segment: what is saved each minute
BASE_BYTES = 600 << 20  # of a process that has loaded torch and the library
HEAD_ROWS = 128  # positions whose logits are made at once
_HEADS, _WIDE = ("attn_q", "attn_k"), ("ffn_gate", "ffn_up")


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


def choose_matrices(model: "TorchModel", names: Collection[str] | None) -> list[str]:
    """The names (None: all matrices), from the last in the computation to the first.

    Raises UsageError for a name that is not a matrix.
    """
    if names is None:
        return model.matrices[::-1]
    unknown = [name for name in names if name not in model.matrices]
    if unknown:
        raise UsageError(f"{model.path.name} does not multiply by a weight called {unknown[0]!r}")
    return [name for name in reversed(model.matrices) if name in names]


def plan_entries(model: "TorchModel", names: Sequence[str], options: GradientOptions) -> list[EntryPlan]:
    """The entries of some weights, in the order of the names: gate and up share one."""
    plans = []
    gates = [name for name in names if kind_of(name) == _WIDE[0]]
    for name in names:
        gate = name.replace(_WIDE[1], _WIDE[0])
        if kind_of(name) == _WIDE[1] and gate in gates:
            continue
        up = name.replace(_WIDE[0], _WIDE[1])
        shared = (name, up) if name in gates and up in names else (name,)
        shapes = tuple(_output_shape(model, weight, options) for weight in shared)
        plans.append(EntryPlan(shared, model.shape(name)[1], shapes))
    return plans


def _output_shape(model: "TorchModel", name: str, options: GradientOptions) -> OutputShape | None:
    n_out, kind = model.shape(name)[0], kind_of(name)
    if not options.outputs or name == model.head:
        return None
    if kind in _WIDE:
        return OutputShape(1, n_out, options.rank)
    head = model.modules.head_dim
    return OutputShape(head, n_out // head) if kind in _HEADS else OutputShape(n_out, 1)


def plan_segments(
    model: "TorchModel", plans: Sequence[EntryPlan], stop: int, memory: int, length: int, sketch: int
) -> list[Segment]:
    """The segments below block `stop` down to the lowest that has an entry, from the last to the first.

    Parameters:
        model: the model.
        plans: all entries.
        stop: the block behind the last one.
        memory: bytes for the sums of a segment and for what its backward pass keeps. A block is never cut.
        length: tokens of a chunk.
        sketch: as of `GradientOptions`.
    """
    by_block: dict[int, list[EntryPlan]] = {}
    for plan in plans:
        block = block_of(plan.names[0])
        by_block.setdefault(model.modules.blocks if block is None else block, []).append(plan)
    lowest = min(by_block)
    segments: list[Segment] = []
    entries = by_block.get(stop, []) if stop == model.modules.blocks else []
    sums = sum(sums_bytes(plan, sketch) for plan in entries)
    kept, last = 0, stop
    for block in range(stop - 1, lowest - 1, -1):
        own = sum(sums_bytes(plan, sketch) for plan in by_block.get(block, []))
        graph = _graph_bytes(model, length)
        if block + 1 < last and (sums + own > MOST_STATE or sums + own + kept + graph > memory):
            segments.append(Segment(block + 1, last, tuple(entries)))
            entries, sums, kept, last = [], 0, 0, block + 1
        entries = [*entries, *by_block.get(block, [])]
        sums, kept = sums + own, kept + graph
    return [*segments, Segment(min(lowest, last), last, tuple(entries))]


def fixed_bytes(model: "TorchModel") -> int:
    """Bytes beside weights and sums: torch and the library, some logits, and the matrix that is factored."""
    widest = max(model.shape(name)[1] for name in model.matrices)
    return BASE_BYTES + 5 * 4 * HEAD_ROWS * model.n_vocab + 3 * 4 * widest * widest


def _graph_bytes(model: "TorchModel", length: int) -> int:
    """Bytes that the backward pass of a block keeps: some arrays of each width, as measured."""
    widths = [model.shape(name) for name in model.matrices if block_of(name) == 0]
    return 4 * length * (3 * sum(n_out for n_out, _ in widths) + 12 * model.modules.width)
