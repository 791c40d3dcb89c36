"""Collects an importance matrix: decodes texts, watches every multiplication, and adds up the squares of its inputs.

Which inputs count follows llama-imatrix: weights of blocks (and the output head on request), dense inputs of at least
16 tokens, experts token by token.
"""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.coverage import Counts, ExpertCounts, coverage_warning, covered, expert_counts
from bitladder.calibrate.imatrix import Imatrix, ImatrixEntry, read_imatrix, write_imatrix, zeros_in
from bitladder.calibrate.inputs import (
    MIN_CALIBRATION_CTX,
    Experts,
    Floats,
    WeightInput,
    decode_columns,
    model_inputs,
    refuse_not_finite,
    refuse_short,
)
from bitladder.calibrate.unfinished import UnfinishedWork, job_key
from bitladder.engine import Decoding, Lane, Lanes, Model, Multiplication, Tokens, lane_count, main_memory
from bitladder.errors import UsageError
from bitladder.gguf import in_main_block
from bitladder.keys import Algorithm
from bitladder.options import Options, option
from bitladder.progress import SILENT, Progress
from bitladder.text import Reading, Text

IMATRIX = Algorithm(
    "imatrix",
    (
        "sums of squared inputs by column, as llama-imatrix adds them up",
        "the mean of the other experts stands in for one that no token reached",
    ),
)

LOGITS_SHARE = 1 / 16  # of main memory, that the logits of a batch may take beside those of another
COVERING = "covering.chunks"  # the piece that has the chunks after which experts have their tokens


@dataclasses.dataclass(frozen=True)
class ImatrixOptions(Options):
    """What an importance matrix covers, and the format of its file."""

    process_output: bool = option(False, "--process-output", help="Collect the importance of output.weight too.")
    form: Literal["gguf", "dat"] = option("gguf", "--output-format", help="Format of the file.")


@dataclasses.dataclass(frozen=True)
class ImatrixResult:
    """What was written.

    Parameters:
        path: the file.
        entries: weights that it covers.
        chunks: chunks that were read.
        gaps: experts that no token reached, by weight.
    """

    path: pathlib.Path
    entries: int
    chunks: int
    gaps: dict[str, list[int]]


class Squares(NamedTuple):
    """The sums of squares of an input over the tokens of one computation.

    Parameters:
        weight: the weight.
        expert: the expert; None for all matrices.
        squares: float32 [1, matrices × n_in], of an expert [n_in].
        tokens: their number.
    """

    weight: str
    expert: int | None
    squares: Floats
    tokens: int


