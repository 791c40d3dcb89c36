"""What a tensor's name tells a reader of recipes: its layer, its kind, and where it is looked for."""

import re

_BLOCK = re.compile(r"(^|\.)blk\.(\d+)\.")
# Embedding and head, then a layer's weights in the order in which a token meets them.
_ORDER = ["token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


def tensor_kind(name: str) -> str:
    """A tensor's name without its block: "blk.7.attn_k.weight" → "attn_k.weight"."""
    return _BLOCK.sub(r"\1", name, count=1)


def short_kind(name: str) -> str:
    """A tensor's kind without the part that nearly all have: "blk.7.attn_k.weight" → "attn_k"."""
    return tensor_kind(name).removesuffix(".weight")


def layer_of(name: str) -> int | None:
    """A tensor's block number; None outside of the blocks."""
    match = _BLOCK.search(name)
    return int(match[2]) if match else None


def around_layer(name: str) -> tuple[str, str, str] | None:
    """A name cut at its block number: "blk.7.ffn_up.weight" → ("blk.", "7", ".ffn_up.weight"); None outside them."""
    match = _BLOCK.search(name)
    return (name[: match.start(2)], match[2], name[match.end(2) :]) if match else None


def reading_order(name: str) -> tuple[bool, bool, int, str, int, str]:
    """A key that sorts tensors as they are read: embedding and head, then kind by kind, layer by layer.

    Within each part, norms and biases come after the matrices.
    """
    kind, layer = tensor_kind(name), layer_of(name)
    aside = not kind.endswith(".weight") or "norm" in kind
    place = next((i for i, start in enumerate(_ORDER) if kind.startswith(start)), len(_ORDER))
    return layer is not None, aside, place, kind, -1 if layer is None else layer, name


def one_line(text: str) -> str:
    """A text from a file as it may stand in a line: a damaged file's names may hold control characters."""
    return "".join(one if one.isprintable() else " " for one in text)
