"""The full-precision model's predictions: made once, kept as hidden states, and turned into logits when needed."""

import dataclasses
import pathlib
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from bitladder.closing import Closing
from bitladder.engine.context import Context
from bitladder.engine.native import versions
from bitladder.engine.observe import HiddenStates
from bitladder.errors import BitladderError
from bitladder.evaluate.base.basefile import BaseFile, Dtype, Header, pack, unpack, write_header, write_record
from bitladder.evaluate.base.head import Head, HeadLogits
from bitladder.evaluate.decode_chunks import Chunks, cut, decode
from bitladder.evaluate.divergence import BaseRows
from bitladder.evaluate.identity import Identity
from bitladder.evaluate.logit_rows import RowScores, Workers, score_rows
from bitladder.evaluate.settings import Settings
from bitladder.files import replacing
from bitladder.progress import SILENT, Progress
from bitladder.text.texts import Text

Floats = npt.NDArray[np.float32]

# How far head × state may be from the model's logits, as a share of their range: rounding in another order for float
# heads (whose input the library rounds as we do), 8-bit rounding of the input as well for quantized ones.
_TOLERANCE_EXACT = 2e-3
_TOLERANCE = 3e-2
# The library rounds the head's input to the type of the head; quantized heads have no such type of ours.
_DTYPES: dict[str, Dtype] = {"f16": "f16", "bf16": "bf16"}


class HiddenBase(Closing):
    """A base file together with the head of the model it was made of (a `divergence.Base`)."""

    def __init__(self, file: BaseFile, model: Identity) -> None:
        self.file = file
        self.model = model
        header = file.header
        self.chunks = Chunks(file.tokens, header.bos, header.chunks_in_text)
        self._head = Head(model)

    @property
    def header(self) -> Header:
        """What the base was made of."""
        return self.file.header

    def close(self) -> None:
        """Close the files."""
        self.file.close()
        self._head.close()

    def rows(self, chunk: int) -> BaseRows:
        """What is stored of a chunk's scored rows."""
        return self.file.rows(chunk)

    def logits(self, chunk: int, start: int, stop: int) -> HeadLogits:
        """Logits of a chunk's scored rows start…stop."""
        return self._head.apply(self.file.hidden(chunk)[start:stop])


def make_base(model: Identity, text: Text, out: pathlib.Path, settings: Settings, progress: Progress = SILENT) -> None:
    """Run the full-precision model over a text and write a base file.

    Parameters: `out` the file, replaced only when all is done. Raises BitladderError if the text is too short, if the
    model does not load, or if its logits are not the product of head and hidden state (it scales or caps them).
    """
    threads = settings.threads
    with settings.load(model.path) as loaded:
        pieces = cut(loaded, text, settings)
        observer = HiddenStates(model.head.name)
        context = settings.context(loaded, observer)
        with context, Workers(threads) as workers, Head(model) as head:
            maker = _Maker(model, text, pieces, context, observer, head, workers)
            wanted: Dtype = _DTYPES.get(model.head.type.name, "f32")
            try:
                maker.write(out, wanted, progress)
            except OverflowError:
                maker.write(out, "f32", progress)


@dataclasses.dataclass
class _Maker:
    """One pass of the model over the text, written out chunk by chunk."""

    model: Identity
    text: Text
    chunks: Chunks
    context: Context
    observer: HiddenStates
    head: Head
    workers: Workers

    def write(self, out: pathlib.Path, dtype: Dtype, progress: Progress) -> None:
        """Write the whole base. Raises OverflowError if a hidden state is too large for the type."""
        count = len(self.chunks)
        label = f"Base of {self.model.name} over {self.text.name}"
        with progress.task(label, count) as task, replacing(out) as temporary, temporary.open("wb") as stream:
            total = 0.0
            for chunk in range(count):
                total += self._chunk(stream, chunk, dtype)
                task.note(f"PPL {np.exp(min(total / (chunk + 1), 700)):.4f}")
                task.advance()

    def _chunk(self, stream: BinaryIO, chunk: int, dtype: Dtype) -> float:
        scores: list[RowScores] = []
        states: list[Floats] = []
        targets = self.chunks.targets(chunk)
        difference: float | None = None
        self.observer.take()
        for start, logits in decode(self.context, self.chunks, chunk):
            hidden = self.observer.take()
            if len(hidden) != len(logits):
                raise BitladderError(
                    f"{self.model.name}: {len(logits)} rows of logits come from {len(hidden)} hidden states of "
                    f"{self.model.head.name}; no divergence can be measured against a model of this architecture "
                    f"({self.model.architecture})"
                )
            if chunk == 0 and difference is None:
                difference = self._check(unpack(pack(hidden, dtype), dtype), logits)
            scores.append(score_rows(logits, targets[start : start + len(logits)], self.workers, what=self.model.name))
            states.append(hidden)
        if difference is not None:
            write_header(stream, self._header(dtype, difference), self.chunks.tokens)
        rows = BaseRows(
            np.concatenate([part.nll for part in scores]),
            np.concatenate([part.top for part in scores]),
            np.concatenate([part.top_logit for part in scores]),
        )
        write_record(stream, pack(np.concatenate(states), dtype), rows)
        return float(rows.nll.mean())

    def _check(self, hidden: Floats, logits: Floats) -> float:
        """The largest difference of head × state from the logits as a share of their range, over a few rows."""
        rows = min(len(hidden), 32)
        span = float(logits[:rows].max() - logits[:rows].min()) or 1.0
        product = self.head.apply(hidden[:rows])
        difference = 0.0
        for index in range(product.count):
            first, block = product.block(index, 0)
            block -= logits[:rows, first : first + block.shape[1]]
            difference = max(difference, float(np.abs(block).max()))
        tolerance = _TOLERANCE if self.model.head.type.quantized else _TOLERANCE_EXACT
        if not difference <= tolerance * span:
            raise BitladderError(
                f"{self.model.name}: the logits are not {self.model.head.name} × hidden state (they differ by up to "
                f"{difference:.3g} in a range of {span:.3g}): models of the architecture {self.model.architecture} "
                "change them afterwards (scale, soft cap or bias), and no base can be kept for such a model; "
                "perplexity without --base still works"
            )
        return difference / span

    def _header(self, dtype: Dtype, difference: float) -> Header:
        model, chunks = self.model, self.chunks
        return Header(
            model=model.name,
            model_sha256=model.sha256,
            architecture=model.architecture,
            vocabulary=model.vocabulary,
            text=self.text.name,
            text_sha256=self.text.sha256,
            n_ctx=chunks.n_ctx,
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
            llama_cpp_commit=versions()["llama_cpp_commit"],
        )
