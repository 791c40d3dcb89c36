"""Opening a GGUF model: metadata, tensors, and rows of weights on request.

Nothing but headers is read when the file is opened. The shards of a split model are opened together and look like one
file.
"""

import contextlib
import os
import pathlib
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bitladder.closing import Closing
from bitladder.errors import BitladderError
from bitladder.gguf.header import Header, TensorInfo, open_regular, read_header
from bitladder.gguf.shards import join, rest_of

__all__ = ["GgufFile", "TensorInfo"]


class GgufFile(Closing):
    """An open GGUF file, or all shards of a split model if it is the first of them.

    `metadata` maps keys to Values in file order (of a split model: the first shard's), `tensors` names to TensorInfo
    in file order, through all shards. `parts` are the files, `size` their bytes; `path` and `data_start` (the byte
    where tensors begin) are of the first. Raises BitladderError that names the file, and the key or tensor, for
    whatever is wrong with it, and the shard that is missing.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        with contextlib.ExitStack() as opened:
            self._streams: list[BinaryIO] = []
            headers = [self._open(self.path, opened)]
            headers += [self._open(other, opened) for other in rest_of(headers[0])]
            self.tensors = join(headers)
            self._opened = opened.pop_all()
        self.parts = tuple(header.path for header in headers)
        self.size = sum(header.size for header in headers)
        self.metadata = headers[0].metadata
        self.data_start = headers[0].data_start
        self._data_starts = [header.data_start for header in headers]

    def _open(self, path: pathlib.Path, opened: contextlib.ExitStack) -> Header:
        stream = opened.enter_context(open_regular(path))
        self._streams.append(stream)
        return read_header(stream, path, part=len(self._streams) - 1)

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

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
        """Bits per weight over all weights, tensor bytes only (as llama-quantize states it); 0 without tensors."""
        return 8 * self.tensor_bytes / max(1, sum(tensor.elements for tensor in self.tensors.values()))

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """Rows start…stop of a tensor as stored: uint8 [rows, row bytes], a fresh array. Threads may call at once."""
        stop = tensor.rows if stop is None else stop
        row = tensor.type.row_bytes(tensor.width)
        out = np.empty((stop - start, row), np.uint8)
        view, position = out.reshape(-1).data, self._data_starts[tensor.part] + tensor.offset + start * row
        while view:
            try:
                count = os.preadv(self._streams[tensor.part].fileno(), [view], position)
            except OSError as error:
                raise BitladderError(f"cannot read {self.parts[tensor.part]}: {error.strerror}") from error
            if not count:
                raise BitladderError(f"{self.parts[tensor.part]}: the file ends inside tensor {tensor.name}")
            view, position = view[count:], position + count
        return out
