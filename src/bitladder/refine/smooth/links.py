"""Where the scale of a channel can move from one weight to another while the model computes the same.

A weight W multiplies channels x. If x is linear in something for each channel (the weight of a norm, the rows of
another matrix), that can make x_i / s_i, and the column W_i · s_i multiplies it: the product is the same.

- attn_norm, or ffn_norm, before q, k, v, or gate, up (those of experts and their router too);
- the rows of v before attn_output: attention only mixes tokens, so that a channel of v stays a channel;
- the rows of up before down: a gated activation is f(gate) · up, linear in up;
- output_norm before the head, if the head is not the token embedding too.

Names do not prove that nothing else reads a channel. `smooth_model` compares the logits.
"""

import dataclasses
from collections.abc import Sequence

from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile, block_of, block_prefix


class SmoothingError(BitladderError):
    """A model in which no scale can move."""


FLOATS = ("f32", "f16", "bf16")  # types of weights that can change
_EXPERTS = ("_exps", "_shexp")
# The norm, and what may multiply its output. A norm that meets other matrices than these is left alone.
_NORMS = {
    "attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "ffn_norm": (
        *("ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps"),
        *("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate_inp_shexp"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Link:
    """Channels that some tensors make and the columns of others multiply.

    Readers see `groups` × `repeats` × `size` channels, of which makers have `groups` × `size`. Attention heads that
    share a head of v are `repeats`; else there are 1 × 1 × channels.

    Parameters:
        kind: the maker's part of the name, such as "attn_norm".
        makers: a vector of the channels, or a matrix with a row for each; and its bias.
        readers: matrices with a column for each channel.
        size: channels of a head, or all.
        groups: heads of v.
        repeats: heads of attention that share a head of v.
        matrices: the number of experts, each of which has scales of its own, or 1.
    """

    kind: str
    makers: tuple[str, ...]
    readers: tuple[str, ...]
    size: int
    groups: int = 1
    repeats: int = 1
    matrices: int = 1


def links_of(file: GgufFile) -> list[Link]:
    """The links of a model, by block. Raises SmoothingError for a model without any that is known here."""
    blocks = sorted({block for name in file.tensors if (block := block_of(name)) is not None})
    links = [link for block in blocks for link in _of_block(file, block)]
    if "output.weight" in file.tensors and "output_norm.weight" in file.tensors:
        links.append(_of_norm(file, "output_norm", ["output.weight"]))
    if not links:
        raise SmoothingError(
            f"{file.path}: no norm, v or up whose scale can move ({file.architecture or 'no architecture'}); "
            "use it without smoothing"
        )
    return links


def _of_block(file: GgufFile, block: int) -> list[Link]:
    start, links = block_prefix(block), []
    names = {name.removeprefix(start).removesuffix(".weight") for name in file.tensors if name.startswith(start)}
    for norm, known in _NORMS.items():
        readers = [f"{start}{stem}.weight" for stem in known if stem in names]
        # With attention and feed-forward side by side one norm serves both, and the other does not exist.
        if norm in names and len(readers) > 1 and _NORMS.keys() <= names:
            links.append(_of_norm(file, start + norm, readers))
    if {"attn_v", "attn_output"} <= names and not names & {"attn_sub_norm", "attn_v_norm"}:
        links += _of_values(file, block, start)
    for suffix in ("", *_EXPERTS):
        if {f"ffn_{stem}{suffix}" for stem in ("gate", "up", "down")} <= names and "ffn_sub_norm" not in names:
            down = file.tensors[f"{start}ffn_down{suffix}.weight"]
            matrices = down.rows // down.rows_per_matrix
            maker = f"{start}ffn_up{suffix}"
            links.append(
                Link("ffn_up", _with_bias(file, maker), (down.name,), down.width, matrices=matrices),
            )
    return links


def _of_norm(file: GgufFile, norm: str, readers: Sequence[str]) -> Link:
    kind = norm.rpartition(".")[2]
    return Link(kind, _with_bias(file, norm), tuple(readers), file.tensors[norm + ".weight"].width)


def _of_values(file: GgufFile, block: int, start: str) -> list[Link]:
    values, output = file.tensors[f"{start}attn_v.weight"], file.tensors[f"{start}attn_output.weight"]
    repeats, groups = output.width // values.rows, 1
    if repeats > 1:
        heads = file.get(f"{file.architecture}.attention.head_count_kv", 0)
        groups = heads[block] if isinstance(heads, list) else heads
    if not groups or values.rows % groups or values.rows * repeats != output.width:
        return []
    makers = _with_bias(file, f"{start}attn_v")
    return [Link("attn_v", makers, (output.name,), values.rows // groups, groups, repeats)]


def _with_bias(file: GgufFile, stem: str) -> tuple[str, ...]:
    return tuple(name for name in (f"{stem}.weight", f"{stem}.bias") if name in file.tensors)