class BatchSquares:
    """An observer that keeps the squares of the inputs of one batch, for sums that are made of several batches.

    Parameters:
        wanted: the weights.
    """

    def __init__(self, wanted: Collection[str]) -> None:
        self._wanted = wanted
        self._parts: list[Squares] = []
        self._shared: tuple[int, str, Floats] | None = None

    def wants(self, seen: Multiplication) -> bool:
        """Whether a multiplication counts. A dense input of fewer than 16 tokens does not."""
        return seen.weight in self._wanted and (seen.experts or seen.tokens >= MIN_CALIBRATION_CTX)

    def see(self, seen: Multiplication, inputs: Floats, experts: Experts | None) -> None:
        """Keeps the squares of these inputs."""
        if experts is None:
            matrices = seen.shape[2] * seen.shape[3]
            squares = self._squares(seen, inputs, matrices).reshape(1, -1)
            self._parts.append(Squares(seen.weight, None, squares, inputs.shape[0] * inputs.shape[1] // matrices))
            return
        for expert in np.unique(experts):
            tokens, slots = np.nonzero(experts == expert)
            rows = inputs[tokens, slots % inputs.shape[1]]
            squares = np.einsum("ij,ij->j", rows, rows)
            refuse_not_finite(seen, squares)
            self._parts.append(Squares(seen.weight, int(expert), squares, len(tokens)))

    def _squares(self, seen: Multiplication, inputs: Floats, matrices: int) -> Floats:
        # Q, K and V multiply the same input one after the other, and so do gate and up: it is squared once.
        if self._shared and self._shared[0] == seen.input_id and self._shared[1] != seen.weight:
            return self._shared[2]
        sums = np.zeros((matrices, inputs.shape[2]), np.float32)
        for index, matrix in enumerate(inputs):
            sums[index % matrices] += np.einsum("ij,ij->j", matrix, matrix)
        refuse_not_finite(seen, sums)
        self._shared = (seen.input_id, seen.weight, sums)
        return sums

    def take(self) -> list[Squares]:
        """What was kept since the last call."""
        parts, self._parts = self._parts, []
        return parts


class ImatrixSums:
    """The sums of all batches, float64, so that no token is lost in them. Those of one computation are float32."""

    label = "imatrix"

    def __init__(self, inputs: Sequence[WeightInput], process_output: bool = False) -> None:
        self.entries: dict[str, ImatrixEntry] = {}
        # All sums are there from the start, so that the state of interrupted work can be read into them.
        for shared in inputs:
            for name in shared.names:
                if in_main_block(name) or (process_output and name == "output.weight"):
                    columns = shared.matrices * shared.width
                    shape = (shared.matrices, shared.width) if shared.experts else (1, columns)
                    self.entries[name] = ImatrixEntry(np.zeros(shape), np.zeros(shape[0], np.int64), shared.experts)

    def observer(self) -> BatchSquares:
        """An observer whose squares can be added."""
        return BatchSquares(self.entries)

    def add(self, parts: Sequence[Squares]) -> None:
        """Adds what an observer kept."""
        for part in parts:
            entry, place = self.entries[part.weight], slice(None) if part.expert is None else part.expert
            entry.sums[place] += part.squares
            entry.counts[place] += part.tokens

    @property
    def counts(self) -> dict[str, Counts]:
        """The tokens of each expert, int64 [experts], by weight."""
        return {name: entry.counts for name, entry in self.entries.items() if len(entry.counts) > 1}

    def state(self) -> dict[str, npt.NDArray[np.generic]]:
        """The arrays that grow, by name."""
        return {
            f"imatrix {name} {part}": getattr(entry, part)
            for name, entry in self.entries.items()
            for part in ("sums", "counts")
        }

    def imatrix(self, datasets: list[str], n_ctx: int) -> Imatrix:
        """What was collected from chunks of `n_ctx` tokens. A weight without any input is left out."""
        entries = {name: entry for name, entry in self.entries.items() if entry.counts.any()}
        chunks = max((int(entry.counts.max()) for entry in entries.values()), default=0) // n_ctx
        return Imatrix(entries, datasets, chunks, n_ctx)


@IMATRIX.entry
def collect_imatrix(
    model: str | os.PathLike[str],
    texts: Sequence[Text],
    out: str | os.PathLike[str],
    *,
    reading: Reading | None = None,
    decoding: Decoding | None = None,
    options: ImatrixOptions | None = None,
    in_files: Sequence[str | os.PathLike[str]] = (),
    progress: Progress = SILENT,
) -> ImatrixResult:
    """Collects the importance matrix of a model over some texts and writes it.

    The sums are kept in the folder `out`.parts each minute. A call that was interrupted continues from there.

    Parameters:
        model: path of a full-precision GGUF.
        texts: the calibration texts, at least one.
        out: path of the file to write.
        reading: which chunks of each text are read; None reads all. The first chunks (`spread=False`) are what
            llama-imatrix reads.
        decoding: chunks of `n_ctx` tokens; as many in a batch as `n_batch` tokens hold.
        options: what the matrix covers, and its format.
        in_files: matrices to add.
        progress: hears of the work.

    Raises:
        BitladderError: a text is too short, a value is not finite, or a file is of another model.
        UsageError: there is no text, or chunks or batches are shorter than MIN_CALIBRATION_CTX tokens.
    """
    reading, decoding, options = reading or Reading(), decoding or Decoding(), options or ImatrixOptions()
    refuse_short({"-c": decoding.n_ctx, "-b": decoding.n_batch, "-ub": decoding.n_ubatch})
    if not texts:
        raise UsageError("an importance matrix needs a text: pass -f")
    out = pathlib.Path(out)
    total = _sum(in_files, decoding.n_ctx)
    settings = [reading, decoding, decoding.n_batch, decoding.n_ubatch, options]
    work = UnfinishedWork(out, job_key(model, texts, IMATRIX, settings=settings))
    with Model(model, gpu_layers=decoding.gpu_layers) as loaded:
        sums = ImatrixSums(model_inputs(loaded, decoding.threads), options.process_output)
        read = _decode(loaded, texts, reading, sums, decoding, options.process_output, work, progress)
    total.add(sums.imatrix([text.name for text in texts], decoding.n_ctx))
    result = _write(total, out, options.form, len(read), reading.expert_coverage, progress)
    work.remove()
    return result


def merge_imatrices(
    out: str | os.PathLike[str],
    in_files: Sequence[str | os.PathLike[str]],
    *,
    n_ctx: int = 512,
    form: Literal["gguf", "dat"] = "gguf",
    progress: Progress = SILENT,
) -> ImatrixResult:
    """Writes the sum of some importance matrices.

    Parameters:
        out: path of the file to write.
        in_files: the matrices, of one model.
        n_ctx: tokens of a chunk, as the file will say; a .dat file does not tell its own.
        form: format of the file.
        progress: hears of gaps.

    Raises:
        BitladderError: there is no file to merge, or the files are of different models.
    """
    if not in_files:
        raise UsageError("nothing to do: give a text (-f) or matrices to merge (--in-file)")
    total = _sum(in_files, n_ctx)
    return _write(total, pathlib.Path(out), form, total.chunk_count, None, progress)


def _sum(in_files: Sequence[str | os.PathLike[str]], n_ctx: int) -> Imatrix:
    total = Imatrix({}, [], 0, n_ctx)
    for path in in_files:
        total.add(read_imatrix(path))
    return total


def _write(
    imatrix: Imatrix, out: pathlib.Path, form: str, chunks: int, wanted: int | None, progress: Progress
) -> ImatrixResult:
    gaps = imatrix.gaps()
    tokens = max((int(entry.counts.max()) for entry in imatrix.entries.values()), default=0)
    write_imatrix(imatrix, out, form)
    if warning := coverage_warning(expert_counts(imatrix), tokens, wanted):
        progress.warn(warning)
    if zeros := zeros_in(imatrix, imatrix.entries):
        progress.warn(zeros)
    return ImatrixResult(out, len(imatrix.entries), chunks, gaps)


def covering_chunks(
    model: Model,
    texts: Sequence[Text],
    reading: Reading,
    inputs: Sequence[WeightInput],
    decoding: Decoding,
    work: UnfinishedWork,
    progress: Progress,
) -> list[Tokens]:
    """The chunks that `reading` names, and those after which each expert has the tokens that it wants.

    They are decoded once to count the tokens of each expert, unless nothing is wanted.

    Parameters:
        model: the loaded model.
        texts: the texts.
        reading: which chunks are read at least, and how many tokens each expert should have.
        inputs: the inputs of the model's weights.
        decoding: how chunks are decoded.
        work: keeps the state.
        progress: hears of the work.

    Returns:
        Those of each text, int32 [chunks, n_ctx]. What experts want beyond `reading` is with the last.
    """
    rows = reading.rows_by_text(model, texts, decoding.n_ctx)
    if reading.expert_coverage is None or not any(shared.experts for shared in inputs):
        return rows
    if not work.has(COVERING):
        work.put(COVERING, _decode(model, texts, reading, ExpertCounts(inputs), decoding, False, work, progress))
    further = work.get(COVERING)[sum(map(len, rows)) :]
    return [*rows[:-1], np.concatenate([rows[-1], further])]


def _decode(
    model: Model,
    texts: Sequence[Text],
    reading: Reading,
    sums: ImatrixSums | ExpertCounts,
    decoding: Decoding,
    head: bool,
    work: UnfinishedWork,
    progress: Progress,
) -> Tokens:
    """Decodes the chunks that are not in the state of interrupted work. Returns all that were decoded."""
    n_ctx = decoding.n_ctx
    chunks = reading.rows(model, texts, n_ctx)
    least = len(chunks)
    if reading.expert_coverage is not None:
        chunks = np.concatenate([chunks, reading.further(model, texts, n_ctx)])
    side_by_side = max(1, decoding.n_batch // n_ctx)
    step = min(decoding.n_batch, n_ctx)
    state = sums.state()
    done = work.load_state(sums.label, state, progress)
    # What is read for the experts is read chunk by chunk, so that batches do not decide how much it is.
    starts = [*range(done, least, side_by_side), *range(max(done, least), len(chunks))]
    batches = [chunks[start : min(start + side_by_side, least) if start < least else start + 1] for start in starts]

    def read(lane: Lane, number: int) -> Any:
        lane.context.clear()
        for first in range(0, n_ctx, step):
            decode_columns(lane.context, batches[number], first, min(first + step, n_ctx))
        return lanes.watching[lane.number].take()

    def enough() -> bool:
        return done >= least and covered(sums.counts.values(), reading.expert_coverage or 0)

    whole_batches = decoding.replace(n_batch=side_by_side * step)
    most = batches_at_once(whole_batches, model.n_vocab)
    with (
        Lanes(model, whole_batches, n_seq=side_by_side, observer=sums.observer, skip_head=not head, most=most) as lanes,
        progress.task(sums.label, len(chunks)) as bar,
    ):
        bar.advance(done)
        for batch, parts in zip(batches, lanes.each(0 if enough() else len(batches), read), strict=False):
            sums.add(parts)
            done += len(batch)
            bar.advance(len(batch))
            if work.due():
                work.save_state(sums.label, done, state)
            if enough():
                break
        bar.advance(len(chunks) - done)
    return chunks[:done]


def batches_at_once(decoding: Decoding, n_vocab: int) -> int:
    """Batches that are decoded at once. The library makes room for the logits of each, which nobody computes.

    Parameters:
        decoding: how they are decoded.
        n_vocab: tokens of the vocabulary.
    """
    return lane_count(decoding) if 4 * decoding.n_batch * n_vocab <= main_memory() * LOGITS_SHARE else 1
