"""Passes over the chunks: each collects the parts that fit into memory together, and leaves them in a folder."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.collect_imatrix import ImatrixSums
from bitladder.calibrate.imatrix import write_imatrix
from bitladder.calibrate.inputs import ChunkObserver, Floats, chunks_at_once, watch_chunks
from bitladder.calibrate.moments.collector import EntryPart, MomentCollector, MomentEntry, MomentsAndSquares, PartSums
from bitladder.calibrate.moments.schema import MomentShape, Provenance
from bitladder.calibrate.moments.triangles import Correlations, triangle
from bitladder.calibrate.unfinished import UnfinishedWork
from bitladder.engine import Decoding, Model, Tokens, single_threaded, threads_available
from bitladder.files import sha256_bytes
from bitladder.progress import Progress

IMATRIX_FILE = "imatrix.gguf"
_Beside = tuple[ImatrixSums, list[str]] | None  # an importance matrix that is collected too, and names of its texts


def run_passes(
    model: Model,
    chunks: Tokens,
    passes: Sequence[Sequence[EntryPart]],
    work: UnfinishedWork,
    imatrix: _Beside,
    decoding: Decoding,
    progress: Progress,
) -> dict[str, PartSums]:
    """Collects all parts that are not in the folder of unfinished work yet.

    Parameters:
        model: the loaded model.
        chunks: int32 [chunks, n_ctx].
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
    threads = (decoding.threads or threads_available()) // chunks_at_once(decoding, chunks.shape[1])
    with (
        progress.task("second moments", len(passes) * len(chunks)) as bar,
        ThreadPoolExecutor(decoding.threads or threads_available()) as pool,
        single_threaded(),
    ):
        for number, planned in enumerate(passes):
            missing = [part for part in planned if not work.has(part.label)]
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

            for read, squares in watch_chunks(model, chunks, observer, decoding, done=done):
                if beside is not None:
                    for part in squares:
                        beside[0].add(part)
                bar.advance(len(squares))
                if work.due():
                    work.save_state(label, read, state)
            if beside is not None:
                write_imatrix(beside[0].imatrix(beside[1], chunks.shape[1]), work.path(IMATRIX_FILE))
            parts = collector.parts
            if number < len(passes) - 1:
                for sums in parts:
                    _keep(work, sums)
                parts = []
    return {sums.part.label: sums for sums in parts}


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
