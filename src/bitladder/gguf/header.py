"""The header of one GGUF file: parsed, and checked against the file.

The checks are those of llama.cpp (ggml/src/gguf.cpp, and its loader for the end of the file), so that a file which is
read here loads there. A size is checked before memory of that size is touched, so that no header makes reading slow or
large. Names that are not UTF-8, tensors without elements and absurdly long lists are refused too.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import stat
import struct
from typing import Any, BinaryIO, NoReturn

from bitladder.engine import TensorType, all_types
from bitladder.errors import BitladderError
from bitladder.units import number_of

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
SCALARS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
SIZES = {kind: struct.calcsize("<" + code) for kind, code in SCALARS.items()}
MAX_KEY = 0xFFFF  # bytes of a metadata key, by the format's definition
MAX_NAME = 63  # bytes of a tensor's name: GGML_MAX_NAME without its final zero
MAX_STRING = 1 << 30  # bytes of a string: GGUF_MAX_STRING_LENGTH in gguf.cpp
# Elements of an array, bytes of a value. gguf.cpp allows 2^30 elements. No vocabulary comes near these limits, and they
# keep the work small that a false header can cause.
MAX_COUNT, MAX_VALUE = 1 << 24, 1 << 31
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
# The fewest bytes that a metadata entry and a tensor's entry take.
_LEAST_VALUE, _LEAST_TENSOR = 14, 24
_DAMAGED = "it is truncated or damaged; fetch it again"


@dataclasses.dataclass(frozen=True)
class Value:
    """A metadata value.

    Parameters:
        kind: GGUF type number.
        raw: the little-endian bytes that follow the number in a file.
    """

    kind: int
    raw: bytes

    def python(self) -> Any:
        """The value as int, float, bool, str or list of these."""
        if self.kind == ARRAY:
            return _array(self.raw)
        if self.kind == STRING:
            return self.raw[8:].decode("utf-8", "replace")
        return struct.unpack("<" + SCALARS[self.kind], self.raw)[0]


def _array(raw: bytes) -> list[Any]:
    kind, count = struct.unpack_from("<IQ", raw)
    if kind in SCALARS:
        return list(struct.unpack_from(f"<{count}{SCALARS[kind]}", raw, 12))
    out, position = [], 12
    for _ in range(count):
        (size,) = struct.unpack_from("<Q", raw, position)
        out.append(raw[position + 8 : position + 8 + size].decode("utf-8", "replace"))
        position += 8 + size
    return out


def scalar(kind: int, value: float | bool) -> Value:
    """A number or boolean of a GGUF type."""
    return Value(kind, struct.pack("<" + SCALARS[kind], value))


def u16(value: int) -> Value:
    """An unsigned 16-bit integer."""
    return scalar(U16, value)


def u32(value: int) -> Value:
    """An unsigned 32-bit integer."""
    return scalar(U32, value)


def i32(value: int) -> Value:
    """A signed 32-bit integer."""
    return scalar(I32, value)


def string(text: str) -> Value:
    """A string."""
    return Value(STRING, _packed(text))


def strings(texts: list[str]) -> Value:
    """An array of strings."""
    return Value(ARRAY, struct.pack("<IQ", STRING, len(texts)) + b"".join(map(_packed, texts)))


def _packed(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file.

    Parameters:
        name: its name.
        shape: its shape in GGUF order, row width (n_in) first.
        type: its type.
        offset: bytes from the start of the data section.
        part: index of its file in `GgufFile.parts`.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    offset: int
    part: int = 0

    @property
    def width(self) -> int:
        """Weights per row."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Rows of all matrices (experts)."""
        return math.prod(self.shape[1:])

    @property
    def rows_per_matrix(self) -> int:
        """Rows of one matrix; a tensor of experts has several matrices."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.type.row_bytes(self.width) * self.rows


@dataclasses.dataclass(frozen=True)
class GgufHeader:
    """The header of one file.

    Parameters:
        path: the file.
        size: bytes of the file.
        metadata: values by key.
        tensors: tensors by name.
        alignment: bytes to a multiple of which each tensor is padded.
        data_start: the byte at which tensors begin.
    """

    path: pathlib.Path
    size: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    alignment: int
    data_start: int

    def number(self, key: str, kind: int, default: int | None = None) -> int:
        """A metadata value of the GGUF type `kind`. Raises BitladderError if it is missing or has another type."""
        value = self.metadata.get(key)
        if value is None and default is not None:
            return default
        if value is None or value.kind != kind:
            what = "is missing" if value is None else f"has the type number {value.kind}, not {kind}"
            raise BitladderError(f"{self.path}: metadata key {key} {what}: {_DAMAGED}")
        return int(value.python())


def open_regular(path: pathlib.Path) -> BinaryIO:
    """Opens a file for reading. Raises BitladderError if that fails, or for a directory, a pipe or a device."""
    try:
        # This check comes first, because opening a pipe waits for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            what = "a directory" if path.is_dir() else "not a regular file"
            raise BitladderError(f"cannot open {path}: it is {what}; name a GGUF file")
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise BitladderError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error


def read_header(stream: BinaryIO, path: pathlib.Path, part: int = 0) -> GgufHeader:
    """Parses and checks the header of an open file.

    Parameters:
        stream: the open file.
        path: its path, for errors.
        part: its place among the shards of a model.

    Raises:
        BitladderError: the header is wrong; the message names the file, and the key or tensor.
    """
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(24)
    if start.startswith(b"version https://git-lfs"):
        raise BitladderError(f"{path} is only a Git LFS pointer; fetch the file itself: git lfs pull")
    if size < 24 or start[:4] != b"GGUF":
        what = f"begins with {start[:4]!r}" if len(start) == 24 else f"has only {number_of(size, 'byte')}"
        raise BitladderError(f"{path} is not a GGUF file: it {what}")
    try:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    with data:
        return _parse(_Cursor(path, data), part)


def shown(name: str) -> str:
    """A name from a file for a message: on one line, and not too long."""
    return name if name.isprintable() and len(name) <= 2 * MAX_NAME else repr(name[:MAX_NAME])


def _parse(cursor: "_Cursor", part: int) -> GgufHeader:
    path, size = cursor.path, len(cursor.data)
    version, tensor_count, value_count = cursor.unpack("<4xIQQ", "the header")
    if version and version & 0xFFFF == 0:
        raise BitladderError(f"{path} is a GGUF for big-endian machines; convert the model again for this one")
    if version not in (2, 3):
        raise BitladderError(f"{path}: GGUF version {version} is not supported (2 and 3 are); convert the model again")
    if value_count * _LEAST_VALUE + tensor_count * _LEAST_TENSOR > size:
        cursor.fail(
            f"claims {number_of(value_count, 'metadata key')} and {number_of(tensor_count, 'tensor')}, too many for "
            f"{number_of(size, 'byte')}"
        )
    metadata: dict[str, Value] = {}
    for _ in range(value_count):
        key = cursor.name("a metadata key", MAX_KEY)
        if not key or key in metadata:
            cursor.fail(f"metadata key {shown(key)} occurs twice" if key else "a metadata key is empty")
        metadata[key] = cursor.value(key)
    alignment = _alignment(path, metadata.get("general.alignment"))
    tensors: dict[str, TensorInfo] = {}
    offset = 0
    for _ in range(tensor_count):
        tensor = _tensor(cursor, part)
        name = shown(tensor.name)
        if tensor.name in tensors:
            cursor.fail(f"tensor {name} occurs twice")
        if tensor.offset != offset:
            cursor.fail(f"tensor {name} should lie at offset {offset}, not {tensor.offset}, of the data")
        offset += -(-tensor.nbytes // alignment) * alignment
        tensors[tensor.name] = tensor
    data_start = -(-cursor.position // alignment) * alignment
    for tensor in tensors.values():
        end = data_start + tensor.offset + tensor.nbytes
        if end > size:
            cursor.fail(f"tensor {shown(tensor.name)} ends at byte {end}, but the file has {size}")
    return GgufHeader(path, size, metadata, tensors, alignment, data_start)


def _alignment(path: pathlib.Path, value: Value | None) -> int:
    if value is None:
        return DEFAULT_ALIGNMENT
    alignment = value.python() if value.kind == U32 else 0
    if alignment.bit_count() != 1:
        raise BitladderError(f"{path}: general.alignment is not a power of two (type u32): {_DAMAGED}")
    return int(alignment)


def _tensor(cursor: "_Cursor", part: int) -> TensorInfo:
    name = cursor.name("a tensor name", MAX_NAME)
    what = f"tensor {shown(name)}"
    (dimensions,) = cursor.unpack("<I", what)
    if dimensions > MAX_DIMENSIONS:
        cursor.fail(f"{what} has {number_of(dimensions, 'dimension')}; there are at most {MAX_DIMENSIONS}")
    # A scalar, which has no dimensions, is a row of one.
    shape = cursor.unpack(f"<{dimensions}Q", what) or (1,)
    number, offset = cursor.unpack("<IQ", what)
    if 0 in shape:
        cursor.fail(f"{what} has the shape {list(shape)}, which holds no weights")
    kind = all_types().get(number)
    if kind is None:
        raise BitladderError(
            f"{cursor.path}: {what} has type number {number}, unknown to the library: the file is damaged, "
            "or made for a newer llama.cpp"
        )
    if shape[0] % kind.block:
        cursor.fail(f"{what} is {kind.name}, but {shape[0]} is no multiple of its block of {kind.block}")
    return TensorInfo(name, shape, kind, offset, part)


class _Cursor:
    """Reads forward through the header. At the end of the file it raises an error that names the part being read."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    def fail(self, what: str) -> NoReturn:
        raise BitladderError(f"{self.path}: {what}: {_DAMAGED}")

    def unpack(self, form: str, what: str) -> tuple[Any, ...]:
        start = self.position
        self._skip(struct.calcsize(form), what)
        return struct.unpack_from(form, self.data, start)

    def name(self, what: str, longest: int) -> str:
        (size,) = self.unpack("<Q", what)
        if size > longest:
            self.fail(f"{what} is {number_of(size, 'byte')} long; {longest:,} are allowed")
        self._skip(size, what)
        raw = self.data[self.position - size : self.position]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8: {raw[:MAX_NAME]!r}")

    def value(self, key: str) -> Value:
        what = f"metadata key {shown(key)}"
        (kind,) = self.unpack("<I", what)
        start = self.position
        if kind in SIZES:
            self._skip(SIZES[kind], what)
        elif kind == STRING:
            self._skip(self._size(what), what)
        elif kind == ARRAY:
            self._skip_array(what)
        else:
            self.fail(f"{what} has the unknown type {kind}")
        if self.position - start > MAX_VALUE:
            self.fail(f"{what} is said to have {number_of(self.position - start, 'byte')}")
        return Value(kind, self.data[start : self.position])

    def _size(self, what: str) -> int:
        (size,) = self.unpack("<Q", what)
        if size > MAX_STRING:
            self.fail(f"{what} is said to have {number_of(size, 'byte')}")
        return int(size)

    def _skip_array(self, what: str) -> None:
        kind, count = self.unpack("<IQ", what)
        if count > MAX_COUNT:
            self.fail(f"{what} is said to have {number_of(count, 'element')}")
        if kind in SIZES:
            self._skip(SIZES[kind] * count, what)
        elif kind == STRING:
            self._skip_strings(count, what)
        else:
            self.fail(f"{what} is an array of type {kind}, which is not supported")

    def _skip(self, size: int, what: str) -> None:
        self.position += size
        if self.position > len(self.data):
            self.fail(f"the file ends inside {what}")

    def _skip_strings(self, count: int, what: str) -> None:
        # This loop runs a hundred thousand times: it uses local names, and unpacking checks the end of the file.
        read, data, position = struct.Struct("<Q").unpack_from, self.data, self.position
        try:
            for _ in range(count):
                position += 8 + read(data, position)[0]
        except (struct.error, OverflowError):
            position = len(data) + 1
        self.position = position
        self._skip(0, what)
