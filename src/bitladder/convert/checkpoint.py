"""Reading a Hugging Face checkpoint: its config.json, and its safetensors tensors one at a time."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitladder.convert.checkpoint_files import DTYPES, Config, StoredTensor, brief, plain, read_header, read_json
from bitladder.convert.quantized import (
    FP8,
    Quantization,
    fp8_values,
    multiply_by_scales,
    names_of_scales,
    scale_of,
    scale_values,
)
from bitladder.errors import BitladderError
from bitladder.progress import SILENT, Progress

# Weights as the file holds them: float64, float32, float16, or uint16 for the bits of a bfloat16. FP8 weights are
# float32.
Raw = NDArray[Any]

WEIGHTS = ("F64", "F32", "F16", "BF16", *FP8)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """The directory of a checkpoint. `config` and `tensors` are read at once, weights by `read`.

    Parameters:
        folder: the directory.
        progress: gets a warning if the directory holds two models.

    Attributes:
        config: the values of config.json.
        quantization: what the checkpoint says about quantized weights.
        tensors: the weights by name; scales of FP8 weights are not among them.

    Raises:
        BitladderError: config.json, a shard or a part of a shard is missing or wrong; the message names the file, and
            the tensor.
    """

    def __init__(self, folder: pathlib.Path, progress: Progress = SILENT) -> None:
        self.folder = folder
        self.config = Config(read_json(folder / "config.json"), folder / "config.json")
        self.quantization = Quantization(folder, self.config)
        self._stored = _with_prefix(_all_tensors(folder, self.config, progress))
        beside = names_of_scales(self._stored)
        self.tensors = {name: tensor for name, tensor in self._stored.items() if name not in beside}

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.elements for tensor in self.tensors.values())

    def read(self, name: str) -> Raw:
        """The weights of a tensor in its own type and shape; bfloat16 as its bits in uint16, FP8 as float32."""
        tensor = self.tensors[name]
        if tensor.dtype not in WEIGHTS:
            raise BitladderError(
                f"{tensor.file}: tensor {name} is {tensor.dtype}; only {', '.join(WEIGHTS)} weights can be converted"
                " (a quantized checkpoint must be dequantized first)"
            )
        raw = _load(tensor)
        return self._dequantize(raw, tensor) if tensor.dtype in FP8 else raw

    def _dequantize(self, raw: Raw, tensor: StoredTensor) -> NDArray[np.float32]:
        values = fp8_values(raw, tensor.dtype)
        name = scale_of(tensor.name, self._stored)
        if name is None:
            if self.quantization.method:
                raise BitladderError(f"{tensor.file}: the FP8 tensor {tensor.name} has no scales beside it")
            return values
        scale = self._stored[name]
        if scale.dtype not in DTYPES or scale.dtype in FP8 or len(tensor.shape) != 2:
            raise BitladderError(f"{scale.file}: tensor {name} is {scale.dtype}; such scales are not known")
        factors = scale_values(_load(scale), scale.dtype)
        return multiply_by_scales(values, factors, self.quantization.block, tensor.name)


def _load(tensor: StoredTensor) -> Raw:
    try:
        flat = np.fromfile(tensor.file, DTYPES[tensor.dtype], count=tensor.elements, offset=tensor.offset)
    except OSError as error:
        raise BitladderError(f"cannot read {tensor.file}: {error.strerror}") from error
    if flat.size != tensor.elements:
        raise BitladderError(f"{tensor.file} ends within tensor {tensor.name}")
    return flat.reshape(tensor.shape)


def _all_tensors(folder: pathlib.Path, config: Config, progress: Progress) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, from the file that transformers takes.

    That is the file which `transformers_weights` in config.json names, or model.safetensors, or the shards of the
    index.
    """
    explicit = config.get("transformers_weights")
    single, index = folder / SINGLE, folder / INDEX
    if explicit is not None:
        path = _inside(folder, explicit, f"{config.path}: transformers_weights")
        return _shards(folder, path) if path.name.endswith(".index.json") else read_header(path)
    if single.is_file():
        if index.is_file():
            progress.warn(f"{single} is converted, as transformers takes it; {INDEX} and its shards are ignored")
        return read_header(single)
    if index.is_file():
        return _shards(folder, index)
    hint = ""
    if any(folder.glob("adapter_model*")):
        hint = "adapter_model.* is an adapter: merge it into its base model first; "
    elif any(folder.glob("pytorch_model*.bin")):
        hint = "only pytorch_model*.bin; "
    raise BitladderError(
        f"{folder} has neither {SINGLE} nor {INDEX} ({hint}save the model with transformers' save_pretrained)"
    )


def _with_prefix(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by the names that a model with a head has, model.*, and the head's.

    transformers also loads files in which the model was saved without its head (no prefix) or within another one.
    """
    for prefix in ("", "model.model."):
        if f"{prefix}embed_tokens.weight" in tensors and "model.embed_tokens.weight" not in tensors:
            outer = prefix.removesuffix("model.")
            renamed = {}
            for name, tensor in tensors.items():
                inner = name.removeprefix(prefix) if name.startswith(prefix) else ""
                head = name.removeprefix(outer) == "lm_head.weight"
                new = "lm_head.weight" if head else f"model.{inner}" if inner else name
                renamed[new] = dataclasses.replace(tensor, name=new)
            return renamed
    return tensors


def _shards(folder: pathlib.Path, index: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of all files that an index names. Raises BitladderError if one is missing, or in two files."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BitladderError(f"{index} has no weight_map")
    tensors: dict[str, StoredTensor] = {}
    shards: dict[str, pathlib.Path] = {}
    for name, file in weight_map.items():
        path = _inside(folder, file, f"{index}: the file of tensor {plain(name)}")
        if path.is_file():
            shards.setdefault(path.name, path)
        else:
            raise BitladderError(f"{path} is missing: the index puts tensor {plain(name)} there")
    for path in shards.values():
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise BitladderError(
                    f"tensor {plain(name)} is in {tensors[name].file} and in {path}; remove one of them"
                )
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors:
            raise BitladderError(f"{folder / file} has no tensor {plain(name)}, though the index puts it there")
    return tensors


def _inside(folder: pathlib.Path, name: Any, where: str) -> pathlib.Path:
    """The file of that name in the checkpoint's directory. Raises BitladderError for a path that leads elsewhere."""
    if not isinstance(name, str) or not name.isprintable() or pathlib.PurePath(name).name != name or "\\" in name:
        raise BitladderError(f"{where} should be the name of a file in the checkpoint's directory, not {brief(name)}")
    return folder / name
