"""The matrices of a model and how they are used, from a GGUF's header, those of safetensors files, or config.json."""

import collections
import dataclasses
import math
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import gguf

from bitladder import hub
from bitladder.convert import Checkpoint, read_json
from bitladder.errors import BitladderError
from bitladder.gguf import EMBEDDING, HEAD, GgufFile, TensorInfo, block_of, kind_of, open_model

_HEADS, _WIDE = ("attn_q", "attn_k"), ("ffn_gate", "ffn_up")
_SAME_INPUT = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate", "ffn_up_exps": "ffn_gate_exps"}
_SHARED = {"ffn_up": "ffn_gate", "ffn_up_exps": "ffn_gate_exps"}  # with one input by gradients
_BLOCK, _EXPERT = re.compile(r"\.(\d+)\."), re.compile(r"\.experts\.\d+\.")
_EXPERTS = "_exps"
_BEGINNINGS = (8 << 20, 32 << 20, 128 << 20)  # bytes that are fetched for a header: the vocabulary takes most
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
# Parts of a checkpoint that conversion leaves out.
_OTHER_TOWERS = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|mm_\w+|multi_modal_projector|mtp)\.")


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Matrices of one kind and shape in the blocks of a model.

    Parameters:
        kind: the kind, as in a GGUF.
        rows: outputs.
        width: inputs.
        count: how many there are, over all blocks and experts.
        share: the share of tokens that reaches each of them; below 1 for experts.
    """

    kind: str
    rows: int
    width: int
    count: int
    share: float = 1.0

    @property
    def squares(self) -> float:
        """count · width²: the size of second moments of the inputs."""
        return float(self.count * self.width**2)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A model, as far as it decides costs.

    Parameters:
        weights: number of all weights.
        matrices: those of the blocks.
        blocks: number of blocks.
        width: of the residual stream.
        vocabulary: number of tokens.
        tied: whether the head is the token embedding.
        head_size: numbers of an attention head.
        bytes: of the full-precision file, if there is one.
    """

    weights: int
    matrices: tuple[Matrix, ...]
    blocks: int
    width: int
    vocabulary: int
    tied: bool
    head_size: int
    bytes: int | None = None

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.width

    @property
    def active(self) -> float:
        """Weights of the blocks that a token is multiplied by."""
        return sum(matrix.count * matrix.share * matrix.rows * matrix.width for matrix in self.matrices)

    @property
    def inputs(self) -> list[Matrix]:
        """Matrices whose inputs no other one shares: k and v have those of q, and up has those of gate."""
        kinds = {matrix.kind for matrix in self.matrices}
        return [matrix for matrix in self.matrices if _SAME_INPUT.get(matrix.kind) not in kinds]

    @property
    def gradient_squares(self) -> list[tuple[float, float]]:
        """Second moments by gradients of all weights: of inputs, and of outputs that are kept whole.

        Each is its size, and the share of tokens that it is added up over.
        """
        sizes, kinds = list[tuple[float, float]](), {matrix.kind for matrix in self.matrices}
        for matrix in self.matrices:
            if _SHARED.get(matrix.kind) not in kinds:
                sizes.append((matrix.squares, matrix.share))
            if matrix.kind in _HEADS:
                sizes.append((float(matrix.count * matrix.rows * self.head_size), 1.0))
            elif matrix.kind not in _WIDE and not matrix.kind.endswith(_EXPERTS):
                sizes.append((float(matrix.count * matrix.rows**2), 1.0))
        return sizes

    @property
    def factor_rows(self) -> int:
        """Rows of the factors that stand for second moments of the outputs of gate and up."""
        return sum(matrix.count * matrix.rows for matrix in self.matrices if matrix.kind in _WIDE)

    @property
    def largest(self) -> int:
        """Weights of the largest matrix, the head included."""
        return max([self.head, *(matrix.rows * matrix.width for matrix in self.matrices)])


