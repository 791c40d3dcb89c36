"""The full-precision model's predictions: computed once, kept as hidden states, and turned into logits by the head.

The head is read from the model file for each use and expanded by blocks of the vocabulary. So neither the head nor the
logits of a chunk are in memory as a whole. To read from the system's file cache costs little beside the multiplication.
"""

import dataclasses
import functools
import pathlib

import numpy as np
import numpy.typing as npt

from bitladder.engine import HiddenStates, Lane, Lanes, dequantize_into, versions
from bitladder.errors import BitladderError
from bitladder.evaluate.base.basefile import BaseFile, BaseHeader, Dtype, pack, unpack, write_header, write_record
from bitladder.evaluate.divergence import BaseRows, RowScores, refuse_broken, score_rows
from bitladder.evaluate.identity import Identity, MeasureOptions, decode
from bitladder.files import Closing, replacing, seal
from bitladder.gguf import GgufFile
from bitladder.keys import Algorithm
from bitladder.progress import SILENT, Progress
from bitladder.text import Chunks, Text, text_chunks
from bitladder.units import number_of

Floats = npt.NDArray[np.float32]
BIAS = "output.bias"
BASE = Algorithm(
    "base",
    (
        "final hidden states in the type of the head, with the NLL and the top token of each row",
        "what the graph does to the logits after the head (scale, soft cap, bias) is done again",
    ),
)
# Largest difference of head × state from the model's logits, as a share of their range. A head in floating point
# differs by the order of its sums. For a quantized head the library also rounds the input to 8 bits.
_TOLERANCE_EXACT = 2e-3
_TOLERANCE = 3e-2
# Weights of a block, about: a block and its logits fit into a core's cache. Fewer rows than the minimum are slow to
# multiply; more than the maximum do not fit into the scratch of `divergence`.
_WEIGHTS = 1 << 18
_MIN_ROWS, _MAX_ROWS = 256, 4096
# The library rounds the input of the head to the type of the head. States for a quantized head are kept as float32.
_DTYPES: dict[str, Dtype] = {"f16": "f16", "bf16": "bf16"}


@dataclasses.dataclass(frozen=True)
class AfterHead:
    """What is done to logits, in this order.

    Parameters:
        bias: what is added, float32 [vocabulary]; None for nothing.
        scale: the factor.
        cap: the soft cap; 0 for none.

    Example:
        >>> logits = np.array([[0.0, 40.0]], np.float32)
        >>> AfterHead(scale=0.5, cap=30.0).apply(logits, 0)
        >>> [round(float(logit), 2) for logit in logits[0]]
        [0.0, 17.48]
    """

    bias: Floats | None = None
    scale: float = 1.0
    cap: float = 0.0

    def apply(self, logits: Floats, start: int) -> None:
        """Changes logits in place: float32 [rows, block], the first of token `start`."""
        if self.bias is not None:
            logits += self.bias[start : start + logits.shape[1]]
        if self.scale != 1.0:
            logits *= np.float32(self.scale)
        if self.cap > 0:
            logits /= np.float32(self.cap)
            np.tanh(logits, out=logits)
            logits *= np.float32(self.cap)


def possible_after(model: Identity) -> list[AfterHead]:
    """What the graph of a model may do, by its metadata; no factor and no cap come first."""
    with GgufFile(model.path) as file:
        scale = _number(file, f"{model.architecture}.logit_scale")
        cap = _number(file, f"{model.architecture}.final_logit_softcapping")
        bias = _bias(file)
    scales = [1.0] if scale in (0.0, 1.0) else [1.0, scale, 1 / scale]
    caps = [0.0] if cap <= 0 else [0.0, cap]
    return [AfterHead(bias, factor, limit) for factor in scales for limit in caps]


def read_after(model: Identity, scale: float, cap: float) -> AfterHead:
    """A factor and a cap that are known, with the bias of the model file."""
    with GgufFile(model.path) as file:
        return AfterHead(_bias(file), scale, cap)


def _bias(file: GgufFile) -> Floats | None:
    tensor = file.tensors.get(BIAS)
    return file.read(tensor).reshape(-1).view(np.float32) if tensor and tensor.type.name == "f32" else None


def _number(file: GgufFile, key: str) -> float:
    """A finite number of the metadata; 0 if there is none."""
    value = file.get(key, 0.0)
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else 0.0


