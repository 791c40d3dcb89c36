"""What a weight's name tells: its block and its kind, by the rules of llama-imatrix --show-statistics."""

import re

_BLOCK = re.compile(r"blk\.(\d+)\.")


def block_and_kind(name: str) -> tuple[int | None, str]:
    """Block number (None outside of blocks) and kind: "blk.3.attn_q.weight" is (3, "attn_q").

    The block is what follows the first part "blk", the kind what precedes the part "weight"; a name without that part
    is its own kind.
    """
    parts = name.split(".")
    block = None
    if "blk" in parts[:-1]:
        after = parts[parts.index("blk") + 1]
        block = int(after) if after.isdecimal() else None
    kind = parts[parts.index("weight", 1) - 1] if "weight" in parts[1:] else name
    return block, kind


def in_previous_block(name: str) -> str | None:
    """The name of the same tensor one block earlier; None in block 0 and outside of blocks."""
    match = _BLOCK.search(name)
    if match is None or int(match[1]) == 0:
        return None
    return f"{name[: match.start(1)]}{int(match[1]) - 1}{name[match.end(1) :]}"


def order(name: str) -> tuple[float, str, str]:
    """A key that sorts by block, then kind; what lies outside of blocks comes last."""
    block, kind = block_and_kind(name)
    return (float("inf") if block is None else block), kind, name
