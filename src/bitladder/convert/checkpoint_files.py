"""The files of a checkpoint, checked as they are read: JSON, the values of config.json, and headers of safetensors."""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import numpy as np

from bitladder.errors import BitladderError
from bitladder.progress import Progress
from bitladder.units import number_of

# The largest whole number that llama.cpp keeps (int32), and the largest value of a float32.
MAX_INTEGER = (1 << 31) - 1
MAX_FLOAT = float(np.finfo(np.float32).max)
LFS_POINTER = b"version https://git-lfs"
Shape = tuple[int, ...]
_DTYPE = re.compile(r"[A-Z0-9_]{1,20}")
# Types as safetensors names them, and how numpy reads them: a bfloat16 as its bits, since numpy does not have it, and
# so an 8-bit float.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "U8": np.dtype("u1"),
}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BitladderError that names the file if it is missing or malformed."""
    value = read_any_json(path)
    if not isinstance(value, dict):
        raise BitladderError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def read_any_json(path: pathlib.Path) -> Any:
    """A JSON value from a file. Raises BitladderError that names the file if it is missing or malformed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    if data.startswith(LFS_POINTER):
        raise BitladderError(f"{path} is only a Git LFS pointer; fetch the file itself: git lfs pull")
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> Any:
    """A JSON value. Raises BitladderError, which begins with `where`, if it is malformed or nested too deeply."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise BitladderError(f"{where} is nested too deeply to be read") from error
    except ValueError as error:
        reason = "a number has too many digits" if "int_max_str_digits" in str(error) else " ".join(str(error).split())
        raise BitladderError(f"{where} is not valid JSON: {reason}") from error


def read_optional(path: pathlib.Path, progress: Progress) -> dict[str, Any]:
    """A JSON object from a file that a conversion can do without: empty, with a warning if the file is malformed."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except BitladderError as error:
        progress.warn(f"{error}; it is left out")
        return {}


class Config:
    """The values of config.json, or of an object in it. An error names the key that is wrong."""

    def __init__(self, values: dict[str, Any], path: pathlib.Path) -> None:
        self.values = values
        self.path = path

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`; `default` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number. Raises BitladderError if it is something else, or absent without a default."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_INTEGER:
            raise self.wrong(key, f"a positive whole number below {MAX_INTEGER + 1}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number that a float32 holds.

        Raises BitladderError if it is something else, or absent without a default.
        """
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_FLOAT:
            raise self.wrong(key, "a finite number", value)
        return float(value)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0. Raises BitladderError if it is something else, or absent without a default."""
        value = self.number(key, default)
        if value <= 0:
            raise self.wrong(key, "a number above 0", value)
        return value

    def boolean(self, key: str, default: bool = False) -> bool:
        """True or false. Raises BitladderError if it is something else."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def wrong(self, key: str, expected: str, value: Any) -> BitladderError:
        """The error for a value of the wrong type."""
        return BitladderError(f"{self.path}: {key} should be {expected}, not {brief(value)}")


def brief(value: Any, longest: int = 60) -> str:
    """A value of a file for a message: on one line, and not too long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**longest:
        return f"a number of some {int(math.log10(abs(value)))} digits"
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= longest else f"{text[:longest]}…"


def plain(text: str, longest: int = 100) -> str:
    """A name of a file for a message: without quotation marks, on one line, and not too long."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= longest else f"{text[:longest]}…"


def whole_number(value: Any) -> int | None:
    """A whole number from a JSON value, also one that was written as 2.0 or "2"; None if it is none."""
    number = decimal_number(value)
    return int(number) if number is not None and number == int(number) else None


def decimal_number(value: Any) -> float | None:
    """A finite number from a JSON value, also one that was written as a string; None if it is none."""
    if isinstance(value, str) and len(value) < 40:
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MAX_FLOAT:
        return None
    return float(value)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, in a file.

    Parameters:
        name: its name.
        dtype: its type, as safetensors names it.
        shape: its shape, rows first.
        file: the safetensors file.
        offset: the byte of the file at which its data begin.
    """

    name: str
    dtype: str
    shape: Shape
    file: pathlib.Path
    offset: int

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked against the size of the file.

    The file has 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}} whose
    offsets count from the end of the header, and the data. Raises BitladderError if a part does not fit.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if LFS_POINTER.startswith(start) and stream.read(len(LFS_POINTER) - 8) == LFS_POINTER[8:]:
                raise BitladderError(f"{path} is only a Git LFS pointer; fetch the file itself: git lfs pull")
            if size < 8 or length > size - 8:
                raise BitladderError(f"{path} is truncated: its {number_of(size, 'byte')} do not hold the header")
            header = stream.read(length)
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    unreadable = f"{path} is not a safetensors file: its header"
    entries = parse_json(header, unreadable)
    if not isinstance(entries, dict):
        raise BitladderError(f"{unreadable} is no JSON object")
    entries.pop("__metadata__", None)
    return {name: _tensor(name, entry, path, 8 + length, size) for name, entry in entries.items()}


def _tensor(name: str, entry: Any, path: pathlib.Path, start: int, size: int) -> StoredTensor:
    """One entry of the header. `start` is the byte at which the data of the file begin, `size` that of its end."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise BitladderError(f"{path} is not a safetensors file: tensor {plain(name)} is not described") from error
    whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype) or not whole or max((*shape, begin)) > size:
        raise BitladderError(
            f"{path} is damaged: tensor {plain(name)} is {brief(dtype)} of the shape {brief(shape)} at"
            f" {brief([begin, end])}"
        )
    if start + end > size:
        raise BitladderError(
            f"{path} is truncated: tensor {plain(name)} should end at byte {brief(start + end)}, the file has {size}"
        )
    tensor = StoredTensor(name, dtype, shape, path, start + begin)
    if end < begin or (dtype in DTYPES and end - begin != tensor.elements * DTYPES[dtype].itemsize):
        raise BitladderError(f"{path}: the size of tensor {plain(name)} does not fit its shape {list(shape)}")
    return tensor
