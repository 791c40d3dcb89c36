"""Checkpoints whose weights are quantized already: FP8 with scales is dequantized, the rest is named and refused."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitladder.convert.checkpoint_files import Config, Shape, StoredTensor, brief, plain, read_optional
from bitladder.errors import BitladderError
from bitladder.progress import SILENT, Progress

FP8 = ("F8_E4M3", "F8_E5M2")
# The last part of a name, for "weight": DeepSeek, Qwen and transformers; compressed-tensors, ModelOpt and FBGEMM;
# DeepSeek-V4; Mistral. All of them are factors.
SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
# Scales of activations and of the KV cache. They are not part of a weight.
OTHER_SCALES = (
    "input_scale",
    "input_scale_ub",
    "activation_scale",
    "output_scale",
    "qscale_act",
    "k_scale",
    "v_scale",
    "kv_scale",
)
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


def scale_of(name: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """The name of the scales of an FP8 weight, or None."""
    if not name.endswith(".weight") or tensors[name].dtype not in FP8:
        return None
    names = (name.removesuffix("weight") + scale for scale in SCALES)
    return next((scale for scale in names if scale in tensors), None)


def names_of_scales(tensors: Mapping[str, StoredTensor]) -> set[str]:
    """The names of all tensors that belong to FP8 weights and are no weights; none if no tensor is FP8."""
    quantized = [name for name, tensor in tensors.items() if tensor.dtype in FP8]
    if not quantized:
        return set()
    used = {scale for name in quantized if (scale := scale_of(name, tensors))}
    return used | {name for name in tensors if name.rpartition(".")[2] in OTHER_SCALES}


def fp8_values(bits: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """The values of 8-bit floats.

    Source: OCP 8-bit floating point specification, revision 1.0. E4M3 has no infinities; E5M2 is the upper half of a
    float16.

    Parameters:
        bits: the bits, of any shape.
        dtype: F8_E4M3 or F8_E5M2.

    Returns:
        float32, in the same shape.
    """
    every = np.arange(256, dtype=np.uint16)
    if dtype == "F8_E5M2":
        table = (every << 8).view(np.float16).astype(np.float32)
    else:
        exponent, fraction = (every >> 3) & 15, (every & 7) / 8
        table = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent.astype(int) - 7))
        table[(every & 127) == 127] = np.nan
        table = np.where(every > 127, -table, table).astype(np.float32)
    decoded: NDArray[np.float32] = table[bits]
    return decoded


def scale_values(raw: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    """Scales as float32. Bytes are exponents: 2^(byte − 127) (E8M0); F32, F16 and BF16 are numbers."""
    if dtype in ("F8_E8M0", "U8"):
        return np.exp2(raw.astype(np.float32) - 127)
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def multiply_by_scales(
    matrix: NDArray[np.float32], factors: NDArray[np.float32], block: Shape | None, name: str
) -> NDArray[np.float32]:
    """Multiplies a matrix by its scales, in place.

    Parameters:
        matrix: [rows, columns].
        factors: one number, one for each row ([rows] or [rows, 1]), or one for each block ([⌈rows / height⌉,
            ⌈columns / width⌉]; the last blocks can be smaller).
        block: height and width of a block, by config.json; None if it does not say.
        name: name of the tensor, for the error.

    Raises:
        BitladderError: the number of scales fits neither rows nor blocks.
    """
    if factors.size == 1:
        matrix *= factors.reshape(())
        return matrix
    grid = factors.reshape(-1, 1) if factors.ndim == 1 else factors
    height, width = _block(grid.shape, matrix.shape, block, name)
    for i in range(grid.shape[0]):
        matrix[i * height : (i + 1) * height] *= np.repeat(grid[i], width)[: matrix.shape[1]]
    return matrix


def _block(grid: Shape, shape: Shape, block: Shape | None, name: str) -> Shape:
    candidates = [block] if block else []
    if len(grid) == 2 and all(count and length % count == 0 for length, count in zip(shape, grid, strict=True)):
        candidates.append((shape[0] // grid[0], shape[1] // grid[1]))
    for height, width in candidates:
        if grid == (-(-shape[0] // height), -(-shape[1] // width)):
            return height, width
    blocks = f" in blocks of {list(block)}" if block else ""
    raise BitladderError(f"tensor {name} {list(shape)}{blocks} does not fit its scales {list(grid)}")


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
