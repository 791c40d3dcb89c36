"""Opening a GGUF file: metadata, tensors, and rows of weights on request.

Nothing but the header is read when the file is opened; every claim of the header is checked against the file.
"""

import dataclasses
import mmap
import os
import pathlib
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from bitladder.closing import Closing
from bitladder.engine.types import TensorType, all_types
from bitladder.errors import BitladderError
from bitladder.model.values import ARRAY, SCALARS, STRING, Value

SIZES = {kind: struct.calcsize("<" + code) for kind, code in SCALARS.items()}
MAX_NAME = 64  # GGML_MAX_NAME, with its final zero


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file. `shape` is in GGUF order: shape[0] is the row width (n_in)."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int  # from the start of the data section

    @property
    def width(self) -> int:
        """Weights per row."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Rows over all matrices (experts)."""
        return self.elements // self.width

    @property
    def rows_per_matrix(self) -> int:
        """Rows of one matrix; a tensor of experts has several."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def elements(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.type.row_bytes(self.width) * self.rows


class GgufFile(Closing):
    """An open GGUF file.

    `metadata` maps keys to Values in file order, `tensors` names to TensorInfo in file order. Raises BitladderError
    that names the file, and the key or tensor, for whatever is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        try:
            self._stream = self.path.open("rb")
        except OSError as error:
            raise BitladderError(f"cannot open {path}: {error.strerror}") from error
        self.size = os.fstat(self._stream.fileno()).st_size
        try:
            self._parse()
        except BaseException:
            self._stream.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python object, or the default."""
        value = self.metadata.get(key)
        return default if value is None else value.python()

    @property
    def architecture(self) -> str:
        """general.architecture, or "" (an imatrix has none)."""
        return str(self.get("general.architecture", ""))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bpw(self) -> float:
        """Bits per weight over all weights, tensor bytes only (as llama-quantize states it)."""
        return 8 * self.tensor_bytes / sum(tensor.elements for tensor in self.tensors.values())

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Rows start…stop of a tensor as stored: uint8 [rows, row bytes], a fresh array."""
        stop = tensor.rows if stop is None else stop
        row = tensor.type.row_bytes(tensor.width)
        out = np.empty((stop - start, row), np.uint8)
        view, position = out.reshape(-1).data, self.data_start + tensor.offset + start * row
        while view:
            count = os.preadv(self._stream.fileno(), [view], position)
            if not count:
                raise BitladderError(f"{self.path}: the file ends inside tensor {tensor.name}")
            view, position = view[count:], position + count
        return out

    def _parse(self) -> None:
        if self.size < 24:
            raise BitladderError(f"{self.path} is not a GGUF file: it has only {self.size} bytes")
        with mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(self.path, data)
            magic, version, tensor_count, value_count = cursor.unpack("<4sIQQ")
            if magic != b"GGUF":
                raise BitladderError(f"{self.path} is not a GGUF file: it begins with {magic!r}")
            if version not in (2, 3):
                raise BitladderError(f"{self.path}: GGUF version {version} is not supported (2 and 3 are)")
            self.metadata: dict[str, Value] = {}
            for _ in range(value_count):
                key = cursor.text("a metadata key")
                if key in self.metadata:
                    raise BitladderError(f"{self.path}: metadata key {key} occurs twice")
                self.metadata[key] = cursor.value(key)
            self.alignment = int(self.get("general.alignment", 32))
            if self.alignment < 8 or self.alignment % 8:
                raise BitladderError(f"{self.path}: general.alignment is {self.alignment}, not a multiple of 8")
            self.tensors: dict[str, TensorInfo] = {}
            for _ in range(tensor_count):
                tensor = self._tensor(cursor)
                self.tensors[tensor.name] = tensor
            self.data_start = -(-cursor.position // self.alignment) * self.alignment
        for tensor in self.tensors.values():
            end = self.data_start + tensor.offset + tensor.nbytes
            if tensor.offset % self.alignment or end > self.size:
                raise BitladderError(
                    f"{self.path}: tensor {tensor.name} should lie at bytes {self.data_start + tensor.offset}…{end}, "
                    f"but the file has {self.size}: it is truncated or damaged; fetch it again"
                )

    def _tensor(self, cursor: "_Cursor") -> TensorInfo:
        name = cursor.text("a tensor name")
        if name in self.tensors:
            raise BitladderError(f"{self.path}: tensor {name} occurs twice")
        (dimensions,) = cursor.unpack("<I")
        if not 1 <= dimensions <= 4:
            raise BitladderError(f"{self.path}: tensor {name} has {dimensions} dimensions")
        shape = cursor.unpack(f"<{dimensions}Q")
        number, offset = cursor.unpack("<IQ")
        kind = all_types().get(number)
        if kind is None:
            raise BitladderError(f"{self.path}: tensor {name} has type number {number}, unknown to the library")
        if 0 in shape or max(shape) > 1 << 40:
            raise BitladderError(f"{self.path}: tensor {name} has the shape {shape}")
        if shape[0] % kind.block:
            raise BitladderError(
                f"{self.path}: tensor {name} is {kind.name}, but {shape[0]} is no multiple of its block"
            )
        return TensorInfo(name, shape, kind, offset)


class _Cursor:
    """Reads forward through the header; running off the end is an error that says what was being read."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def unpack(self, form: str, what: str = "the header") -> tuple[Any, ...]:
        size = struct.calcsize(form)
        if self.position + size > len(self.data):
            self._truncated(what)
        found = struct.unpack_from(form, self.data, self.position)
        self.position += size
        return found

    def _truncated(self, what: str) -> None:
        raise BitladderError(f"{self.path}: the file ends inside {what}: it is truncated or damaged; fetch it again")

    def text(self, what: str) -> str:
        (size,) = self.unpack("<Q", what)
        if self.position + size > len(self.data):
            self._truncated(what)
        self.position += size
        return self.data[self.position - size : self.position].decode("utf-8", "replace")

    def value(self, key: str) -> Value:
        what = f"metadata key {key}"
        (kind,) = self.unpack("<I", what)
        start = self.position
        if kind in SIZES:
            self._skip(SIZES[kind], what)
        elif kind == STRING:
            self.text(what)
        elif kind == ARRAY:
            element, count = self.unpack("<IQ", what)
            if element in SIZES:
                self._skip(SIZES[element] * count, what)
            elif element == STRING:
                self._skip_strings(count, what)
            else:
                raise BitladderError(f"{self.path}: {what} is an array of type {element}, which is not supported")
        else:
            raise BitladderError(f"{self.path}: {what} has the unknown type {kind}")
        return Value(kind, self.data[start : self.position])

    def _skip(self, size: int, what: str) -> None:
        self.position += size
        if self.position > len(self.data):
            self._truncated(what)

    def _skip_strings(self, count: int, what: str) -> None:
        # The one loop that runs a hundred thousand times: locals, and one bound check at the end of each string.
        read, data, position, end = struct.Struct("<Q").unpack_from, self.data, self.position, len(self.data)
        for _ in range(count):
            if position + 8 > end:
                self._truncated(what)
            position += 8 + read(data, position)[0]
        self.position = position
        self._skip(0, what)
