"""Which tensor of the checkpoint becomes which tensor of the GGUF, in what type: decided before anything is written."""

import dataclasses
import re

import gguf

from bitladder.convert.checkpoint import Checkpoint, Config, Shape
from bitladder.convert.encode import STORED, Type
from bitladder.convert.family import EMBEDDING, HEAD, Family
from bitladder.convert.llama import Llama
from bitladder.convert.olmo2 import Olmo2
from bitladder.errors import BitladderError, UsageError

FAMILIES: tuple[type[Family], ...] = (Llama, Olmo2)
OUTTYPES = {
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
}
# Constants that old checkpoints saved with the weights.
IGNORED = re.compile(r"\.(rotary_emb\.inv_freq|masked_bias)$")


@dataclasses.dataclass(frozen=True)
class Move:
    """One tensor on its way: `source` in the checkpoint becomes `name` in the GGUF. `shape` has the rows first."""

    source: str
    name: str
    shape: Shape
    type: Type

    @property
    def bytes(self) -> int:
        """The size of the tensor's data in the GGUF."""
        size = STORED[self.type].itemsize
        for length in self.shape:
            size *= length
        return size


def family_for(config: Config) -> Family:
    """The model's architecture, with its sizes. Raises BitladderError if no family here has that name."""
    names = config.get("architectures", [])
    for family in FAMILIES:
        if isinstance(names, list) and any(name in family.names for name in names):
            return family(config)
    known = ", ".join(name for family in FAMILIES for name in family.names[:1])
    raise BitladderError(
        f"{config.path}: architecture {', '.join(map(str, names)) or 'not given'} is not one that bitladder converts"
        f" ({known}); --converter PATH runs llama.cpp's own convert_hf_to_gguf.py instead"
    )


def choose_outtype(checkpoint: Checkpoint, outtype: str) -> str:
    """`outtype`, with "auto" decided: bf16 if most of the checkpoint's weights are bfloat16, otherwise f16."""
    if outtype in OUTTYPES:
        return outtype
    if outtype != "auto":
        raise UsageError(f"--outtype {outtype} is not one of {', '.join(OUTTYPES)}, auto")
    weights: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        weights[tensor.dtype] = weights.get(tensor.dtype, 0) + tensor.elements
    return "bf16" if max(weights, key=lambda dtype: weights[dtype]) == "BF16" else "f16"


def plan_moves(checkpoint: Checkpoint, family: Family, outtype: str) -> list[Move]:
    """Every tensor to write from the checkpoint, in order. Matrices get `outtype`; vectors (norms, biases) stay F32.

    Raises BitladderError naming a tensor that is missing, unexpected or of the wrong shape.
    """
    required, optional = family.required(), family.optional()
    for name, shape in required.items():
        if name not in checkpoint.tensors:
            hint = " (tie_word_embeddings is false)" if name == HEAD else ""
            raise BitladderError(f"{checkpoint.folder}: the checkpoint has no tensor {name} {list(shape)}{hint}")
    sources = []
    for name in [*required, *(name for name in optional if name in checkpoint.tensors)]:
        wanted, found = (required.get(name) or optional[name]), checkpoint.tensors[name].shape
        if found != wanted:
            raise BitladderError(
                f"{checkpoint.tensors[name].file}: tensor {name} has the shape {list(found)}; by config.json it"
                f" should be {list(wanted)}"
            )
        sources.append(name)
    _refuse_others(checkpoint, family, set(sources))
    names = gguf.get_tensor_name_map(family.arch, family.blocks)
    moves = []
    for source in sources:
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise BitladderError(f"the gguf package has no name for tensor {source}; it is too old")
        moves.append(_move(source, target, checkpoint, outtype))
    if family.tied and not family.shares_embeddings:
        moves.append(_move(EMBEDDING, "output.weight", checkpoint, outtype))
    return moves


def _move(source: str, name: str, checkpoint: Checkpoint, outtype: str) -> Move:
    shape = checkpoint.tensors[source].shape
    return Move(source, name, shape, OUTTYPES[outtype][0] if len(shape) > 1 else Type.F32)


def _refuse_others(checkpoint: Checkpoint, family: Family, used: set[str]) -> None:
    """A tensor that nothing here knows would be lost: better no file than a wrong model."""
    for name, tensor in checkpoint.tensors.items():
        if name in used or IGNORED.search(name) or (name == HEAD and family.tied):
            continue
        arch = gguf.MODEL_ARCH_NAMES[family.arch]
        raise BitladderError(
            f"{tensor.file}: tensor {name} has no place in llama.cpp's {arch}; --converter PATH runs llama.cpp's own"
            " convert_hf_to_gguf.py"
        )
