"""llama-perplexity's file of log-probabilities (--kl-divergence-base): read, and written with the same bytes.

Layout, little-endian: the magic "_logits_", n_ctx (u32), n_vocab and chunks (i32), the tokens of the text (i32
[chunks, n_ctx], without BOS), then a record for each chunk. A record has one row for each scored position n_ctx/2 …
n_ctx−2: scale and floor (f32), one u16 for each token of the vocabulary, and two bytes of padding if n_vocab is odd. A
natural log-probability is scale × u16 + floor. Logits 16 or more below the row's largest are stored as the floor.
"""

import dataclasses
import os
import pathlib
import shutil
import struct
import threading

import numpy as np
import numpy.typing as npt

from bitladder.engine import MIN_CTX, Lane, Lanes, Workers
from bitladder.errors import BitladderError
from bitladder.evaluate.divergence import score_rows
from bitladder.evaluate.identity import MeasureOptions, decode
from bitladder.files import Closing, replacing
from bitladder.progress import SILENT, Progress
from bitladder.text import Text, text_chunks
from bitladder.units import number_of

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int32]
Codes = npt.NDArray[np.uint16]

MAGIC = b"_logits_"
HEAD = 4  # numbers of 16 bits before the codes of a row: scale and floor
_START = struct.Struct("<8sIii")
# Logits this far below the largest of a row, or farther, are stored alike.
_DEPTH = np.float32(16)
_LARGEST = np.float32(65535)


@dataclasses.dataclass(frozen=True)
class LogitsLayout:
    """The sizes of a file: tokens of a chunk, tokens of the vocabulary, and chunks."""

    n_ctx: int
    n_vocab: int
    chunks: int

    @property
    def scored(self) -> int:
        """Rows of a record: scored positions of a chunk."""
        return self.n_ctx - 1 - self.n_ctx // 2

    @property
    def row(self) -> int:
        """Numbers of 16 bits in a row, with scale, floor and padding."""
        return HEAD + self.n_vocab + self.n_vocab % 2

    @property
    def records(self) -> int:
        """Where the records begin."""
        return _START.size + 4 * self.chunks * self.n_ctx

    @property
    def record(self) -> int:
        """Bytes of a record."""
        return 2 * self.row * self.scored

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.records + self.chunks * self.record

    def start(self) -> bytes:
        """The bytes before the tokens."""
        return _START.pack(MAGIC, self.n_ctx, self.n_vocab, self.chunks)


def is_logits_file(path: pathlib.Path) -> bool:
    """Whether a file begins with the magic of llama-perplexity's files of log-probabilities."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class LogitsFile(Closing):
    """An open file of log-probabilities. One record is in memory at a time.

    Raises:
        BitladderError: the file cannot be read, is not such a file, or has a wrong length or a damaged header.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            self._stream = path.open("rb")
        except OSError as error:
            raise BitladderError(f"cannot read the log-probabilities {path}: {error.strerror}") from error
        try:
            self.layout = self._read_start()
            self.tokens = self._read_tokens()
        except BaseException:
            self._stream.close()
            raise
        self._last = threading.local()  # each thread has a record, and the number of its chunk

    def _read_start(self) -> LogitsLayout:
        start = self._stream.read(_START.size)
        if start[: len(MAGIC)] != MAGIC:
            raise BitladderError(f"{self.path} is not a file of log-probabilities as llama-perplexity writes it")
        if len(start) < _START.size:
            raise BitladderError(f"{self.path} is truncated inside its header: make it again")
        _, n_ctx, n_vocab, chunks = _START.unpack(start)
        if n_ctx < MIN_CTX or n_vocab < 1 or chunks < 1:
            raise BitladderError(
                f"{self.path} has a damaged header ({number_of(chunks, 'chunk')} of {n_ctx} tokens, a vocabulary of "
                f"{n_vocab}): make it again"
            )
        layout = LogitsLayout(n_ctx, n_vocab, chunks)
        size = os.fstat(self._stream.fileno()).st_size
        if size != layout.size:
            chunk = (size - layout.records) // layout.record + 1
            where = "after its last chunk" if size > layout.size else f"inside chunk {chunk} of {chunks}"
            where = "inside its tokens" if size < layout.records else where
            raise BitladderError(
                f"{self.path} has {number_of(size, 'byte')} instead of {layout.size:,}: it is truncated or damaged "
                f"{where}; make it again"
            )
        return layout

    def _read_tokens(self) -> Tokens:
        shape = self.layout.chunks, self.layout.n_ctx
        tokens = np.frombuffer(self._stream.read(4 * shape[0] * shape[1]), "<i4").astype(np.int32).reshape(shape)
        wrong = np.argwhere((tokens < 0) | (tokens >= self.layout.n_vocab))
        if len(wrong):
            chunk, position = wrong[0]
            raise BitladderError(
                f"{self.path}: token {position} of chunk {chunk + 1} is {tokens[chunk, position]}, but the vocabulary "
                f"has {self.layout.n_vocab}: the file is damaged; make it again"
            )
        return tokens

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def read(self, chunk: int) -> tuple[Codes, Floats, Floats]:
        """A chunk's codes, uint16 [scored, n_vocab], its scales and floors, float32 [scored].

        They are valid until the same thread reads another chunk.
        """
        last = self._last
        if chunk != getattr(last, "chunk", None):
            if not hasattr(last, "record"):
                last.record = np.empty((self.layout.scored, self.layout.row), "<u2")
            last.chunk = None
            view, start = last.record.reshape(-1).view(np.uint8).data, self.layout.records + chunk * self.layout.record
            while view:
                if not (count := os.preadv(self._stream.fileno(), [view], start)):
                    raise BitladderError(f"{self.path} ends inside chunk {chunk + 1}: make it again")
                view, start = view[count:], start + count
            last.chunk = chunk
        record: Codes = last.record
        head = np.ascontiguousarray(record[:, :HEAD]).view("<f4").astype(np.float32)
        return record[:, HEAD : HEAD + self.layout.n_vocab], head[:, 0], head[:, 1]


