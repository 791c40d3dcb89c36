"""llama-perplexity's file of log-probabilities (--kl-divergence-base), as stored.

Layout, little-endian: the magic "_logits_", n_ctx (u32), n_vocab and chunks (i32), the text's tokens (i32
[chunks, n_ctx], BOS not put in), then a record for each chunk. A record is one row for each scored position n_ctx/2 …
n_ctx−2: scale and floor (f32), one u16 per token of the vocabulary, and two bytes of padding if their number is odd.
A log-probability is scale × u16 + floor, natural; logits 16 or more below the row's largest lie on the floor.
"""

import dataclasses
import os
import pathlib
import struct

import numpy as np
import numpy.typing as npt

from bitladder.closing import Closing
from bitladder.engine.decoding import MIN_CTX
from bitladder.errors import BitladderError

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]
Codes = npt.NDArray[np.uint16]

MAGIC = b"_logits_"
HEAD = 4  # u16 in front of a row's codes: scale and floor
_START = struct.Struct("<8sIii")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a file begins with: `n_ctx` tokens per chunk, `n_vocab` tokens in the vocabulary, `chunks`."""

    n_ctx: int
    n_vocab: int
    chunks: int

    @property
    def scored(self) -> int:
        """Rows of a record: scored positions of a chunk."""
        return self.n_ctx - 1 - self.n_ctx // 2

    @property
    def row(self) -> int:
        """Numbers of 16 bits in a row, scale, floor and padding included."""
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
        """The bytes in front of the tokens."""
        return _START.pack(MAGIC, self.n_ctx, self.n_vocab, self.chunks)


def is_logits_file(path: pathlib.Path) -> bool:
    """Whether a file begins as llama-perplexity's files of log-probabilities do."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class LogitsFile(Closing):
    """An open file of log-probabilities. One record is in memory at a time.

    Raises BitladderError with one line if the file is not one, or is shorter or longer than it should be.
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
        self._record = np.empty((self.layout.scored, self.layout.row), "<u2")
        self._chunk: int | None = None  # whose record that is

    def _read_start(self) -> Layout:
        start = self._stream.read(_START.size)
        if start[: len(MAGIC)] != MAGIC:
            raise BitladderError(f"{self.path} is not a file of log-probabilities as llama-perplexity writes it")
        if len(start) < _START.size:
            raise BitladderError(f"{self.path} is truncated inside its header: make it again")
        _, n_ctx, n_vocab, chunks = _START.unpack(start)
        if n_ctx < MIN_CTX or n_vocab < 1 or chunks < 1:
            raise BitladderError(
                f"{self.path} has a damaged header ({chunks} chunks of {n_ctx} tokens, a vocabulary of {n_vocab}): "
                "make it again"
            )
        layout = Layout(n_ctx, n_vocab, chunks)
        size = os.fstat(self._stream.fileno()).st_size
        if size != layout.size:
            chunk = (size - layout.records) // layout.record + 1
            where = "after its last chunk" if size > layout.size else f"inside chunk {chunk} of {chunks}"
            where = "inside its tokens" if size < layout.records else where
            raise BitladderError(
                f"{self.path} has {size} bytes instead of {layout.size}: it is truncated or damaged {where}; "
                "make it again"
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
        """Close the file."""
        self._stream.close()

    def read(self, chunk: int) -> tuple[Codes, Floats, Floats]:
        """A chunk's codes uint16 [scored, n_vocab], scales and floors float32 [scored]; valid until the next chunk."""
        if chunk != self._chunk:
            self._chunk = None
            self._stream.seek(self.layout.records + chunk * self.layout.record)
            if self._stream.readinto(self._record.reshape(-1).view(np.uint8).data) != self.layout.record:
                raise BitladderError(f"{self.path} ends inside chunk {chunk + 1}: make it again")
            self._chunk = chunk
        head = np.ascontiguousarray(self._record[:, :HEAD]).view("<f4").astype(np.float32)
        return self._record[:, HEAD : HEAD + self.layout.n_vocab], head[:, 0], head[:, 1]
