"""The tensors of a model file as torch tensors, float32, as many of them in memory as a budget allows."""

import torch

from bitladder.engine import RowKernels
from bitladder.errors import GradientsError
from bitladder.files import Closing
from bitladder.gguf import GgufFile


class TorchWeights(Closing):
    """Tensors by name.

    Within `memory` bytes they stay expanded. What does not fit is read and expanded again at each use, so that a model
    of any size needs the memory of its largest tensor. `used` are the names that were read.
    """

    def __init__(self, file: GgufFile, memory: int, threads: int | None = None) -> None:
        self._file = file
        self._memory = self._room = memory
        self._kept: dict[str, torch.Tensor] = {}
        self._halves: dict[str, torch.Tensor] = {}
        self._kernels = RowKernels(threads)
        self.used: set[str] = set()

    @property
    def most_bytes(self) -> int:
        """Bytes that expanded weights take at most: all of the file in float32, or the memory for them."""
        return min(self._memory, 4 * sum(tensor.elements for tensor in self._file.tensors.values()))

    def close(self) -> None:
        """Frees the tensors."""
        self.forget()
        self._kernels.close()

    def forget(self) -> None:
        """Frees the expanded tensors. They are read again when they are needed."""
        self._kept.clear()
        self._halves.clear()
        self._room = self._memory

    def has(self, name: str) -> bool:
        """Whether the file has this tensor."""
        return name in self._file.tensors

    def shape(self, name: str) -> tuple[int, int]:
        """(rows, width) of a tensor; a vector has one row. Raises GradientsError for a name that is not there."""
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise GradientsError(f"{self._file.path.name} has no tensor {name}")
        return tensor.rows, tensor.width

    def get(self, name: str) -> torch.Tensor:
        """float32 [rows, width], or [width] for a vector. Raises GradientsError for a name that is not there."""
        self.used.add(name)
        kept = self._kept.get(name)
        return self._keep(self._kept, name, self._read(name)) if kept is None else kept

    def get_half(self, name: str) -> torch.Tensor:
        """`get` in bfloat16. Values that `replace` put there do not count."""
        self.used.add(name)
        kept = self._halves.get(name)
        return self._keep(self._halves, name, self._read(name).bfloat16()) if kept is None else kept

    def _read(self, name: str) -> torch.Tensor:
        _, width = self.shape(name)
        tensor = self._file.tensors[name]
        values = torch.from_numpy(self._kernels.dequantize(self._file.read(tensor), tensor.type, width))
        return values.reshape(width) if len(tensor.shape) == 1 else values

    def _keep(self, kept: dict[str, torch.Tensor], name: str, values: torch.Tensor) -> torch.Tensor:
        if values.nbytes <= self._room:
            self._room -= values.nbytes
            kept[name] = values
        return values

    def replace(self, name: str, values: torch.Tensor) -> None:
        """Gives a tensor other values, of the shape that `get` returns. They stay in memory."""
        self._kept[name] = values

    def rows(self, name: str, indices: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix, float32 [len(indices), width]."""
        self.used.add(name)
        kept = self._kept.get(name)
        if kept is not None:
            return kept[indices]
        _, width = self.shape(name)
        tensor = self._file.tensors[name]
        distinct, places = torch.unique(indices, return_inverse=True)
        parts = [
            self._kernels.dequantize(self._file.read(tensor, i, i + 1), tensor.type, width) for i in distinct.tolist()
        ]
        return torch.cat([torch.from_numpy(part) for part in parts])[places]

    def unused(self) -> list[str]:
        """Tensors of the file that were never read."""
        return [name for name in self._file.tensors if name not in self.used]
