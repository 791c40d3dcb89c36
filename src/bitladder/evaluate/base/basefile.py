"""The base file: what the full-precision model predicts, kept as its final hidden states.

Layout: the magic, the length of the header (u64, little-endian), the header (JSON, padded to 64 bytes), the tokens
(int32 [chunks, n_ctx]), then one record for each chunk. A record has the hidden states [scored, n_embd] as `dtype`,
and for each scored position the NLL (float32), the likeliest token (int32) and its logit (float32). The end
is the seal of the file (`files.seal`).

Hidden states are dozens of times smaller than log-probabilities of the whole vocabulary. The library rounds the input
of the head to the type of the head; states kept in that type lose nothing.
"""

import os
import pathlib
import struct
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import pydantic

from bitladder.errors import BitladderError
from bitladder.evaluate.divergence import BaseRows
from bitladder.files import SEAL, check_seal
from bitladder.units import number_of

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]
Dtype = Literal["f16", "bf16", "f32"]

KIND = b"BLBASE"
MAGIC = KIND + b"02"
BASE_FORMAT = MAGIC.decode()
_STORED: dict[str, type[np.generic]] = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}


class BaseHeader(pydantic.BaseModel):
    """What a base was made of. Names are without folders, hashes are SHA-256 in hexadecimal digits.

    Parameters:
        unscored: how many predictions at the start of a chunk are not scored; None for those of its first half.
        chunks: chunks in the file; `chunks_in_text` are those of the whole text.
        bos: the token that replaced the first one of each chunk; None if none did.
        head: name of the tensor that makes logits of hidden states.
        exact: the states are the very numbers that the library multiplied by the head.
        max_difference: of head × state from the model's own logits in the first chunk, as a share of their range.
        logit_scale: the factor of the logits after the head.
        logit_cap: their soft cap after that; 0 for none.
        gpu: whether a GPU computed them.
        algorithms: versions of the algorithms that made the base.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = 2
    model: str = pydantic.Field(pattern=r"^[^/\\\x00]+$")
    model_sha256: str
    architecture: str
    vocabulary: str
    text: str
    text_sha256: str
    n_ctx: int = pydantic.Field(ge=4)
    unscored: int | None = pydantic.Field(default=None, ge=0)
    chunks: int = pydantic.Field(ge=1)
    chunks_in_text: int
    bos: int | None
    n_vocab: int = pydantic.Field(ge=1)
    n_embd: int = pydantic.Field(ge=1)
    head: str
    head_type: str
    dtype: Dtype
    exact: bool
    max_difference: float
    logit_scale: float = 1.0
    logit_cap: float = pydantic.Field(default=0.0, ge=0)
    gpu: bool
    algorithms: dict[str, int]
    llama_cpp_commit: str

    @pydantic.model_validator(mode="after")
    def _scores(self) -> "BaseHeader":
        if self.scored < 1:
            raise ValueError(f"no token of {self.n_ctx} is scored")
        return self

    @property
    def scored(self) -> int:
        """Scored tokens of a chunk."""
        return self.n_ctx - 1 - (self.n_ctx // 2 if self.unscored is None else self.unscored)

    @property
    def inputs(self) -> dict[str, Any]:
        """All that must be as requested for the base to serve, as `keys.key_of` takes it."""
        return {
            "model": self.model_sha256,
            "text": self.text_sha256,
            "n_ctx": self.n_ctx,
            "unscored": self.unscored,
            "algorithms": self.algorithms,
            "library": self.llama_cpp_commit,
        }

    @property
    def record(self) -> int:
        """Bytes of a chunk's record."""
        return self.scored * (self.n_embd * np.dtype(_STORED[self.dtype]).itemsize + 12)


def pack(hidden: Floats, dtype: Dtype) -> npt.NDArray[np.generic]:
    """Hidden states as they are stored, of the same shape. Raises OverflowError if a value is too large for the type.

    Example:
        >>> unpack(pack(np.array([[1.0, 0.5]], np.float32), "bf16"), "bf16").tolist()
        [[1.0, 0.5]]
    """
    if dtype == "f32":
        return hidden
    if dtype == "f16":
        with np.errstate(over="ignore"):
            half = hidden.astype(np.float16)
        if not np.isfinite(half).all():
            raise OverflowError
        return half
    bits = np.ascontiguousarray(hidden).view(np.uint32)
    # Round to the nearest, ties to even: add just less than half a unit of the last bit that is kept, and that bit.
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def unpack(stored: npt.NDArray[np.generic], dtype: Dtype) -> Floats:
    """Stored hidden states as a new float32 array."""
    if dtype == "bf16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def write_header(stream: BinaryIO, header: BaseHeader, tokens: Tokens) -> None:
    """Writes the start of a base file: the magic, the header and the tokens, int32 [chunks, n_ctx]."""
    text = header.model_dump_json().encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % 64)
    stream.write(MAGIC + struct.pack("<Q", len(text)) + text)
    stream.write(np.ascontiguousarray(tokens, "<i4").tobytes())