def write_logits_file(
    model: pathlib.Path, text: Text, out: pathlib.Path, settings: MeasureOptions, progress: Progress = SILENT
) -> Doubles:
    """Runs the full-precision model over a text and writes its log-probabilities.

    Parameters:
        model: the full-precision GGUF.
        text: the text to predict.
        out: the file to write; it is replaced when all is done. It has 2 bytes for each token of the vocabulary and
            each scored position.
        settings: how to decode, and how many chunks.
        progress: receives the progress.

    Returns:
        The negative log-likelihood of every scored token, nats, float64 [chunks × scored].

    Raises:
        BitladderError: the text is too short, the model does not load, its logits are not finite, or the disk has too
            little room.
    """
    with settings.load(model) as loaded:
        chunks = text_chunks(loaded, text, settings.n_ctx, chunks=settings.chunks)
        layout = LogitsLayout(chunks.n_ctx, loaded.n_vocab, len(chunks))
        _check_room(out, layout.size)
        nll = np.empty((len(chunks), chunks.scored))
        label = f"Log-probabilities of {model.name} over {text.name}"
        with (
            Lanes(loaded, settings) as lanes,
            progress.task(label, len(chunks)) as task,
            replacing(out) as temporary,
            temporary.open("wb") as stream,
        ):
            stream.write(layout.start() + chunks.tokens.astype("<i4").tobytes())

            def score(lane: Lane, chunk: int) -> list[Codes]:
                targets, packed = chunks.targets(chunk), []
                for start, logits in decode(lane.context, chunks, chunk):
                    part = slice(start, start + len(logits))
                    nll[chunk, part] = score_rows(logits, targets[part], lane.workers, what=model.name).nll
                    packed.append(pack_rows(logits, lane.workers))
                return packed

            for chunk, packed in enumerate(lanes.each(len(chunks), score)):
                for rows in packed:
                    stream.write(rows.data)
                task.note(f"PPL {np.exp(min(nll[: chunk + 1].mean(), 700)):.4f}")
                task.advance()
    return nll.reshape(-1)


def pack_rows(logits: Floats, workers: Workers) -> Codes:
    """Rows of logits, float32 [rows, n_vocab], as a record holds them, uint16 [rows, row].

    The arithmetic is llama-perplexity's, so the bytes are the same: single precision, and double precision for the sum
    of exponentials.
    """
    rows, n_vocab = logits.shape
    packed = np.zeros((rows, LogitsLayout(0, n_vocab, 0).row), "<u2")

    def work(row: int, _slot: int) -> None:
        values = logits[row]
        largest = values.max()
        least = max(values.min(), largest - _DEPTH)
        # The C library rounds expf correctly and NumPy does not, so exp is computed in double precision and rounded.
        total = np.exp(values - largest, dtype=np.float64).astype(np.float32).sum(dtype=np.float64)
        scale = (largest - least) / _LARGEST
        packed[row, :HEAD] = np.array([scale, least - largest - np.float32(np.log(total))], "<f4").view("<u2")
        if scale > 0:
            steps = np.maximum(values - least, np.float32(0)) * (np.float32(1) / scale)
            packed[row, HEAD : HEAD + n_vocab] = np.rint(steps)

    workers.run(rows, work)
    return packed


def _check_room(out: pathlib.Path, needed: int) -> None:
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BitladderError(
            f"{out} needs {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free; use fewer --chunks or "
            "another disk"
        )
