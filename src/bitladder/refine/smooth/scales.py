"""How much each channel should be scaled by."""

from typing import cast

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
LIMIT = 6  # powers of two to either side of a channel like the others


def balance(inputs: npt.NDArray[np.floating], weights: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Scales s that make blocks of weights, and blocks of inputs, lose least; float32 [channels], powers of two.

    Parameters: `inputs` mean squares h of the channels, `weights` sums of squares u of the columns that multiply them,
    both [channels], of one matrix.

    A block is rounded in steps that its largest members set, so with sums for maxima rounding the weights costs about
    (Σ h_i / s_i²)(Σ u_i s_i²), and rounding the inputs, as kernels of quantized weights do, costs the same product. By
    Cauchy and Schwarz it is least where h_i / s_i² ∝ u_i s_i², so s_i = (h_i / u_i)^¼. SmoothQuant (arXiv 2211.10438)
    balances largest values for the same reason, AWQ (arXiv 2306.00978) searches a power of h. Powers of two move
    between floating-point weights without rounding. The median channel keeps its scale; one that never varies, or that
    nothing multiplies, gets the nearest that is allowed.
    """
    inputs, weights = np.asarray(inputs, np.float64), np.asarray(weights, np.float64)
    alive = (inputs > 0) & (weights > 0)
    if not alive.any():
        return np.ones(len(inputs), np.float32)
    tiny = np.finfo(np.float64).tiny
    exponents = (np.log2(np.maximum(inputs, tiny)) - np.log2(np.maximum(weights, tiny))) / 4
    exponents -= np.median(exponents[alive])
    return cast("npt.NDArray[np.float32]", np.exp2(np.rint(np.clip(exponents, -LIMIT, LIMIT))).astype(np.float32))
