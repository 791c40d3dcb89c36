"""One pass over the chunks that leaves moments by gradients: forward to the cuts between segments, then back.

The blocks of a model are cut into segments whose sums fit into memory. Every chunk is computed forward once up to the
last segment; the residual streams at the cuts are kept in a folder. Then each segment, the last one first, is computed
again from its stream and differentiated from the gradient that the segment above left. So a model of any depth is read
twice forward and once back; one that is a single segment once forward and once back.

As many chunks as there are threads are computed side by side, if they fit into memory: threads of torch wait for each
other after each of many small operations. Chunks add to the sums in their order, and no product depends on the number
of threads.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from bitladder.calibrate.gradients.entry_sums import EntryPlan, EntrySums, OutputShape, sums_bytes
from bitladder.calibrate.gradients.forward import HEAD_ROWS, TorchModel
from bitladder.calibrate.gradients.torch_weights import Routed
from bitladder.calibrate.gradients.weighted_moments import GradientOptions
from bitladder.calibrate.turns import Turn, Turns
from bitladder.calibrate.unfinished import UnfinishedWork
from bitladder.engine import Tokens, as_torch, device_memory, threads_available
from bitladder.errors import GradientsError, UsageError
from bitladder.gguf import block_of, kind_of
from bitladder.progress import Bar, Progress

Result = TypeVar("Result")
MOST_STATE = 2 << 30  # bytes of sums of a segment: what is saved each minute
BASE_BYTES = 600 << 20  # of a process that has loaded torch and the library
_HEADS, _WIDE = ("attn_q", "attn_k"), ("ffn_gate", "ffn_up")
_SHARED = {"ffn_up": "ffn_gate", "ffn_up_exps": "ffn_gate_exps"}  # kinds with one input
NEXT_STOP = "segments"  # the piece that says which block is the first whose entries are finished


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


def chunk_generator(seed: int, index: int) -> torch.Generator:
    """The generator that draws the labels of chunk `index`: the same in every pass."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


