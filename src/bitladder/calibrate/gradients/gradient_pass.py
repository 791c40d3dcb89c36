"""One pass over the chunks that leaves moments by gradients: forward to the cuts between segments, then back.

The blocks of a model are cut into segments whose sums fit into memory. Every chunk is computed forward once up to the
last segment; the residual streams at the cuts are kept in a folder. Then each segment, the last one first, is computed
again from its stream and differentiated from the gradient that the segment above left. So a model of any depth is read
twice forward and once back; one that is a single segment once forward and once back.

As many chunks as there are threads are computed side by side, if they fit into memory: threads of torch wait for each
other after each of many small operations. Chunks add to the sums in their order, and no product depends on the number
of threads.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from bitladder.calibrate.gradients.entry_sums import Array, EntryPlan, EntrySums, sums_bytes
from bitladder.calibrate.gradients.forward import TorchModel
from bitladder.calibrate.gradients.segments import Segment, add_text, clear_sums, kept_of_text, of_text, plan_segments
from bitladder.calibrate.gradients.torch_weights import Routed
from bitladder.calibrate.gradients.weighted_moments import GradientOptions
from bitladder.calibrate.sum_order import ByText, Turn, Turns
from bitladder.calibrate.unfinished import UnfinishedWork
from bitladder.engine import Tokens, as_torch, device_memory, threads_available
from bitladder.progress import Bar, Progress

Result = TypeVar("Result")
NEXT_STOP = "segments"  # the piece that says which block is the first whose entries are finished


def chunk_generator(seed: int, index: int) -> torch.Generator:
    """The generator that draws the labels of chunk `index`: the same in every pass."""
    return torch.Generator().manual_seed(seed * 1_000_003 + index)


class GradientPass:
    """The work on some chunks. What is finished is in the folder of unfinished work.

    Parameters:
        model: the model.
        chunks: int32 [chunks, n_ctx].
        by_text: which chunks are of which text.
        plans: the entries, from the last in the computation to the first.
        options: how tokens are weighted.
        memory: bytes for sums and for what a backward pass keeps.
        work: keeps streams, gradients, and the state of the segment at hand.
        lanes: chunks that are computed side by side.
        threads: threads of the CPU.
    """

    # Nine parameters: what is read, what is summed, where it is kept, and the limits of memory and threads.
    def __init__(
        self,
        model: TorchModel,
        chunks: Tokens,
        by_text: ByText,
        plans: Sequence[EntryPlan],
        options: GradientOptions,
        memory: int,
        work: UnfinishedWork,
        lanes: int,
        threads: int | None,
    ) -> None:
        self._model, self._chunks, self._options, self._work = model, chunks, options, work
        self._by_text = by_text
        self._lanes = lanes
        # Experts are chosen by products of transformers' own.
        experts = any(plan.experts > 1 for plan in plans)
        self._learners = max(1, min(lanes, memory // 4 // (3 * 4 * max(plan.n_in for plan in plans) ** 2)))
        self._share = 1 if experts else max(1, (threads or threads_available()) // lanes)
        pilots = range(0, len(chunks), options.pilots) if len(chunks) >= options.fewest else range(0)
        self._pilots = len(pilots)
        # Every segment reads the chunks in this order: the pilots of all texts, and what is left of one or all of them.
        self._order, self._stops = list(pilots), list[int]()
        for text in by_text.chosen:
            self._order += [index for index in by_text.chunks(text) if index not in pilots]
            self._stops.append(len(self._order))
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
            progress.task("gradients", len(self._order) * (len(self._segments) + bool(cuts))) as bar,
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
                self._work.drop(*(of_text(plan, text) for plan in segment.entries for text in self._kept_texts))

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
        """Places of chunks that are computed side by side. Those for the leverages and those of a text are apart."""
        while done < len(self._order):
            stop = min(done + self._lanes, *(stop for stop in (self._pilots, *self._stops) if stop > done))
            yield range(done, stop)
            done = stop

    @property
    def _kept_texts(self) -> Sequence[int]:
        """The texts whose sums are kept until those of the last one are complete."""
        return self._by_text.chosen[:-1]

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
        arrays = [entry.arrays() for entry in entries]
        state = {
            f"{entry.plan.names[0]} {name}": array
            for entry, parts in zip(entries, arrays, strict=True)
            for name, array in parts.items()
        }
        label = f"blocks {segment.first} to {segment.stop}"
        done = self._work.load_state(label, state, progress)
        if segment.first and done > self._work.kept_rows(_gradient(segment.first), self._gradient_shape):
            raise self._work.damaged(f"{self._work.folder} lacks gradients that its state counts")
        bar.advance(done)
        for entry in entries:
            entry.put()
            entry.learned = entry.leverages_known and 0 < self._pilots < done
        if done > self._pilots:
            self._end_texts(done, entries, arrays)  # one that was complete when the state was kept
        for group in self._groups(done):
            if group.start == self._pilots:
                self._end_pilots(entries, arrays)
            downs = self._side_by_side(group, lambda turn: self._chunk(segment, turn, by_name))
            for place, down in zip(group, downs, strict=True):
                if down is not None:
                    self._work.append_row(_gradient(segment.first), place, down.numpy())
            bar.advance(len(group))
            if self._work.due():
                for entry in entries:
                    entry.fetch()
                self._work.save_state(label, group.stop, state)
            if group.stop != self._pilots:
                self._end_texts(group.stop, entries, arrays)
        if len(self._order) == self._pilots:
            self._end_pilots(entries, arrays)
        self._add_texts(entries, arrays)
        return entries

    def _end_pilots(self, entries: Sequence[EntrySums], arrays: Sequence[Mapping[str, Array]]) -> None:
        """Makes leverages of the pilots. What is counted of them is counted with the first text."""
        if not self._pilots:
            return
        with ThreadPoolExecutor(self._learners) as learners:
            list(learners.map(EntrySums.use_leverages, entries))
        if self._by_text.chosen[0]:
            self._clear(entries, arrays)
        self._end_texts(self._pilots, entries, arrays)  # one that has nothing but pilots

    def _end_texts(self, done: int, entries: Sequence[EntrySums], arrays: Sequence[Mapping[str, Array]]) -> None:
        """Keeps the sums of a text that ends at a place, but for the last text, and starts again from 0."""
        for text, stop in zip(self._kept_texts, self._stops, strict=False):
            if stop == done:
                for entry, parts in zip(entries, arrays, strict=True):
                    entry.fetch()
                    self._work.put_arrays(of_text(entry.plan, text), kept_of_text(parts))
                self._clear(entries, arrays)

    @staticmethod
    def _clear(entries: Sequence[EntrySums], arrays: Sequence[Mapping[str, Array]]) -> None:
        for entry, parts in zip(entries, arrays, strict=True):
            entry.fetch()
            clear_sums(parts)
            entry.put()

    def _add_texts(self, entries: Sequence[EntrySums], arrays: Sequence[Mapping[str, Array]]) -> None:
        """Adds the sums of all texts in their order."""
        for entry, parts in zip(entries, arrays, strict=True) if self._kept_texts else ():
            entry.fetch()
            last = {name: array.copy() for name, array in kept_of_text(parts).items()}
            clear_sums(parts)
            for text in self._kept_texts:
                add_text(parts, self._work.get_arrays(of_text(entry.plan, text)))
            add_text(parts, last)
            entry.put()

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
