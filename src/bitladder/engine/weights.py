"""The weights of a loaded model: their bytes are read, and replaced in place."""

import ctypes

import numpy as np
import numpy.typing as npt

from bitladder.engine.context import Context, Decoding
from bitladder.engine.model import Model
from bitladder.engine.native import Tensor, ggml
from bitladder.engine.observe import GraphCallback, weight_name
from bitladder.engine.types import RowKernels, all_types
from bitladder.errors import BitladderError
from bitladder.units import number_of

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Weights:
    """Handles to the weights of a loaded model.

    One token is decoded, and the weights that the graph reads are noted. The model must be loaded with mmap=False and
    repack=False: a write into a mapped file ends the process, and repacked blocks have another layout.

    Raises BitladderError for a model that is loaded otherwise.
    """

    def __init__(self, model: Model) -> None:
        if not model.replaceable:
            raise BitladderError("weights can only be replaced in a model loaded with mmap=False, repack=False")
        self._model = model  # the handles are valid as long as the model
        self._kernels = RowKernels()
        noting = _WeightAddresses()
        with Context(model, Decoding(n_ctx=32), callback=noting) as context:
            context.decode([max(model.bos, 0)], [0], [0], [True])
        self._handles = noting.addresses

    def names(self) -> list[str]:
        """The weights that the graph uses, sorted."""
        return sorted(self._handles)

    def get(self, name: str) -> Bytes:
        """The bytes of a weight as stored: a copy, uint8, flat."""
        tensor = self._tensor(name)
        out = np.empty(_nbytes(tensor), np.uint8)
        ggml.ggml_backend_tensor_get(ctypes.addressof(tensor), out.ctypes.data, 0, out.size)
        return out

    def set_bytes(self, name: str, data: Bytes) -> None:
        """Replaces a weight by bytes of its own type. Raises BitladderError if the size differs."""
        tensor = self._tensor(name)
        data = np.ascontiguousarray(data)
        if data.nbytes != _nbytes(tensor):
            raise BitladderError(
                f"{name} has {number_of(_nbytes(tensor), 'byte')} in the loaded model, not {data.nbytes:,}"
            )
        ggml.ggml_backend_tensor_set(ctypes.addressof(tensor), data.ctypes.data, 0, data.nbytes)

    def set(self, name: str, values: Floats) -> None:
        """Replaces a weight by float32 values, shape [rows, n_in], stored in the type that the loaded model has."""
        tensor = self._tensor(name)
        rows = np.ascontiguousarray(values, np.float32).reshape(-1, tensor.ne[0])
        self.set_bytes(name, self._kernels.quantize(rows, all_types()[tensor.type]).reshape(-1))

    def _tensor(self, name: str) -> Tensor:
        if name not in self._handles:
            raise BitladderError(f"the model has no weight {name!r} that decoding uses")
        return Tensor.from_address(self._handles[name])


class _WeightAddresses(GraphCallback):
    """Notes the address of every weight that the graph reads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: dict[str, int] = {}

    def call(self, address: int, ask: bool) -> bool:
        for pointer in tuple(Tensor.from_address(address).src)[:3]:
            if pointer:
                source = Tensor.from_address(pointer)
                if source.op == 0 and source.name.endswith((b".weight", b".bias")):
                    self.addresses.setdefault(weight_name(source.name), pointer)
        return not ask


def _nbytes(tensor: Tensor) -> int:
    kind = all_types()[tensor.type]
    return kind.row_bytes(tensor.ne[0]) * int(tensor.ne[1] * tensor.ne[2] * tensor.ne[3])
