"""What all inner loops of rounding share, compiled by numba.

All of them lower f = (t − v)ᵀ H (t − v) for one row: t is the target, v the values that the type can say, H the second
moments of the input. `delta` is t − v and `slope` is H · delta, half of −∂f/∂v. Later passes only move the two along
with v. Their delta may be w − v, where t is the weight w plus what the row makes up for of other rows' errors. An
`entry` takes what changes from call to call one by one, however much it is; named tuples hold what stays.

Example:
    >>> float(half(np.float32(0.1))), float(half(np.float32(1e6)))
    (0.0999755859375, 65504.0)
"""

import contextlib
import pathlib
import time
from typing import Any

import numba
import numpy as np


def _cache() -> pathlib.Path | None:
    """The folder where numba keeps compiled loops. Where it finds none, each process compiles them again."""
    try:
        loop = numba.njit(cache=True)(_cache)
    except RuntimeError:
        return None
    return pathlib.Path(str(loop.stats.cache_path))


def _drop_older(folder: pathlib.Path) -> None:
    """Removes the index of each compiled loop that is older than a source of this package.

    Numba compares an index with the loop's own file. But a loop has those of other files in it, and the index names
    classes of theirs: it cannot be read where one has another name now.
    """
    sources = pathlib.Path(__file__).parent.glob("*.py")
    newest = max((seconds for path in sources if (seconds := path.stat().st_mtime) < time.time()), default=0)
    for index in folder.glob("*.nbi"):
        with contextlib.suppress(OSError):
            if index.stat().st_mtime < newest:
                index.unlink()


if _FOLDER := _cache():
    _drop_older(_FOLDER)
COMPILED: dict[str, Any] = {"nogil": True, "cache": _FOLDER is not None}
_OPTIONS: dict[str, Any] = COMPILED | {"fastmath": {"contract", "reassoc", "nsz", "arcp"}}
# What Python calls.
entry = numba.njit(**_OPTIONS)
# What an entry calls becomes part of it. Otherwise a process that compiles would run the loop that was compiled by
# itself, and one that finds the entry in the cache the copy inside the entry, which is optimized in another way: sums
# in another order, and other blocks.
jit = numba.njit(forceinline=True, **_OPTIONS)
inlined = numba.njit(inline="always", **_OPTIONS)

# A scale must be better by this share, or rounding errors might lead to an endless circle of changes.
LESS = np.float32(1 - 1e-5)


@jit
def half(x):
    """x rounded to F16, as float32; beyond its range the largest number that F16 has."""
    size = abs(x)
    if size < 6.103515625e-05:
        return np.float32(np.rint(x * 16777216.0) / 16777216.0)
    if size >= 65504.0:
        return np.float32(np.copysign(65504.0, x))
    exponent = np.floor(np.log2(size))
    unit = 2.0 ** (exponent - 10)
    if size / unit < 1024.0:  # log2 was a little too high
        unit *= 0.5
    return np.float32(np.rint(x / unit) * unit)


@inlined
def moved(h, column, change, slope):
    """Updates the slope after v_column has grown by `change`."""
    row = h[column]
    for j in range(slope.size):
        slope[j] -= change * row[j]


@jit
def replace_block(h, start, before, after, delta, slope):
    """Updates delta and slope [n] after the values from column `start` on have changed from `before` to `after`."""
    for j in range(before.size):
        change = after[j] - before[j]
        if change != 0:
            delta[start + j] -= change
            moved(h, start + j, change, slope)


@jit
def block_product(h, start, a, out):
    """out = H_s a, H_s being the diagonal block of h [n, n] from column `start` on; a, out [width]."""
    stop = start + a.size
    for j in range(a.size):
        row = h[start + j, start:stop]
        total = np.float32(0)
        for k in range(row.size):
            total += row[k] * a[k]
        out[j] = total


@inlined
def best_move(inverse, slope, start, out):
    """out [sub] = H_b⁻¹ slope_b: how far the values of a block should move, all others as they are."""
    part = slope[start : start + out.size]
    for j in range(out.size):
        row = inverse[j]
        amount = np.float32(0)
        for k in range(part.size):
            amount += row[k] * part[k]
        out[j] = amount


@jit
def add_owed(couplings, index, others, out):
    """Adds Σ_{k<index} couplings[index, k] others[k] to out [n]."""
    if couplings.shape[0] > 0:
        for other in range(index):
            amount = couplings[index, other]
            if amount != 0:
                for j in range(out.size):
                    out[j] += amount * others[other, j]