def shape_of_gguf(path: pathlib.Path, full: str | None = None) -> ModelShape:
    """The shape of a GGUF, of which only the header is read.

    Parameters:
        path: the file.
        full: what the file is called where it must be in full precision; None if it may be quantized.

    Raises:
        BitladderError: it is not a model, or is quantized already.
    """
    with open_model(path) as file:
        if full is not None:
            refuse_quantized(file, full)
        return _of_open_gguf(file)


def quantized_tensor(file: GgufFile) -> TensorInfo | None:
    """The first quantized tensor of a model; None if it is in full precision."""
    return next((tensor for tensor in file.tensors.values() if tensor.type.quantized), None)


def refuse_quantized(file: GgufFile, name: str) -> None:
    """Refuses a model that is quantized already. Raises BitladderError that names a tensor of it."""
    if quantized := quantized_tensor(file):
        raise BitladderError(
            f"{name} is quantized already ({quantized.name} is {quantized.type.name}); start from F16, BF16 or F32"
        )


def outline_of_gguf(model: str, folder: pathlib.Path) -> pathlib.Path:
    """The header of a GGUF on the hub, in a file of its size whose other bytes are holes.

    Parameters:
        model: OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf.
        folder: an existing directory for it, and for its shards.

    Raises:
        BitladderError: the hub does not give it, or it has no whole header in the first 128 MiB.
    """
    reason = ""
    for size in _BEGINNINGS:
        path = hub.fetch_beginning(model, folder, size)
        try:
            with GgufFile(path):
                return path
        except BitladderError as error:  # the header is longer: what is missing is zeros, with which none goes on
            reason = str(error).replace(f"{folder}/", "")
    raise BitladderError(f"{model}: the first {_BEGINNINGS[-1]:,} bytes hold no whole header: {reason}")


