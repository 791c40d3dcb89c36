"""Loss at the small end: rows whose weights are too small for a floating-point type.

F16 has no number below 6e-8, and fewer digits below 6e-5. Weights there become 0 or lose most of their digits without
an error. What counts is the row: a few weights that vanish beside large ones cost nothing.
"""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# Squared error of a row, as a share of its squares. Where nothing underflows, F16 has 1e-7 and BF16 4e-6.
_MOST = 1e-4


def lost_rows(weights: Floats, stored: Floats) -> int:
    """How many rows lose more than 1 % of their size because their weights are too small for the type.

    Parameters:
        weights: the weights, float32 [rows, width].
        stored: what the type stores of them, expanded, float32 [rows, width].

    Example:
        >>> tiny = np.array([[1.0, 1e-9], [1e-9, 2e-9]], np.float32)
        >>> lost_rows(tiny, tiny.astype(np.float16).astype(np.float32))
        1
    """
    # Squares of small float32 numbers vanish themselves, so rows are scaled to 1 first.
    largest = np.abs(weights).max(axis=1, initial=0)
    small = np.flatnonzero((largest > 0) & (largest < 1))
    if not len(small):
        return 0
    scale = largest[small].astype(np.float64)[:, None]
    scaled = weights[small] / scale
    gap = stored[small] / scale - scaled
    return int((np.square(gap).sum(axis=1) > _MOST * np.square(scaled).sum(axis=1)).sum())


def lost_in(name: str, lost: int, of: int, kind: str, remedy: str, unit: str = "rows") -> str:
    """The warning of a tensor that loses rows, or blocks, at the small end.

    Example:
        >>> lost_in("blk.0.attn_k.weight", 2, 2, "f16", "convert with --outtype bf16")
        'blk.0.attn_k.weight: all rows are lost, because f16 has no numbers as small; convert with --outtype bf16'
    """
    some = f"all {unit} are" if lost == of else f"{lost} of {of} {unit} are"
    return f"{name}: {some} lost, because {kind} has no numbers as small; {remedy}"
