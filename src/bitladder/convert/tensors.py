"""The tensors of a GGUF made from those of a checkpoint: which becomes which, in what type, and their bytes.

The plan is made before anything is written. A weight that the type cannot hold is an error.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from bitladder.convert.checkpoint import Checkpoint, Raw
from bitladder.convert.checkpoint_files import Shape, brief, plain
from bitladder.convert.families import BIASES, EMBEDDING, HEAD, Family
from bitladder.convert.quantized import FP8
from bitladder.engine import Workers, lost_rows
from bitladder.errors import BitladderError, UsageError
from bitladder.progress import Progress

Type = gguf.GGMLQuantizationType
OUTTYPES = {
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
}
# Constants that old checkpoints hold beside the weights.
_BLOCK = re.compile(r"model\.layers\.(\d{1,9})\.")
IGNORED = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias)$")
# The largest finite value of each type. A larger one would become infinite.
LARGEST = {Type.F32: float(np.finfo(np.float32).max), Type.F16: 65504.0, Type.BF16: float.fromhex("0x1.fep127")}
STORED: dict[Any, np.dtype[Any]] = {
    Type.F32: np.dtype(np.float32),
    Type.F16: np.dtype(np.float16),
    Type.BF16: np.dtype(np.uint16),
}
# Weights are encoded in slabs of this many, so that the float32 values in between stay in a core's cache.
SLAB = 1 << 18


@dataclasses.dataclass(frozen=True)
class TensorCopy:
    """A tensor of the GGUF that comes from one of the checkpoint.

    Parameters:
        source: its name in the checkpoint.
        name: its name in the GGUF.
        shape: its shape, rows first.
        type: its type in the GGUF.
    """

    source: str
    name: str
    shape: Shape
    type: Type

    @property
    def bytes(self) -> int:
        """Bytes of the data in the GGUF."""
        size = STORED[self.type].itemsize
        for length in self.shape:
            size *= length
        return size


def choose_outtype(checkpoint: Checkpoint, outtype: str) -> str:
    """The outtype that "auto" means: bf16 if most weights of the checkpoint are bfloat16 or FP8, otherwise f16.

    Another outtype is returned as it is. Raises UsageError for an unknown one.
    """
    if outtype in OUTTYPES:
        return outtype
    if outtype != "auto":
        raise UsageError(f"--outtype {outtype} is not one of {', '.join(OUTTYPES)}, auto")
    weights: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        weights[tensor.dtype] = weights.get(tensor.dtype, 0) + tensor.elements
    if not weights:
        raise BitladderError(f"{checkpoint.folder}: the checkpoint holds no tensors")
    return "bf16" if max(weights, key=lambda dtype: weights[dtype]) in ("BF16", *FP8) else "f16"


def plan_copies(checkpoint: Checkpoint, family: Family, outtype: str, progress: Progress) -> list[TensorCopy]:
    """The tensors of the GGUF that come from the checkpoint, in order.

    Matrices get `outtype`. Vectors (norms, biases) are F32. Where the head is tied, and the checkpoint has a head all
    the same, transformers uses it if it differs from the embeddings; so it is written then.

    Parameters:
        checkpoint: the checkpoint.
        family: its architecture and sizes.
        outtype: f16, bf16 or f32.
        progress: gets warnings.

    Raises:
        BitladderError: a tensor is missing, unexpected or of the wrong shape; the message names it.
    """
    stored = checkpoint.tensors
    embedding = HEAD if family.tied and EMBEDDING not in stored and HEAD in stored else EMBEDDING
    expected: dict[str, Shape] = {}
    for name, shape in family.required():
        source = embedding if name == EMBEDDING else name
        if source not in stored:
            raise BitladderError(f"{checkpoint.folder}: {_absence(checkpoint, family, name, shape)}")
        expected[source] = shape
    expected |= {name: shape for name, shape in family.optional() if name in stored}
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise BitladderError(
                f"{stored[name].file}: tensor {name} has the shape {brief(list(stored[name].shape))}; by config.json it"
                f" should be {list(shape)}"
            )
    _refuse_others(checkpoint, family, set(expected))
    tied = family.tied and not _has_own_head(checkpoint, progress)
    if tied and embedding != HEAD:
        expected.pop(HEAD, None)
    names = gguf.get_tensor_name_map(family.arch, family.blocks)
    copies = []
    for source in expected:
        target = names.get_name(EMBEDDING if source == embedding else source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise BitladderError(f"the gguf package has no name for tensor {source}; it is too old")
        copies.append(_copy(source, target, checkpoint, outtype))
    if tied and not family.shares_embeddings:
        copies.append(_copy(embedding, "output.weight", checkpoint, outtype))
    return copies


def _absence(checkpoint: Checkpoint, family: Family, name: str, shape: Shape) -> str:
    """Why a tensor is missed: config.json says something else than the files hold."""
    numbers = {int(match[1]) for match in map(_BLOCK.match, checkpoint.tensors) if match}
    block = _BLOCK.match(name)
    if block and int(block[1]) not in numbers and numbers:
        return (
            f"the checkpoint has no tensor {name}: config.json says num_hidden_layers {family.blocks}, the files hold"
            f" blocks {min(numbers)} to {max(numbers)}"
        )
    hint = " (tie_word_embeddings is false)" if name == HEAD else ""
    return f"the checkpoint has no tensor {name} {list(shape)}{hint}"


def _has_own_head(checkpoint: Checkpoint, progress: Progress) -> bool:
    """Whether a checkpoint with a tied head holds a head that differs from the embeddings. The user is told of it."""
    if HEAD not in checkpoint.tensors or EMBEDDING not in checkpoint.tensors:
        return False
    head, embeddings = (checkpoint.read(name) for name in (HEAD, EMBEDDING))
    pairs = zip(_slabs(head), _slabs(embeddings), strict=True)
    if all(np.array_equal(first, second) for (_, first), (_, second) in pairs):
        return False
    progress.warn(
        f"{checkpoint.config.path}: tie_word_embeddings is true, but the checkpoint has a tensor {HEAD} that differs"
        " from the embeddings; it is used, as transformers does"
    )
    return True


def _copy(source: str, name: str, checkpoint: Checkpoint, outtype: str) -> TensorCopy:
    shape = checkpoint.tensors[source].shape
    return TensorCopy(source, name, shape, OUTTYPES[outtype][0] if len(shape) > 1 else Type.F32)


def _refuse_others(checkpoint: Checkpoint, family: Family, used: set[str]) -> None:
    """Raises BitladderError for a tensor that would be lost: better no file than a wrong model."""
    for name, tensor in checkpoint.tensors.items():
        if name in used or IGNORED.search(name):
            continue
        key = next((key for part, key in BIASES.items() if name.endswith(".bias") and f".{part}." in name), None)
        if key and not family.config.boolean(key):
            raise BitladderError(
                f"{tensor.file}: there is a tensor {plain(name)}, but {key} is not true in config.json"
            )
        arch = gguf.MODEL_ARCH_NAMES[family.arch]
        raise BitladderError(
            f"{tensor.file}: tensor {plain(name)} has no place in llama.cpp's {arch}; --converter PATH runs"
            " llama.cpp's own convert_hf_to_gguf.py"
        )


def check_finite(name: str, raw: Raw) -> None:
    """Raises BitladderError that names the first NaN or infinite weight of a tensor, with its index."""
    first = first_not_finite(raw)
    if first is not None:
        place, value = first
        index = [int(i) for i in np.unravel_index(place, raw.shape)]
        raise BitladderError(f"tensor {name} has the value {value} at index {index}; the checkpoint is damaged")


def first_not_finite(raw: Raw) -> tuple[int, np.float32] | None:
    """The place in the flattened tensor of the first NaN or infinite weight, and the weight; None if there is none."""
    for start, slab in _slabs(raw):
        bad = ~np.isfinite(slab)
        if bad.any():
            first = int(bad.argmax())
            return start + first, slab[first]
    return None


def encode(name: str, raw: Raw, target: Type, workers: Workers) -> tuple[NDArray[Any], int]:
    """A tensor in another format, rounded to nearest, ties to even.

    Parameters:
        name: name of the tensor, for the error.
        raw: the weights as the checkpoint has them.
        target: F32, F16 or BF16.
        workers: threads that share the work.

    Returns:
        The weights in the same shape, BF16 as its bits in uint16; and how many rows of a matrix F16 loses
        (`engine.lost_rows`).

    Raises:
        BitladderError: a weight is too large for `target`, or not finite.
    """
    width = max(raw.shape[-1] if raw.ndim > 1 else raw.size, 1)
    rows, step = raw.reshape(-1, width), max(1, SLAB // width)
    out = np.empty(rows.shape, STORED[target])
    lossy = target == Type.F16 and raw.ndim > 1  # BF16 has the exponents of F32
    refused: dict[int, np.float32] = {}
    lost = [0] * -(-len(rows) // step)

    def work(piece: int, slot: int) -> None:
        del slot
        part = slice(piece * step, (piece + 1) * step)
        weights = _float32(rows[part])
        if not max(weights.max(), -weights.min()) <= LARGEST[target]:
            refused[piece] = weights.flat[np.abs(weights).argmax()]
            return
        out[part] = _bfloat16(weights) if target == Type.BF16 else weights
        if lossy:
            lost[piece] = lost_rows(weights, out[part].astype(np.float32))

    workers.run(len(lost), work)
    if refused:
        raise BitladderError(
            f"tensor {name} has the weight {refused[min(refused)]:g}, which {target.name} cannot hold (at most"
            f" {LARGEST[target]:g}); use --outtype {'bf16' if target == Type.F16 else 'f32'}"
        )
    return out.reshape(raw.shape), sum(lost)


def _slabs(raw: Raw) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The slabs of a flattened tensor: position, and weights as float32."""
    flat = raw.reshape(-1)
    for start in range(0, flat.size, SLAB):
        yield start, _float32(flat[start : start + SLAB])


def _float32(weights: Raw) -> NDArray[np.float32]:
    """Weights as the checkpoint has them (BF16 as its bits), as float32."""
    if weights.dtype == np.uint16:
        return (weights.astype(np.uint32) << 16).view(np.float32)
    return weights.astype(np.float32)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite float32 values, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
