"""Passes over the chunks: each collects the parts that fit into memory together, and leaves them in a folder."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.collect_imatrix import ImatrixSums
from bitladder.calibrate.imatrix import write_imatrix
from bitladder.calibrate.inputs import ChunkObserver, Floats, chunks_at_once, watch_chunks
from bitladder.calibrate.moments.collector import EntryPart, MomentCollector, MomentEntry, MomentsAndSquares, PartSums
from bitladder.calibrate.moments.schema import MomentShape, Provenance
from bitladder.calibrate.moments.triangles import Correlations, triangle
from bitladder.calibrate.sum_order import ByText
from bitladder.calibrate.unfinished import UnfinishedWork
from bitladder.engine import Decoding, Model, Tokens, threads_available
from bitladder.files import sha256_bytes
from bitladder.progress import Progress

IMATRIX_FILE = "imatrix.gguf"
_Beside = tuple[ImatrixSums, list[str]] | None  # an importance matrix that is collected too, and names of its texts


def run_passes(
    model: Model,
    chunks: Tokens,
    by_text: ByText,
    passes: Sequence[Sequence[EntryPart]],
    work: UnfinishedWork,
    imatrix: _Beside,
    decoding: Decoding,
    progress: Progress,
) -> dict[str, PartSums]:
    """Collects all parts that are not in the folder of unfinished work yet.

    If only one text is read, its sums are left in the folder, and nothing else is.

    Parameters:
        model: the loaded model.
        chunks: int32 [chunks, n_ctx].
        by_text: which of them are of which text.
        passes: the parts of each pass.
        work: keeps the parts of all passes but the last, and the state of a pass.
        imatrix: collects an importance matrix in the first pass, of texts of these names. It is left in the folder as
            IMATRIX_FILE.
        decoding: how chunks are decoded.
        progress: hears of the work.

    Returns:
        The parts of the last pass, by label.
    """
    parts: list[PartSums] = []
    first, last = by_text.chunks(by_text.chosen[0]).start, by_text.chunks(by_text.chosen[-1]).stop
    chunks = chunks[first:last]
    threads = (decoding.threads or threads_available()) // chunks_at_once(decoding, chunks.shape[1])
    with (
        progress.task("second moments", len(passes) * len(chunks)) as bar,
        ThreadPoolExecutor(decoding.threads or threads_available()) as pool,
    ):
        for number, planned in enumerate(passes):
            missing = [part for part in planned if not work.has(_done(part, by_text))]
            beside = None if work.has(IMATRIX_FILE) else imatrix
            if not missing and beside is None:
                bar.advance(len(chunks))
                continue
            bar.note(f"pass {number + 1} of {len(passes)}" if len(passes) > 1 else "")
            collector = MomentCollector(missing, pool if threads > 1 else None)
            state = dict(array for sums in collector.parts for array in sums.state())
            if beside is not None:
                state |= beside[0].state()
            label = sha256_bytes("\n".join(state).encode())
            done = work.load_state(label, state, progress)
            bar.advance(done)

            def observer(collector: MomentCollector = collector, beside: _Beside = beside) -> ChunkObserver:
                return collector.observer() if beside is None else MomentsAndSquares(collector.observer(), beside[0])

            for read, squares, ended in _watch(model, chunks, by_text, observer, decoding, done):
                if beside is not None:
                    for part in squares:
                        beside[0].add(part)
                bar.advance(len(squares))
                if work.due():
                    work.save_state(label, read, state)
                if ended is not None:
                    _keep_text(work, collector.parts, ended)
                    _clear(collector.parts)
            if beside is not None:
                write_imatrix(beside[0].imatrix(beside[1], chunks.shape[1]), work.path(IMATRIX_FILE))
            parts = _end_pass(collector.parts, by_text, work, keep=number < len(passes) - 1)
    return {sums.part.label: sums for sums in parts}


def _watch(
    model: Model,
    chunks: Tokens,
    by_text: ByText,
    observer: Callable[[], ChunkObserver],
    decoding: Decoding,
    done: int,
) -> Iterator[tuple[int, list[Any], int | None]]:
    """As `watch_chunks`; and after each text but the last its number, before any input of the next one is shown."""
    stop = 0
    for text in by_text.chosen:
        stop += by_text.counts[text]
        if done <= stop:
            for read, squares in watch_chunks(model, chunks[:stop], observer, decoding, done=done):
                yield read, squares, None
            done = stop
            if text != by_text.chosen[-1]:
                yield stop, [], text


def _end_pass(parts: list[PartSums], by_text: ByText, work: UnfinishedWork, *, keep: bool) -> list[PartSums]:
    """Adds up the texts. Returns the parts that are not kept in the folder."""
    if by_text.only is not None:
        _keep_text(work, parts, by_text.only)
        for sums in parts:
            work.put(_done(sums.part, by_text), np.zeros(0))
        return []
    before = by_text.chosen[:-1]
    _add_texts(parts, [work] * len(before), before, last=True)
    if not keep:
        return parts
    for sums in parts:
        _keep(work, sums)
        work.drop(*(_of_text(sums.part, matrix, text) for matrix in sums.matrices for text in before))
    return []


def join_parts(
    passes: Sequence[Sequence[EntryPart]], works: Sequence[UnfinishedWork], out: UnfinishedWork, progress: Progress
) -> None:
    """Adds up what passes over each text left, and keeps the parts as `run_passes` does.

    Parameters:
        passes: the parts.
        works: where the sums of each text are.
        out: gets the parts.
        progress: hears of the work.
    """
    parts = [part for planned in passes for part in planned]
    with progress.task("add up texts", len(parts)) as bar:
        for part in parts:
            sums = PartSums(part)
            _add_texts([sums], works, range(len(works)))
            _keep(out, sums)
            bar.advance()


def _of_text(part: EntryPart, matrix: int, text: int) -> str:
    """The name of a matrix's sums over a text. Other machines may have other parts."""
    return f"{part.entry.name}.{matrix}.text {text}"


