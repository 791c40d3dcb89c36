"""Checkpoints whose weights are quantized already: recognised, and named by their quantization_config."""

import pathlib
from typing import Any

from bitladder.convert.config import Config, brief, plain, read_optional
from bitladder.convert.fp8 import FP8
from bitladder.convert.safetensors import Shape, StoredTensor
from bitladder.errors import BitladderError
from bitladder.progress import SILENT, Progress

# Where tools write how they quantized: in config.json, or in a file of their own.
KEYS = ("quantization_config", "compression_config")
FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Tensors that hold packed weights, and who writes them.
PACKED = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors",
    "weight_scale_2": "NVFP4",
    "weight_global_scale": "NVFP4",
}
# Methods that do not change how a full-precision weight is used. Others, such as bitnet, round it as the model runs.
HARMLESS = ("bitsandbytes", "gptq", "awq", "fp8")


class Quantization:
    """What a checkpoint says about quantized weights.

    Parameters:
        folder: directory of the checkpoint.
        config: its config.json.

    Attributes:
        where: the file and key that say it, or None.
        method: the method in lower case, or None.
        block: height and width of the blocks of FP8 scales, or None.
    """

    def __init__(self, folder: pathlib.Path, config: Config) -> None:
        self.values: dict[str, Any] = {}
        self.where: str | None = None
        nested = config.get("text_config")
        for key, holder in [(key, holder) for key in KEYS for holder in (config.values, nested)]:
            if not self.values and isinstance(holder, dict) and isinstance(holder.get(key), dict):
                self.values, self.where = holder[key], f"{config.path}: {key}"
        for name in FILES:
            if not self.values and (folder / name).is_file():
                content = read_optional(folder / name, SILENT)
                inner = content.get("quantization")
                self.values, self.where = (inner if isinstance(inner, dict) else content), str(folder / name)
        method = self.values.get("quant_method") or self.values.get("quant_algo") or self.values.get("quant_type")
        self.method = plain(method.lower()) if isinstance(method, str) else ("unnamed method" if self.values else None)
        self.block = self._block()

    def _block(self) -> Shape | None:
        groups = self.values.get("config_groups")
        weights = [
            group["weights"]
            for group in (groups.values() if isinstance(groups, dict) else ())
            if isinstance(group, dict) and isinstance(group.get("weights"), dict)
        ]
        candidates = [self.values.get("weight_block_size"), *(group.get("block_structure") for group in weights)]
        for value in candidates:
            if value is None:
                continue
            if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
                return value[0], value[1]
            raise BitladderError(f"{self.where}: the size of a block should be two whole numbers, not {brief(value)}")
        return None

    def __str__(self) -> str:
        bits = next((self.values[key] for key in ("bits", "w_bit", "num_bits") if key in self.values), None)
        bits = 4 if self.values.get("load_in_4bit") is True else bits
        return f"{self.method}, {brief(bits)} bits" if isinstance(bits, int) else f"{self.method}"


def check_quantization(quantization: Quantization, tensors: dict[str, StoredTensor], progress: Progress) -> None:
    """Tells the user that FP8 weights are dequantized, or that a quantization_config is stale.

    Raises BitladderError for weights that are quantized in another way.
    """
    for name, tensor in tensors.items():
        writer = PACKED.get(name.rpartition(".")[2])
        if writer:
            how = f"{quantization.where}: {quantization}" if quantization.method else f"it looks like {writer}"
            raise _refusal(f"{tensor.file}: tensor {name} holds quantized weights ({how})")
    quantized = next((tensor for tensor in tensors.values() if tensor.dtype in FP8), None)
    if quantized is not None:
        by = (
            f"{quantization.where} says {quantization}"
            if quantization.method
            else "config.json does not say how they were made"
        )
        progress.info(f"weights in {quantized.dtype} are dequantized ({by})")
        return
    if quantization.method is None:
        return
    # compressed-tensors is also the name of a format for sparse models, whose weights are plain numbers.
    harmless = quantization.method in HARMLESS or (
        quantization.method == "compressed-tensors" and not quantization.values.get("config_groups")
    )
    odd = next((t for t in tensors.values() if t.dtype not in ("F64", "F32", "F16", "BF16")), None)
    if odd is not None or not harmless:
        what = f"tensor {odd.name} is {odd.dtype}" if odd else "its weights are rounded as the model runs"
        raise _refusal(f"{quantization.where} says that the checkpoint is quantized already ({quantization}); {what}")
    progress.warn(
        f"{quantization.where} says {quantization}, but no weight is quantized; all are converted as they are"
    )


def _refusal(what: str) -> BitladderError:
    return BitladderError(
        f"{what}; convert the model that it was made from, or dequantize it first (only FP8 is, here)"
    )