def _of_open_gguf(file: GgufFile) -> ModelShape:
    arch = file.architecture
    experts, used = (int(file.get(f"{arch}.{key}", 0) or 0) for key in ("expert_count", "expert_used_count"))
    counts: collections.Counter[Matrix] = collections.Counter()
    for name, tensor in file.tensors.items():
        rows, width = tensor.rows_per_matrix, tensor.width
        if name not in (EMBEDDING, HEAD) and rows > 1 and width > 1:
            matrices = tensor.rows // rows
            share = used / experts if matrices > 1 and experts else 1.0
            counts[Matrix(kind_of(name), rows, width, 1, share)] += matrices
    if not counts:
        raise BitladderError(f"{file.path} has no weight matrices; it is not a model")
    embedding = file.tensors.get(EMBEDDING) or max(file.tensors.values(), key=lambda tensor: tensor.elements)
    heads = file.get(f"{arch}.attention.head_count", 1)
    heads = max(heads) if isinstance(heads, list) else heads
    return _shape(
        counts,
        weights=sum(tensor.elements for tensor in file.tensors.values()),
        blocks=1 + max((block_of(name) or 0 for name in file.tensors), default=0),
        width=embedding.width,
        vocabulary=embedding.rows,
        tied=HEAD not in file.tensors,
        head_size=int(file.get(f"{arch}.attention.key_length", embedding.width // max(1, heads))),
        bytes=file.size,
    )


def shape_of_checkpoint(model: str, folder: pathlib.Path | None) -> ModelShape:
    """The shape of a checkpoint: from the headers of its safetensors files, or without such files from config.json.

    Parameters:
        model: the directory, or the id of the hub, of which only config.json and these headers are fetched.
        folder: the directory, if it is one.

    Raises:
        BitladderError: config.json is missing or lacks a size, or the hub does not give it.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as outline:
            hub.fetch_outline(model, pathlib.Path(outline))
            return shape_of_checkpoint(model, pathlib.Path(outline))
    if any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").exists():
        checkpoint = Checkpoint(folder)
        config = checkpoint.config.values
        tensors = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    else:
        config, tensors = read_json(folder / "config.json"), {}
    text = config.get("text_config") or config
    return _of_tensors(text, tensors, model) if tensors else _of_config(text, model)


def _of_tensors(config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], model: str) -> ModelShape:
    """The shape of a model with tensors of these shapes, rows first. What is not known for another use is a matrix."""
    blocks = 1 + max((int(match[1]) for name in tensors if (match := _BLOCK.search(name))), default=0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    counts: collections.Counter[Matrix] = collections.Counter()
    embedding: tuple[int, ...] | None = None
    head, weights = False, 0
    for name, shape in tensors.items():
        if _OTHER_TOWERS.search(name):
            continue
        weights += math.prod(shape)
        known = names.get_name(_EXPERT.sub(".experts.", name), try_suffixes=(".weight",)) or name
        if len(shape) < 2 or min(shape[-2:]) < 2:
            continue
        if known == EMBEDDING or name.endswith(_EMBEDDINGS):
            embedding = shape
        elif known == HEAD or name.endswith("lm_head.weight"):
            head = True
        else:
            experts = math.prod(shape[:-2])
            share = _expert_share(config) if ".experts." in name else 1.0
            kind = kind_of(known) if block_of(known) is not None else name.removesuffix(".weight").split(".")[-1]
            counts[Matrix(kind, shape[-2], shape[-1], 1, share)] += experts
    if not counts:
        raise BitladderError(f"{model} has no weight matrices; it is not a model")
    embedding = embedding or max(tensors.values(), key=math.prod)
    heads = int(config.get("num_attention_heads") or 1)
    return _shape(
        counts,
        weights=weights,
        blocks=blocks,
        width=embedding[-1],
        vocabulary=embedding[0],
        tied=not head,
        head_size=int(config.get("head_dim") or embedding[-1] // heads),
    )


def _of_config(config: Mapping[str, Any], model: str) -> ModelShape:
    """The shape of a model like Llama. Experts have the three matrices of its feed-forward network."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    missing = [key for key in sizes if not isinstance(config.get(key), int)]
    if missing:
        raise BitladderError(f"{model}: config.json has no {missing[0]}; the cost needs it, or the safetensors files")
    width, blocks, heads, inner, vocabulary = (int(config[key]) for key in sizes)
    head = int(config.get("head_dim") or width // heads)
    keys = head * int(config.get("num_key_value_heads") or heads)
    experts = _experts(config)
    inner = int(config.get("moe_intermediate_size") or inner) if experts > 1 else inner
    share = _expert_share(config) if experts > 1 else 1.0
    counts: collections.Counter[Matrix] = collections.Counter()
    for kind, rows, columns in (("attn_q", heads * head, width), ("attn_k", keys, width), ("attn_v", keys, width),
                                ("attn_output", width, heads * head)):  # fmt: skip
        counts[Matrix(kind, rows, columns, 1)] += blocks
    for kind, rows, columns in (("ffn_gate", inner, width), ("ffn_up", inner, width), ("ffn_down", width, inner)):
        counts[Matrix(kind if experts == 1 else f"{kind}_exps", rows, columns, 1, share)] += blocks * experts
    tied = bool(config.get("tie_word_embeddings", False))
    own = sum(matrix.rows * matrix.width * count for matrix, count in counts.items())
    weights = own + (1 if tied else 2) * vocabulary * width + (2 * blocks + 1) * width
    return _shape(counts, weights=weights, blocks=blocks, width=width, vocabulary=vocabulary, tied=tied, head_size=head)


def _experts(config: Mapping[str, Any]) -> int:
    """Experts of a block; 1 for a dense model."""
    return int(config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts") or 1)


def _expert_share(config: Mapping[str, Any]) -> float:
    """The share of tokens that reaches an expert."""
    used = config.get("num_experts_per_tok") or config.get("num_experts_per_token") or config.get("moe_topk") or 1
    return min(1.0, int(used) / _experts(config))


def _shape(counts: Mapping[Matrix, int], **rest: Any) -> ModelShape:
    matrices = tuple(dataclasses.replace(matrix, count=count) for matrix, count in counts.items())
    return ModelShape(matrices=matrices, **rest)
