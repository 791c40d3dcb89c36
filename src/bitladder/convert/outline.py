"""The GGUF that a conversion would write, without its weights: what can be known from names, shapes and config.json."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import gguf

from bitladder.convert.build import add_hole, uses_upstream, write_file
from bitladder.convert.checkpoint import Checkpoint
from bitladder.convert.checkpoint_files import Shape
from bitladder.convert.families import architectures, family_for
from bitladder.convert.options import ConvertOptions
from bitladder.convert.quantized import check_quantization
from bitladder.convert.tensors import OUTTYPES, STORED, choose_outtype, plan_copies
from bitladder.convert.upstream import refuse_code
from bitladder.convert.upstream_checks import known_to, refuse_incomplete
from bitladder.errors import BitladderError
from bitladder.progress import SILENT, Progress

# Files of which a tokenizer has one; what the others hold is in it or belongs to it.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")
# Methods of gguf.GGUFWriter, and the keys of config.json that have their value.
NUMBERS = {
    "add_context_length": ("max_position_embeddings", "n_positions", "n_ctx"),
    "add_embedding_length": ("hidden_size", "n_embd", "d_model"),
    "add_feed_forward_length": ("intermediate_size", "n_inner", "ffn_dim"),
    "add_head_count": ("num_attention_heads", "n_head"),
    "add_head_count_kv": ("num_key_value_heads",),
    "add_key_length": ("head_dim",),
    "add_value_length": ("head_dim",),
    "add_expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "add_expert_used_count": ("num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    "add_sliding_window": ("sliding_window",),
    "add_nextn_predict_layers": ("num_nextn_predict_layers", "mtp_num_hidden_layers"),
}
_EXPERT = re.compile(r"\.experts\.\d+\.")
_OTHERS = re.compile(r"visual|vision|audio|image|speech|projector|connector|patch_embed")


@dataclasses.dataclass(frozen=True)
class Outline:
    """What a conversion would write.

    Parameters:
        path: the GGUF, in which a hole stands for the weights.
        native: whether bitladder converts the checkpoint itself. Only then metadata and types are exact.
        tokenizer: the files of the tokenizer, with their bytes.
        projector: whether a projector of images or sounds is converted beside the model.
        perception: weights of the parts for images or sounds.
        prediction: weights of heads that predict further tokens, whose names in the GGUF are not known here.
        unmatched: matrices whose names in the GGUF are not known here, with the number of weights.
    """

    path: pathlib.Path
    native: bool
    tokenizer: dict[str, int]
    projector: bool = False
    perception: int = 0
    prediction: int = 0
    unmatched: dict[str, int] = dataclasses.field(default_factory=dict)


def write_outline(
    folder: pathlib.Path,
    out: pathlib.Path,
    options: ConvertOptions,
    *,
    vocabulary: bool = True,
    progress: Progress = SILENT,
) -> Outline:
    """Writes the outline of a checkpoint. No weights are read.

    Parameters:
        folder: directory of the checkpoint, or of its outline (`hub.fetch_outline`).
        out: the file to write.
        options: how it would be converted.
        vocabulary: whether the files of the tokenizer are whole, so that they are read.
        progress: gets warnings.

    Raises:
        BitladderError: the checkpoint cannot be converted.
    """
    checkpoint = Checkpoint(folder, progress)
    tokenizer = {name: (folder / name).stat().st_size for name in TOKENIZERS if (folder / name).is_file()}
    if not tokenizer:
        raise BitladderError(f"{folder} has no tokenizer: none of {', '.join(TOKENIZERS)}")
    outtype = choose_outtype(checkpoint, options.outtype)
    check_quantization(checkpoint.quantization, checkpoint.tensors, progress)
    if uses_upstream(folder, upstream=options.upstream, converter=options.converter):
        return _of_upstream(checkpoint, out, options, outtype, tokenizer, progress)
    family = family_for(checkpoint.config)
    copies = plan_copies(checkpoint, family, outtype, progress)
    write_file(
        out, checkpoint, family, copies, outtype=outtype, progress=progress, vocabulary=vocabulary, weights=False
    )
    return Outline(out, True, tokenizer)


def _of_upstream(
    checkpoint: Checkpoint,
    out: pathlib.Path,
    options: ConvertOptions,
    outtype: str,
    tokenizer: dict[str, int],
    progress: Progress,
) -> Outline:
    """The outline of what llama.cpp's converter would write, as far as the gguf package has the names of tensors."""
    config, names = checkpoint.config, architectures(checkpoint.config)
    refuse_code(checkpoint.folder, names, trusted=options.trust_remote_code)
    refuse_incomplete(config.values, config.path)
    known = known_to(options.converter, config.values, progress)
    if known.architecture is None:
        raise BitladderError(
            f"{config.path}: {', '.join(names) or 'an architecture without a name'} is known neither to bitladder nor "
            "to llama.cpp's converter"
        )
    values = {**config.values, **(config.get("text_config") or {})}
    blocks = _number(values, ("num_hidden_layers", "n_layer", "num_layers", "n_layers")) or 0
    blocks += _number(values, NUMBERS["add_nextn_predict_layers"]) or 0
    shapes: dict[str, Shape] = {}
    left = {"perception": 0, "prediction": 0}
    unmatched: dict[str, int] = {}
    for name, target, shape in _named(checkpoint, known.architecture, blocks):
        weights = checkpoint.tensors[name].elements
        if _OTHERS.search(name):
            left["perception"] += weights
        elif target is not None and "_exps." in target:
            several = shape if len(shape) > 2 else (1, *shape)
            shapes[target] = (several[0] + shapes.get(target, (0,))[0], *several[1:])
        elif target is not None:
            shapes[target] = shape
        elif name.startswith("mtp."):
            left["prediction"] += weights
        elif len(shape) > 1:
            unmatched[name] = weights
    _write(out, known.architecture, values, blocks, shapes, outtype)
    return Outline(out, False, tokenizer, known.projector and options.mmproj, unmatched=unmatched, **left)