class Head(Closing):
    """The output matrix of a model file. Logits are hidden states × its transpose, float32.

    Parameters:
        model: the model file.
        after: what the graph does to the logits afterwards; None for nothing.
    """

    def __init__(self, model: Identity, after: AfterHead | None = None) -> None:
        self.tensor = model.head
        self.after = after or AfterHead()
        self.n_vocab = model.head.rows
        self.n_embd = model.head.width
        self.step = min(self.n_vocab, max(_MIN_ROWS, min(_WEIGHTS // self.n_embd, _MAX_ROWS)))
        self._file = GgufFile(model.path)
        self._buffers: dict[tuple[str, int], Floats] = {}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def apply(self, hidden: Floats) -> "HeadLogits":
        """The logits of hidden states, float32 [rows, n_embd]. Nothing is computed yet."""
        return HeadLogits(self, np.ascontiguousarray(hidden))

    def block(self, hidden: Floats, index: int, slot: int) -> tuple[int, Floats]:
        """A block of the logits of hidden states; see `HeadLogits.block`."""
        start = index * self.step
        stop = min(start + self.step, self.n_vocab)
        weights = self._buffer("weights", slot, stop - start, self.n_embd)
        dequantize_into(self._file.read(self.tensor, start, stop), self.tensor.type, weights)
        logits = self._buffer("logits", slot, len(hidden), stop - start)
        np.matmul(hidden, weights.T, out=logits)
        self.after.apply(logits, start)
        return start, logits

    def _buffer(self, kind: str, slot: int, rows: int, columns: int) -> Floats:
        buffer = self._buffers.get((kind, slot))
        if buffer is None or buffer.size < rows * columns:
            buffer = self._buffers[kind, slot] = np.empty(rows * columns, np.float32)
        return buffer[: rows * columns].reshape(rows, columns)


@dataclasses.dataclass(frozen=True)
class HeadLogits:
    """Logits of some hidden states, computed by blocks when they are needed (a `divergence.LogitBlocks`)."""

    head: Head
    hidden: Floats

    @property
    def count(self) -> int:
        """Blocks that make up the vocabulary."""
        return -(-self.head.n_vocab // self.head.step)

    def block(self, index: int, slot: int) -> tuple[int, Floats]:
        """The first token id of a block and its logits, float32 [rows, block].

        Several threads can call this if each has a `slot` of its own. The caller may write over the array, which is
        valid until the next call with that slot.
        """
        return self.head.block(self.hidden, index, slot)


class HiddenBase(Closing):
    """A base file with the head of the model that it was made of (a `token_scores.BasePredictions`)."""

    def __init__(self, file: BaseFile, model: Identity) -> None:
        self.file = file
        self.model = model
        header = file.header
        self.chunks = Chunks(file.tokens, header.bos, header.chunks_in_text, unscored=header.unscored)
        self._head = Head(model, read_after(model, header.logit_scale, header.logit_cap))

    @property
    def header(self) -> BaseHeader:
        """What the base was made of."""
        return self.file.header

    def close(self) -> None:
        """Closes the files."""
        self.file.close()
        self._head.close()

    def rows(self, chunk: int) -> BaseRows:
        """What is kept of a chunk's scored rows."""
        return self.file.rows(chunk)

    def logits(self, chunk: int, start: int, stop: int) -> HeadLogits:
        """Logits of a chunk's scored rows start … stop−1."""
        return self._head.apply(self.file.hidden(chunk)[start:stop])


@BASE.entry
def make_base(
    model: Identity, text: Text, out: pathlib.Path, settings: MeasureOptions, progress: Progress = SILENT
) -> None:
    """Runs the full-precision model over a text and writes a base file.

    Parameters:
        model: the full-precision model.
        text: the text to predict.
        out: the file to write; it is replaced when all is done.
        settings: how to decode, and how many chunks.
        progress: receives the progress.

    Raises:
        BitladderError: the text is too short, the model does not load, or its logits do not follow from head and hidden
            state in a way that is known here.
    """
    with settings.load(model.path) as loaded:
        chunks = text_chunks(loaded, text, settings.n_ctx, chunks=settings.chunks, unscored=settings.unscored)
        with (
            Lanes(loaded, settings, observer=lambda: HiddenStates(model.head.name)) as lanes,
            Head(model) as head,
        ):
            maker = _Maker(model, text, chunks, settings.gpu_layers != 0, lanes, head)
            dtype: Dtype = _DTYPES.get(model.head.type.name, "f32")
            try:
                maker.write(out, dtype, progress)
            except OverflowError:
                maker.write(out, "f32", progress)


@dataclasses.dataclass
class _Maker:
    """One pass of the model over the text, written chunk by chunk."""

    model: Identity
    text: Text
    chunks: Chunks
    gpu: bool
    lanes: Lanes
    head: Head

    def write(self, out: pathlib.Path, dtype: Dtype, progress: Progress) -> None:
        """Writes the whole base. Raises OverflowError if a hidden state is too large for the type."""
        count = len(self.chunks)
        label = f"Base of {self.model.name} over {self.text.name}"
        with progress.task(label, count) as task, replacing(out) as temporary:
            with temporary.open("wb") as stream:
                total = 0.0
                results = self.lanes.each(count, functools.partial(self._chunk, dtype))
                for chunk, (states, rows, difference) in enumerate(results):
                    if difference is not None:
                        write_header(stream, self._header(dtype, difference), self.chunks.tokens)
                    write_record(stream, states, rows)
                    total += float(rows.nll.mean())
                    task.note(f"PPL {np.exp(min(total / (chunk + 1), 700)):.4f}")
                    task.advance()
            seal(temporary)

    def _chunk(self, dtype: Dtype, lane: Lane, chunk: int) -> tuple[npt.NDArray[np.generic], BaseRows, float | None]:
        """A chunk's packed hidden states, what is kept of its rows, and of the first chunk what `_check` finds."""
        scores: list[RowScores] = []
        states: list[Floats] = []
        targets = self.chunks.targets(chunk)
        difference: float | None = None
        observer: HiddenStates = self.lanes.watching[lane.number]
        observer.take()
        for start, logits in decode(lane.context, self.chunks, chunk):
            hidden = observer.take()
            if len(hidden) != len(logits):
                raise BitladderError(
                    f"{self.model.name}: {number_of(len(logits), 'row')} of logits come from "
                    f"{number_of(len(hidden), 'hidden state')} of {self.model.head.name}; no divergence can be "
                    f"measured against a model of this architecture ({self.model.architecture})"
                )
            # Scored first: logits that are not finite are named as such, not as those of another head.
            scores.append(score_rows(logits, targets[start : start + len(logits)], lane.workers, what=self.model.name))
            if chunk == 0 and difference is None:
                difference = self._check(unpack(pack(hidden, dtype), dtype), logits)
            states.append(hidden)
        rows = BaseRows(
            np.concatenate([part.nll for part in scores]),
            np.concatenate([part.top for part in scores]),
            np.concatenate([part.top_logit for part in scores]),
        )
        refuse_broken(rows, self.model.name)
        return pack(np.concatenate(states), dtype), rows, difference

    def _check(self, hidden: Floats, logits: Floats) -> float:
        """The largest difference of head × state from the logits as a share of their range, over a few rows.

        Of what the graph may do after the head, the head takes what fits best.
        """
        rows = min(len(hidden), 32)
        span = float(logits[:rows].max() - logits[:rows].min()) or 1.0
        tried = [(self._difference(after, hidden[:rows], logits[:rows]), after) for after in possible_after(self.model)]
        # A NaN fits least.
        difference, self.head.after = min(tried, key=lambda pair: pair[0] if pair[0] == pair[0] else np.inf)
        tolerance = _TOLERANCE if self.model.head.type.quantized else _TOLERANCE_EXACT
        if not difference <= tolerance * span:
            raise BitladderError(
                f"{self.model.name}: the logits are not {self.model.head.name} × hidden state (they differ by up to "
                f"{difference:.3g} in a range of {span:.3g}): models of the architecture {self.model.architecture} "
                "change them afterwards in a way that is not known here, and no base can be kept for such a model; "
                "measure its perplexity without --base"
            )
        return difference / span

    def _difference(self, after: AfterHead, hidden: Floats, logits: Floats) -> float:
        """The largest difference of the logits that follow from hidden states from the model's own."""
        self.head.after = after
        product, difference = self.head.apply(hidden), 0.0
        for index in range(product.count):
            first, block = product.block(index, 0)
            block -= logits[:, first : first + block.shape[1]]
            difference = float(np.maximum(difference, np.abs(block).max()))  # which keeps a NaN
        return difference

    def _header(self, dtype: Dtype, difference: float) -> BaseHeader:
        model, chunks = self.model, self.chunks
        return BaseHeader(
            model=model.name,
            model_sha256=model.sha256,
            architecture=model.architecture,
            vocabulary=model.vocabulary,
            text=self.text.name,
            text_sha256=self.text.sha256,
            n_ctx=chunks.n_ctx,
            unscored=chunks.unscored,
            chunks=len(chunks),
            chunks_in_text=chunks.available,
            bos=chunks.bos,
            n_vocab=self.head.n_vocab,
            n_embd=self.head.n_embd,
            head=model.head.name,
            head_type=model.head.type.name,
            dtype=dtype,
            exact=not model.head.type.quantized,
            max_difference=difference,
            logit_scale=self.head.after.scale,
            logit_cap=self.head.after.cap,
            gpu=self.gpu,
            algorithms=BASE.versions(),
            llama_cpp_commit=versions()["llama_cpp_commit"],
        )
