"""Figures of one weight's inputs.

All are taken over a_j = Σx²/count, the mean squared input of column j of each expert that a token reached; sums are
float64. Definitions: llama.cpp, tools/imatrix/imatrix.cpp (--show-statistics), which sums in float32.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from bitladder.calibrate.imatrix import Entry, Imatrix
from bitladder.gguf.names import imatrix_order, imatrix_place, in_previous_block

Doubles = npt.NDArray[np.float64]
ACTIVE = 1e-5


@dataclasses.dataclass(frozen=True)
class TensorStatistics:
    """Figures of one weight. None is what is not defined; with a value that is not finite, that is all but N.

    `layer` is None outside of blocks. `sum` … `std` are in squared activation units; `active`, `entropy_norm` and `zd`
    are fractions of 1, `entropy` is in bits. `n` counts entries, of reached experts only; `experts` counts the
    matrices that have a count of their own (1 in a dense weight), `unreached` those without a token.
    """

    tensor: str
    layer: int | None
    kind: str
    sum: float | None
    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    active: float | None
    n: int
    entropy: float | None
    entropy_norm: float | None
    zd: float | None
    cossim: float | None
    experts: int
    unreached: int


def tensor_statistics(imatrix: Imatrix) -> list[TensorStatistics]:
    """The figures of every weight that any token reached, by block and kind."""
    return [
        _of_tensor(name, imatrix)
        for name in sorted(imatrix.entries, key=imatrix_order)
        if (imatrix.entries[name].counts > 0).any()
    ]


def mean_activations(entry: Entry) -> Doubles:
    """a, float64 [experts reached, n_in]: mean squared inputs of the experts that a token reached."""
    reached = entry.counts > 0
    return entry.sums[reached].astype(np.float64) / entry.counts[reached, None]


def cosine(one: Doubles, two: Doubles) -> float | None:
    """The cosine of the angle between two float64 vectors; None if either is zero, not finite, or of another size."""
    if one.size != two.size:
        return None
    magnitude = math.sqrt(float(one @ one)) * math.sqrt(float(two @ two))
    return float(one @ two) / magnitude if magnitude > 0 and math.isfinite(magnitude) else None


def describe(activations: Doubles) -> dict[str, float | int | None]:
    """The figures of float64 entries [N], N ≥ 1, by the field names of TensorStatistics.

    σ is that of the population, in two passes. Entropy is 0 where all entries are 0, as llama-imatrix has it.
    E(norm) = H/log2 N has no value at N = 1.
    """
    n = activations.size
    if not np.isfinite(activations).all():
        names = ("sum", "min", "max", "mean", "std", "active", "entropy", "entropy_norm", "zd")
        return {"n": n, **dict.fromkeys(names)}
    total, least, most = float(activations.sum()), float(activations.min()), float(activations.max())
    mean = total / n
    # Equal entries have no spread, though their mean may be off by a rounding.
    std = float(activations.std()) if most > least else 0.0
    entropy = 0.0
    if total > 0:
        shares = activations[activations > 0] / total
        # Where one entry holds everything the sum is −0.
        entropy = abs(float(shares @ np.log2(shares)))
    return {
        "sum": total,
        "min": least,
        "max": most,
        "mean": mean,
        "std": std,
        "active": float((np.abs(activations) > ACTIVE).mean()),
        "n": n,
        "entropy": entropy,
        "entropy_norm": entropy / math.log2(n) if n > 1 else None,
        "zd": float(((activations - mean) / std > 1).mean()) if std > 0 else 0.0,
    }


def _of_tensor(name: str, imatrix: Imatrix) -> TensorStatistics:
    entry = imatrix.entries[name]
    layer, kind = imatrix_place(name)
    return TensorStatistics(
        tensor=name,
        layer=layer,
        kind=kind,
        **describe(mean_activations(entry).reshape(-1)),  # type: ignore[arg-type]
        cossim=_cossim(name, imatrix),
        experts=len(entry.counts),
        unreached=int((entry.counts <= 0).sum()),
    )


def _cossim(name: str, imatrix: Imatrix) -> float | None:
    previous = imatrix.entries.get(in_previous_block(name) or "")
    if previous is None or not (previous.counts > 0).any():
        return None
    # The sums and not the means, as llama-imatrix does: an expert weighs by the tokens it saw.
    one, two = (entry.sums.astype(np.float64).reshape(-1) for entry in (imatrix.entries[name], previous))
    return cosine(one, two)