class GradientPass:
    """The work on some chunks. What is finished is in the folder of unfinished work.

    Parameters:
        model: the model.
        chunks: int32 [chunks, n_ctx].
        plans: the entries, from the last in the computation to the first.
        options: how tokens are weighted.
        memory: bytes for sums and for what a backward pass keeps.
        work: keeps streams, gradients, and the state of the segment at hand.
        lanes: chunks that are computed side by side.
        threads: threads of the CPU.
    """

    def __init__(
        self,
        model: TorchModel,
        chunks: Tokens,
        plans: Sequence[EntryPlan],
        options: GradientOptions,
        memory: int,
        work: UnfinishedWork,
        lanes: int,
        threads: int | None,
    ) -> None:
        self._model, self._chunks, self._options, self._work = model, chunks, options, work
        self._lanes = lanes
        # Experts are chosen by products of transformers' own.
        experts = any(plan.experts > 1 for plan in plans)
        self._learners = max(1, min(lanes, memory // 4 // (3 * 4 * max(plan.n_in for plan in plans) ** 2)))
        self._share = 1 if experts else max(1, (threads or threads_available()) // lanes)
        pilots = range(0, len(chunks), options.pilots) if len(chunks) >= options.fewest else range(0)
        self._pilots = len(pilots)
        # Every segment reads the chunks in this order.
        self._order = [*pilots, *(index for index in range(len(chunks)) if index not in pilots)]
        length, width = chunks.shape[1], model.modules.width
        self._stream_shape, self._gradient_shape = (length, width), (options.draws, length, width)
        stop = model.modules.blocks
        if work.has(NEXT_STOP):
            stop = int(work.get(NEXT_STOP))
        self._segments = []
        if stop:
            self._segments = plan_segments(model, plans, stop, memory, length, options.sketch, self._lanes)

    def run(self, progress: Progress) -> Iterator[list[EntrySums]]:
        """Yields the entries of each segment when they are complete. The next one begins when they were kept."""
        cuts = [segment.first for segment in self._segments if segment.first]
        with (
            progress.task("gradients", len(self._chunks) * (len(self._segments) + bool(cuts))) as bar,
            ThreadPoolExecutor(self._lanes * self._share, initializer=torch.set_num_threads, initargs=(1,)) as products,
            ThreadPoolExecutor(self._lanes, initializer=self._begin_lane, initargs=(products,)) as self._pool,
        ):
            if cuts:
                self._forward(cuts, bar)
            for segment in self._segments:
                if cuts:
                    self._model.weights.forget()  # so that those of this segment stay in memory
                entries = self._segment(segment, bar, progress)
                yield entries
                entries.clear()  # whoever was given them holds the list: two segments do not fit into memory
                self._work.put(NEXT_STOP, torch.tensor(segment.first).numpy())
                self._work.drop(_gradient(segment.stop), _stream(segment.first))

    def _forward(self, cuts: Sequence[int], bar: Bar) -> None:
        """Keeps the residual stream of each chunk at some cuts, the highest first."""
        done = min(self._work.kept_rows(_stream(cut), self._stream_shape) for cut in cuts)
        bar.advance(done)

        @torch.no_grad()
        def forward(turn: Turn) -> list[torch.Tensor]:
            streams = [self._model.embed(self._chunks[self._order[turn.chunk]])]
            for first, cut in itertools.pairwise([0, *reversed(cuts)]):
                streams.append(self._model.run(streams[-1], first, cut))
            return streams[1:]

        for group in self._groups(done):
            for place, streams in zip(group, self._side_by_side(group, forward), strict=True):
                for cut, stream in zip(reversed(cuts), streams, strict=True):
                    self._work.append_row(_stream(cut), place, stream[0].numpy())
            bar.advance(len(group))

    def _groups(self, done: int) -> Iterator[range]:
        """Places of chunks that are computed side by side. Those for the leverages are apart from the rest."""
        while done < len(self._order):
            stop = min(done + self._lanes, len(self._order))
            stop = self._pilots if done < self._pilots < stop else stop
            yield range(done, stop)
            done = stop

    def _begin_lane(self, products: Executor) -> None:
        torch.set_num_threads(self._share)
        self._model.set_repeatable(products if self._share > 1 else None)

    def _side_by_side(self, group: range, work: Callable[[Turn], Result]) -> list[Result]:
        """The results of a group."""
        turns = Turns(group)

        def in_turn(place: int) -> Result:
            with turns.of(place) as turn:
                self._model.set_check(turns.check)
                return work(turn)

        running = [self._pool.submit(in_turn, place) for place in group]
        try:
            return [each.result() for each in running]
        except BaseException as error:
            turns.stop(error)
            raise
        finally:
            wait(running)

    def _segment(self, segment: Segment, bar: Bar, progress: Progress) -> list[EntrySums]:
        device = self._place(segment, progress)
        entries = [EntrySums(plan, self._options, self._chunks.shape[1], device) for plan in segment.entries]
        by_name = {name: entry for entry in entries for name in entry.plan.names}
        state = {name: array for entry in entries for name, array in entry.arrays().items()}
        label = f"blocks {segment.first} to {segment.stop}"
        done = self._work.load_state(label, state, progress)
        if segment.first and done > self._work.kept_rows(_gradient(segment.first), self._gradient_shape):
            raise self._work.damaged(f"{self._work.folder} lacks gradients that its state counts")
        bar.advance(done)
        for entry in entries:
            entry.put()
            entry.learned = entry.leverages_known and 0 < self._pilots < done
        for group in self._groups(done):
            if self._pilots and group.start == self._pilots:
                with ThreadPoolExecutor(self._learners) as learners:
                    list(learners.map(EntrySums.use_leverages, entries))
            downs = self._side_by_side(group, lambda turn: self._chunk(segment, turn, by_name))
            for place, down in zip(group, downs, strict=True):
                if down is not None:
                    self._work.append_row(_gradient(segment.first), place, down.numpy())
            bar.advance(len(group))
            if self._work.due():
                for entry in entries:
                    entry.fetch()
                self._work.save_state(label, group.stop, state)
        return entries

    def _place(self, segment: Segment, progress: Progress) -> torch.device | None:
        """Where the sums of a segment are: on the device, if half of what is free there holds them."""
        if self._model.device is None:
            return None
        free = device_memory(self._model.device)
        need = sum(sums_bytes(plan, self._options.sketch) for plan in segment.entries)
        if free is not None and need > free // 2:
            progress.info(
                f"sums of blocks {segment.first} to {segment.stop} do not fit into the memory of the device "
                f"({self._model.device}): the CPU adds up"
            )
            return None
        return as_torch(self._model.device)

    def _chunk(self, segment: Segment, turn: Turn, entries: dict[str, EntrySums]) -> torch.Tensor | None:
        """Computes one chunk forward and back through a segment, and adds it to the entries.

        Returns the gradient for the segment below, [draws, length, width]; None if there is none.
        """
        model, place, draws = self._model, turn.chunk, self._options.draws
        index, last = self._order[place], segment.stop == self._model.modules.blocks
        if segment.first:
            stream = torch.from_numpy(self._work.read_row(_stream(segment.first), place, self._stream_shape))[None]
        else:
            stream = model.embed(self._chunks[index])
        left = {
            entry.plan.names[0]: draws * sum(model.uses.get(each, 1) for each in entry.plan.names)
            for entry in entries.values()
        }

        def tap(name: str, inputs: torch.Tensor, gradients: torch.Tensor, routed: Routed | None) -> None:
            sums = entries[name].plan.names[0]
            turn.wait(sums)
            if name == model.head:
                entries[name].add_powers(name, inputs, gradients, gradients)
            elif name == model.embedding:
                # Each token counts alike: a row is the vector of one, and few tokens have half of the squares.
                squares = gradients.square().sum(1)
                reached = (squares > 0).float()
                directions = gradients * squares.clamp_min(torch.finfo(squares.dtype).tiny).rsqrt()[:, None]
                entries[name].add_powers(name, directions, squares, reached)
            else:
                entries[name].add(name, inputs, gradients, routed)
            left[sums] -= 1
            if not left[sums]:
                turn.leave(sums)

        names = entries.keys() - {model.head, model.embedding}
        part = model.differentiable(stream, segment.first, segment.stop, names, tap)
        generator = chunk_generator(self._options.seed, index)
        kept = None if last else self._work.read_row(_gradient(segment.stop), place, self._gradient_shape)
        downs = []
        for draw in range(draws):
            if kept is None:
                hidden = part.result.detach()[0]
                gradient, squares = model.head_backward(hidden, generator)
                if model.head in entries:
                    tap(model.head, hidden, squares, None)
            else:
                gradient = torch.from_numpy(kept[draw])
            if segment.first < segment.stop:
                downs.append(part.backward(gradient[None], last=draw + 1 == draws)[0])
                if model.embedding in entries:
                    tap(model.embedding, downs[-1], downs[-1], None)
        return torch.stack(downs) if segment.first and downs else None


def _stream(block: int) -> str:
    return f"stream {block}"


def _gradient(block: int) -> str:
    return f"gradient {block}"
