"""Tensor names: the one parser of block and kind, the orders in which tensors are listed, and names in text.

llama.cpp names a tensor of a block "blk.7.attn_k.weight": block 7, kind attn_k. Where a model has several towers, a
prefix comes first ("enc.blk.7.attn_k.weight"), and it belongs to the kind.
"""

import re
from collections.abc import Iterable

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_BLOCK = re.compile(r"(^|\.)blk\.(\d+)\.")
# Embedding and head, then the weights of a block in the order in which a token meets them.
_ORDER = ["token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


def block_of(name: str) -> int | None:
    """The block number of a tensor; None outside the blocks.

    Example:
        >>> block_of("blk.7.attn_k.weight"), block_of("output.weight")
        (7, None)
    """
    match = _BLOCK.search(name)
    return int(match[2]) if match else None


def name_in_block(name: str) -> str:
    """The name of a tensor without its block.

    Example:
        >>> name_in_block("blk.7.attn_k.weight"), name_in_block("enc.blk.7.attn_k.bias")
        ('attn_k.weight', 'enc.attn_k.bias')
    """
    return _BLOCK.sub(r"\1", name, count=1)


def kind_of(name: str) -> str:
    """The kind of a tensor: its name without its block and without ".weight".

    Example:
        >>> kind_of("blk.7.attn_k.weight"), kind_of("blk.7.attn_k.bias"), kind_of("output.weight")
        ('attn_k', 'attn_k.bias', 'output')
    """
    return name_in_block(name).removesuffix(".weight")


def around_block(name: str) -> tuple[str, str, str] | None:
    """A name cut before and after its block number; None outside the blocks.

    Example:
        >>> around_block("blk.7.ffn_up.weight")
        ('blk.', '7', '.ffn_up.weight')
    """
    match = _BLOCK.search(name)
    return (name[: match.start(2)], match[2], name[match.end(2) :]) if match else None


def block_prefix(block: int) -> str:
    """What the names of all tensors of a block begin with, where the model has one tower."""
    return f"blk.{block}."


def in_main_block(name: str) -> bool:
    """Whether a tensor is in a block of the main tower. llama-imatrix collects the inputs of these weights."""
    return name.startswith("blk.")


def reading_order(name: str) -> tuple[bool, bool, int, str, int, str]:
    """A sort key for people: embedding and head, then kind by kind, block by block; norms and biases after matrices."""
    rest, block = name_in_block(name), block_of(name)
    vector = not rest.endswith(".weight") or "norm" in rest
    place = next((i for i, start in enumerate(_ORDER) if rest.startswith(start)), len(_ORDER))
    return block is not None, vector, place, rest, -1 if block is None else block, name


def imatrix_place(name: str) -> tuple[int | None, str]:
    """Block number (None outside the blocks) and kind by the rules of llama-imatrix --show-statistics.

    The block follows the first part "blk". The kind precedes the part "weight". A name without that part is its own
    kind. Source: process_tensor_name in tools/imatrix/imatrix.cpp.

    Example:
        >>> imatrix_place("blk.3.attn_q.weight"), imatrix_place("blk.3.ffn_up.1.weight")
        ((3, 'attn_q'), (3, '1'))
    """
    parts = name.split(".")
    block = None
    if "blk" in parts[:-1]:
        after = parts[parts.index("blk") + 1]
        block = int(after) if after.isdecimal() else None
    kind = parts[parts.index("weight", 1) - 1] if "weight" in parts[1:] else name
    return block, kind


def imatrix_order(name: str) -> tuple[float, str, str]:
    """A sort key by `imatrix_place`: block by block, kind by kind; the tensors outside the blocks come last."""
    block, kind = imatrix_place(name)
    return (float("inf") if block is None else block), kind, name


def in_previous_block(name: str) -> str | None:
    """The name of the same tensor one block earlier; None in block 0 and outside the blocks."""
    parts = around_block(name)
    if parts is None or int(parts[1]) == 0:
        return None
    return f"{parts[0]}{int(parts[1]) - 1}{parts[2]}"


def ranges(numbers: Iterable[int]) -> str:
    """Numbers of blocks or experts in few words.

    Example:
        >>> ranges([5, 0, 1, 2])
        '0-2, 5'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def one_line(text: str) -> str:
    """A text from a file on one line: control characters, which a damaged file can have, become spaces."""
    return "".join(character if character.isprintable() else " " for character in text)