def write_record(stream: BinaryIO, hidden: npt.NDArray[np.generic], rows: BaseRows) -> None:
    """Appends a chunk: its packed hidden states, and what is kept of its rows. The last one is before `files.seal`."""
    stream.write(np.ascontiguousarray(hidden).tobytes())
    for values, kind in ((rows.nll, "<f4"), (rows.top, "<i4"), (rows.top_logit, "<f4")):
        stream.write(values.astype(kind).tobytes())


def is_base_file(path: pathlib.Path) -> bool:
    """Whether a file is a base file, of this version or another."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(KIND)) == KIND
    except OSError:
        return False


class BaseFile:
    """An open base file.

    Raises:
        BitladderError: the file cannot be read, is not a base file, or has a wrong length.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        try:
            self._stream = path.open("rb")
        except OSError as error:
            raise BitladderError(f"cannot read the base {path}: {error.strerror}") from error
        try:
            self.header, self.tokens = self._read_header()
        except BaseException:
            self._stream.close()
            raise

    def _read_header(self) -> tuple[BaseHeader, Tokens]:
        start = self._stream.read(len(MAGIC) + 8)
        if start[: len(MAGIC)] != MAGIC:
            raise BitladderError(f"{self.path} is not a base file of this version of bitladder; make it again")
        size = os.fstat(self._stream.fileno()).st_size
        length = struct.unpack("<Q", start[len(MAGIC) :])[0] if len(start) == len(MAGIC) + 8 else size
        if len(start) + length > size:
            raise BitladderError(f"the base {self.path} is truncated inside its header: delete it and make it again")
        try:
            header = BaseHeader.model_validate_json(self._stream.read(length))
        except pydantic.ValidationError as error:
            place = ".".join(map(str, error.errors()[0]["loc"])) or "JSON"
            raise BitladderError(f"the base {self.path} has a damaged header ({place}); make it again") from error
        self._records = len(start) + length + header.chunks * header.n_ctx * 4
        expected = self._records + header.chunks * header.record + SEAL
        if size != expected:
            raise BitladderError(
                f"the base {self.path} has {number_of(size, 'byte')} instead of {expected:,}: it is truncated or "
                "damaged; delete it and make it again"
            )
        tokens = np.frombuffer(self._stream.read(header.chunks * header.n_ctx * 4), "<i4")
        return header, tokens.astype(np.int32).reshape(header.chunks, header.n_ctx)

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()

    def check(self) -> None:
        """Reads the whole file. Raises BitladderError if a byte was changed, which would change what is measured."""
        try:
            check_seal(self.path)
        except ValueError as error:
            raise BitladderError(f"the base {self.path} is damaged: delete it and make it again") from error

    def hidden(self, chunk: int) -> Floats:
        """A chunk's hidden states, float32 [scored, n_embd]."""
        header = self.header
        stored = np.dtype(_STORED[header.dtype])
        data = self._read(chunk, 0, header.scored * header.n_embd * stored.itemsize)
        return unpack(np.frombuffer(data, stored).reshape(header.scored, header.n_embd), header.dtype)

    def rows(self, chunk: int) -> BaseRows:
        """What is kept of a chunk's scored rows."""
        count = self.header.scored
        data = self._read(chunk, self.header.record - 12 * count, 12 * count)
        nll, top, top_logit = (
            np.frombuffer(data, kind, count, 4 * count * i) for i, kind in enumerate(("<f4", "<i4", "<f4"))
        )
        return BaseRows(nll.astype(np.float64), top.astype(np.int32), top_logit.astype(np.float32))

    def _read(self, chunk: int, offset: int, size: int) -> bytes:
        data = os.pread(self._stream.fileno(), size, self._records + chunk * self.header.record + offset)
        if len(data) != size:
            raise BitladderError(f"the base {self.path} ends inside chunk {chunk + 1}: delete it and make it again")
        return data