def _write(
    out: pathlib.Path, architecture: str, values: Mapping[str, Any], blocks: int, shapes: dict[str, Shape], outtype: str
) -> None:
    """Writes a header with the usual metadata, and a hole for the tensors."""
    writer = gguf.GGUFWriter(None, architecture)
    try:
        writer.add_block_count(blocks)
        for method, keys in NUMBERS.items():
            if (number := _number(values, keys)) is not None:
                getattr(writer, method)(number)
        sizes = []
        for target, shape in shapes.items():
            kind = OUTTYPES["f32" if len(shape) < 2 else outtype][0]
            sizes.append(STORED[kind].itemsize * math.prod(shape))
            writer.add_tensor_info(target, shape, STORED[kind], sizes[-1], raw_dtype=kind)
        writer.write_header_to_file(out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    add_hole(out, sizes)


def _number(values: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """The first of some keys that has a whole number above 0."""
    return next((value for key in keys if type(value := values.get(key)) is int and value > 0), None)


def _named(checkpoint: Checkpoint, architecture: str, blocks: int) -> Iterator[tuple[str, str | None, Shape]]:
    """The tensors of a checkpoint: name, name in the GGUF or None, and shape. Experts have one name together."""
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}.get(architecture)
    table = None if arch is None else gguf.get_tensor_name_map(arch, blocks)
    for name, tensor in checkpoint.tensors.items():
        plain = _EXPERT.sub(".experts.", name.replace("language_model.", ""))
        tries = (plain, f"model.{plain}", plain.removeprefix("model."), plain.replace("model.model.", "model."))
        names = (table.get_name(spelled, try_suffixes=(".weight", ".bias")) for spelled in tries) if table else ()
        target: str | None = next(filter(None, names), None)
        # Tensors of experts that transformers stacks have no suffix.
        if target is not None and not target.endswith((".weight", ".bias")) and plain.endswith("_proj"):
            target += ".weight"
        yield name, target, tensor.shape
