"""Reading a Hugging Face checkpoint: its config.json, and its safetensors tensors one at a time."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import BitladderError

Shape = tuple[int, ...]
# Weights as the file holds them: float32, float16, or uint16 for the bits of a bfloat16 (which numpy does not have).
Raw = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file. Raises BitladderError that names the file if it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BitladderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BitladderError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


class Config:
    """The values of config.json. An error names the key that is wrong."""

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
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise BitladderError(f"{self.path}: {key} should be a positive whole number, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number. Raises BitladderError if it is something else, or absent without a default."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise BitladderError(f"{self.path}: {key} should be a number, not {value!r}")
        return float(value)


class Checkpoint:
    """The directory of a checkpoint. `config` and `tensors` are read at once, weights by `read`.

    Raises BitladderError that names the file, and the tensor, if config.json, a shard or a part of a shard is missing.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.config = Config(read_json(folder / "config.json"), folder / "config.json")
        self.tensors = _index(folder)

    def read(self, name: str) -> Raw:
        """The weights of a tensor in its own type and shape; bfloat16 as its bits in uint16."""
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise BitladderError(
                f"{tensor.file}: tensor {name} is {tensor.dtype}; only {', '.join(DTYPES)} weights can be converted"
                " (a quantized checkpoint must be dequantized first)"
            )
        try:
            flat = np.fromfile(tensor.file, DTYPES[tensor.dtype], count=tensor.elements, offset=tensor.offset)
        except OSError as error:
            raise BitladderError(f"cannot read {tensor.file}: {error.strerror}") from error
        if flat.size != tensor.elements:
            raise BitladderError(f"{tensor.file} ends within tensor {name}")
        return flat.reshape(tensor.shape)


def _index(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, from the index and the headers of its shards."""
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return read_header(folder / SINGLE)
        other = "only pytorch_model*.bin, " if any(folder.glob("pytorch_model*.bin")) else ""
        raise BitladderError(
            f"{folder} has neither {SINGLE} nor {INDEX} ({other}save the model with transformers' save_pretrained)"
        )
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BitladderError(f"{folder / INDEX} has no weight_map")
    shards: dict[str, dict[str, StoredTensor]] = {}
    tensors = {}
    for name, file in weight_map.items():
        if file not in shards:
            if not (folder / file).is_file():
                raise BitladderError(f"{folder / file} is missing: the index puts tensor {name} there")
            shards[file] = read_header(folder / file)
        if name not in shards[file]:
            raise BitladderError(f"{folder / file} has no tensor {name}, though the index puts it there")
        tensors[name] = shards[file][name]
    return tensors


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, checked against the size of the file.

    The file has 8 bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}} whose
    offsets count from the end of the header, and the data. Raises BitladderError if a part does not fit.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise BitladderError(f"{path} is truncated: its {size} bytes do not hold the header")
            header = json.loads(stream.read(length))
        start = 8 + length
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            tensor = StoredTensor(name, entry["dtype"], tuple(entry["shape"]), path, start + begin)
            if start + end > size:
                raise BitladderError(
                    f"{path} is truncated: tensor {name} should end at byte {start + end}, the file has {size}"
                )
            if tensor.dtype in DTYPES and end - begin != tensor.elements * DTYPES[tensor.dtype].itemsize:
                raise BitladderError(f"{path}: the size of tensor {name} does not fit its shape {list(tensor.shape)}")
            tensors[name] = tensor
    except OSError as error:
        raise BitladderError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BitladderError(f"{path} is not a safetensors file: its header cannot be read") from error
    return tensors
