"""Passes over the chunks: each collects the parts that fit into memory together, and leaves them in a folder."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.collect_imatrix import Collector
from bitladder.calibrate.imatrix import Entry as ImatrixEntry
from bitladder.calibrate.imatrix import Imatrix, write_imatrix
from bitladder.calibrate.inputs import Input
from bitladder.calibrate.moments.collector import Adding, MomentCollector, WithImatrix, decode_chunks
from bitladder.calibrate.moments.entries import Entry, Part
from bitladder.calibrate.moments.moments_file import Floats, Provenance, Shape, triangle
from bitladder.calibrate.unfinished import Keep
from bitladder.engine.model import Model, Tokens
from bitladder.files import sha256_bytes
from bitladder.gguf.names import in_main_block
from bitladder.progress import Progress

IMATRIX = "imatrix.gguf"


class ImatrixBeside:
    """The importance matrix that is collected in the first pass, and kept in the folder then."""

    def __init__(self, inputs: Sequence[Input], datasets: list[str], process_output: bool) -> None:
        self.collector = Collector(process_output)
        self.inputs = inputs
        self._datasets = datasets
        # Made here, and not when an input comes, so that a state can be read into them.
        for one in inputs:
            for name in one.names:
                if in_main_block(name) or (process_output and name == "output.weight"):
                    shape = (one.matrices, one.width) if one.experts else (1, one.matrices * one.width)
                    self.collector.entries[name] = ImatrixEntry(np.zeros(shape), np.zeros(shape[0], np.int64))

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """The arrays that grow, by name."""
        entries = self.collector.entries.items()
        return {
            f"imatrix {name} {part}": getattr(entry, part) for name, entry in entries for part in ("sums", "counts")
        }

    def write(self, keep: Keep, n_ctx: int) -> None:
        """Keep what was collected; a weight without any input (too few tokens at once) is left out."""
        entries = {name: entry for name, entry in self.collector.entries.items() if entry.counts.any()}
        chunks = max((int(entry.counts.max()) for entry in entries.values()), default=0) // n_ctx
        write_imatrix(Imatrix(entries, self._datasets, chunks, n_ctx), keep.path(IMATRIX))


def run_passes(
    model: Model,
    chunks: Tokens,
    passes: Sequence[Sequence[Part]],
    keep: Keep,
    imatrix: ImatrixBeside | None,
    *,
    n_ubatch: int,
    threads: int | None,
    progress: Progress,
) -> dict[str, Adding]:
    """Do what is not kept yet. Returns the parts of the last pass by label: only those are not in the folder."""
    adding: list[Adding] = []
    with progress.task("second moments", len(passes) * len(chunks)) as bar:
        for number, parts in enumerate(passes):
            missing = [part for part in parts if not keep.has(part.label)]
            beside = imatrix if imatrix and not keep.has(IMATRIX) else None
            if not missing and not beside:
                bar.advance(len(chunks))
                continue
            bar.note(f"pass {number + 1} of {len(passes)}" if len(passes) > 1 else "")
            collector = MomentCollector(missing)
            state = dict(pair for one in collector.adding for pair in one.state())
            if beside:
                state |= beside.state()
            label = sha256_bytes("\n".join(state).encode())
            done = keep.load_state(label, state, progress)
            bar.advance(done)
            observer = WithImatrix(collector, beside.collector, beside.inputs) if beside else collector
            for read in decode_chunks(model, chunks, observer, done=done, n_ubatch=n_ubatch, threads=threads):
                bar.advance()
                if keep.due():
                    keep.save_state(label, read, state)
            if beside:
                beside.write(keep, chunks.shape[1])
            adding = collector.adding
            if number < len(passes) - 1:
                for one in adding:
                    _keep_part(keep, one)
                adding = []
    return {one.part.label: one for one in adding}


def _keep_part(keep: Keep, adding: Adding) -> None:
    part = adding.part
    keep.put(f"{part.label}.counts", adding.counts)
    keep.put_rows(part.label, (part.stop - part.start, triangle(part.entry.input.width)), adding.packed())


class Collected:
    """What the passes gave, as a source of moments (see assemble): some of it in memory, the rest in the folder."""

    def __init__(
        self,
        passes: Sequence[Sequence[Part]],
        memory: Mapping[str, Adding],
        keep: Keep,
        provenance: Provenance,
    ) -> None:
        self.provenance = provenance
        self._parts: dict[str, list[Part]] = {}
        self._entries: dict[str, Entry] = {}
        for part in (part for parts in passes for part in parts):
            self._parts.setdefault(part.entry.name, []).append(part)
            self._entries |= dict.fromkeys(part.entry.names, part.entry)
        self._memory = memory
        self._keep = keep

    def names(self) -> list[str]:
        """Weights, in the order of the computation."""
        return list(self._entries)

    def entry(self, name: str) -> str:
        """The weight under whose name an entry is kept."""
        return self._entries[name].name

    def shape(self, name: str) -> Shape:
        """How large it is."""
        entry = self._entries[name]
        return Shape(entry.input.matrices, entry.input.width)

    def counts(self, name: str) -> npt.NDArray[np.int64]:
        """Tokens seen by each matrix."""
        found = []
        for part in self._parts[self.entry(name)]:
            adding = self._memory.get(part.label)
            found.append(adding.counts if adding else self._keep.get(f"{part.label}.counts"))
        return np.concatenate(found)

    def packed(self, name: str, matrix: int = 0) -> Floats:
        """The mean of one matrix, packed."""
        part = next(part for part in self._parts[self.entry(name)] if part.start <= matrix < part.stop)
        index = matrix - part.start
        adding = self._memory.get(part.label)
        if adding:
            return adding.sums[index].packed(int(adding.counts[index]))
        return np.asarray(self._keep.get(part.label)[index])

    def packed_outputs(self, name: str) -> Floats | None:
        """Nothing is known of outputs."""
        return None