def _done(part: EntryPart, by_text: ByText) -> str:
    return part.label if by_text.only is None else f"{part.label}.done"


def _keep_text(work: UnfinishedWork, parts: Sequence[PartSums], text: int) -> None:
    for sums in parts:
        for matrix in sums.matrices:
            work.put_arrays(_of_text(sums.part, matrix, text), sums.of_matrix(matrix))


def _clear(parts: Sequence[PartSums]) -> None:
    for sums in parts:
        for matrix in sums.matrices:
            for array in sums.of_matrix(matrix).values():
                array[...] = 0


def _add_texts(
    parts: Sequence[PartSums], works: Sequence[UnfinishedWork], texts: Sequence[int], *, last: bool = False
) -> None:
    """Adds up the sums of texts in their order: those that are kept, and then what the parts hold of the last one."""
    for sums in parts if texts else ():
        for matrix in sums.matrices:
            arrays = sums.of_matrix(matrix)
            held = {name: array.copy() for name, array in arrays.items()} if last else None
            for array in arrays.values():
                array[...] = 0
            kept = (work.get_arrays(_of_text(sums.part, matrix, text)) for work, text in zip(works, texts, strict=True))
            for added in kept if held is None else itertools.chain(kept, [held]):
                for name, array in arrays.items():
                    np.add(array, added[name], out=array)


def _keep(work: UnfinishedWork, sums: PartSums) -> None:
    part = sums.part
    work.put(f"{part.label}.counts", sums.counts)
    work.put_rows(part.label, (part.stop - part.start, triangle(part.entry.input.width)), sums.packed())


class CollectedMoments:
    """What the passes left, as a MomentsSource: some of it in memory, the rest in the folder of unfinished work.

    Parameters:
        passes: the parts of each pass.
        memory: the parts that are in memory, by label.
        work: has the others.
        provenance: where the moments come from.
    """

    def __init__(
        self,
        passes: Sequence[Sequence[EntryPart]],
        memory: Mapping[str, PartSums],
        work: UnfinishedWork,
        provenance: Provenance,
    ) -> None:
        self.provenance = provenance
        self._parts: dict[str, list[EntryPart]] = {}
        self._entries: dict[str, MomentEntry] = {}
        for part in (part for parts in passes for part in parts):
            self._parts.setdefault(part.entry.name, []).append(part)
            self._entries |= dict.fromkeys(part.entry.names, part.entry)
        self._memory = memory
        self._work = work

    def names(self) -> list[str]:
        """See MomentsSource. Weights are in the order of the computation."""
        return list(self._entries)

    def entry(self, name: str) -> str:
        """See MomentsSource."""
        return self._entries[name].name

    def shape(self, name: str) -> MomentShape:
        """See MomentsSource."""
        entry = self._entries[name]
        return MomentShape(entry.input.matrices, entry.input.width)

    def counts(self, name: str) -> npt.NDArray[np.int64]:
        """See MomentsSource."""
        counts = []
        for part in self._parts[self.entry(name)]:
            sums = self._memory.get(part.label)
            counts.append(sums.counts if sums else self._work.get(f"{part.label}.counts"))
        return np.concatenate(counts)

    def packed(self, name: str, matrix: int = 0) -> Floats:
        """See MomentsSource."""
        part = next(part for part in self._parts[self.entry(name)] if part.start <= matrix < part.stop)
        index = matrix - part.start
        sums = self._memory.get(part.label)
        if sums:
            return sums.sums[index].packed(int(sums.counts[index]))
        return np.asarray(self._work.get(part.label)[index])

    def kept_inputs(self, name: str, matrix: int = 0) -> Correlations:
        """See MomentsSource."""
        return Correlations.of(self.packed(name, matrix)[None])

    def outputs(self, name: str) -> None:
        """See MomentsSource. Nothing is known of outputs."""
        return None
