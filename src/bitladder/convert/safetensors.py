"""The header of a safetensors file: which tensors it holds, and where."""

import dataclasses
import math
import pathlib
import re
from typing import Any

import numpy as np

from bitladder.convert.config import LFS_POINTER, brief, parse_json, plain
from bitladder.errors import BitladderError

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
                raise BitladderError(f"{path} is truncated: its {size} bytes do not hold the header")
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
