"""8-bit floats with scales, as FP8 checkpoints hold them: values, and how scales spread over a matrix."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bitladder.convert.safetensors import Shape, StoredTensor
from bitladder.errors import BitladderError

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


def scale_of(name: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """The name of the scales of an FP8 weight, or None."""
    if not name.endswith(".weight") or tensors[name].dtype not in FP8:
        return None
    names = (name.removesuffix("weight") + scale for scale in SCALES)
    return next((scale for scale in names if scale in tensors), None)


def scales(tensors: Mapping[str, StoredTensor]) -> set[str]:
    """The names of all tensors that belong to FP8 weights and are no weights; none if no tensor is FP8."""
    quantized = [name for name, tensor in tensors.items() if tensor.dtype in FP8]
    if not quantized:
        return set()
    used = {scale for name in quantized if (scale := scale_of(name, tensors))}
    return used | {name for name in tensors if name.rpartition(".")[2] in OTHER_SCALES}


def values(bits: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
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


def multiply(
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
