"""By how much each channel is scaled, from the sizes of inputs and of the weights that multiply them."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from bitladder.calibrate import Imatrix
from bitladder.errors import BitladderError
from bitladder.gguf import GgufFile
from bitladder.progress import Progress
from bitladder.refine.model_files import Doubles, Floats, column_squares
from bitladder.refine.options import SmoothingOptions
from bitladder.refine.smooth.links import Link


def balance(
    inputs: npt.NDArray[np.floating],
    weights: npt.NDArray[np.floating],
    most_powers: int = SmoothingOptions().most_powers,
) -> Floats:
    """Scales s with which blocks of weights, and blocks of inputs, lose least.

    A block is rounded in steps that its largest members set. With sums instead of maxima, rounding the weights costs
    about (Σ h_i / s_i²)(Σ u_i s_i²), and rounding the inputs, as kernels of quantized weights do, costs the same
    product. By Cauchy and Schwarz it is least where h_i / s_i² ∝ u_i s_i², so s_i = (h_i / u_i)^¼. SmoothQuant
    (arXiv 2211.10438) balances largest values for the same reason, AWQ (arXiv 2306.00978) searches a power of h.
    Powers of two move between floating-point weights without rounding. The median channel keeps its scale. A channel
    that never varies, or that nothing multiplies, gets the nearest scale that is allowed.

    Parameters:
        inputs: mean squares h of the channels, [channels].
        weights: sums of squares u of the columns that multiply them, [channels].
        most_powers: powers of two by which a channel may be scaled, to either side.

    Returns:
        Powers of two, float32 [channels].

    Example:
        >>> balance(np.array([1.0, 256.0, 1.0]), np.ones(3)).tolist()
        [1.0, 4.0, 1.0]
    """
    inputs, weights = np.asarray(inputs, np.float64), np.asarray(weights, np.float64)
    alive = (inputs > 0) & (weights > 0)
    if not alive.any():
        return np.ones(len(inputs), np.float32)
    tiny = np.finfo(np.float64).tiny
    exponents = (np.log2(np.maximum(inputs, tiny)) - np.log2(np.maximum(weights, tiny))) / 4
    exponents -= np.median(exponents[alive])
    return cast("Floats", np.exp2(np.rint(np.clip(exponents, -most_powers, most_powers))).astype(np.float32))


def link_scales(
    file: GgufFile, links: Sequence[Link], imatrix: Imatrix, options: SmoothingOptions, progress: Progress
) -> list[tuple[Link, Floats]]:
    """Scales for each link.

    Parameters:
        file: the model.
        links: where scales can move; each has an entry in the matrix.
        imatrix: the importance matrix of the model.
        options: how far a channel may be scaled.
        progress: where work is shown.

    Returns:
        Each link and its scales, float32 [matrices, channels of the readers].

    Raises:
        BitladderError: the matrix belongs to another model, or weights are not finite.
    """
    scales = []
    total = sum(file.tensors[name].elements for link in links for name in link.readers)
    with progress.task("balance channels", total) as task:
        for link in links:
            importance = link_importance(imatrix, link)
            assert importance is not None
            squares = sum(column_squares(file, file.tensors[name], link.matrices, task) for name in link.readers)
            shape = (link.matrices, link.groups, link.repeats, link.size)
            # Heads that share a head of v share its scales.
            shared = [np.asarray(values, np.float64).reshape(shape).sum(2) for values in (importance, squares)]
            rows = []
            for matrix in range(link.matrices):
                inputs, weights = (values[matrix].reshape(-1) for values in shared)
                rows.append(balance(inputs, weights, options.most_powers))
            whole = np.stack(rows).reshape(link.matrices, link.groups, 1, link.size)
            scales.append((link, np.broadcast_to(whole, shape).reshape(link.matrices, -1)))
    return scales


def link_importance(imatrix: Imatrix, link: Link) -> Doubles | None:
    """Mean squares of the channels of a link, up to a factor.

    Experts that no token reached are taken to be like the others.

    Parameters:
        imatrix: the importance matrix of the model.
        link: the link.

    Returns:
        float64 [matrices, channels]; None if no reader has an entry.

    Raises:
        BitladderError: the matrix belongs to another model.
    """
    for name in link.readers:
        entry = imatrix.entries.get(name)
        if entry is None:
            continue
        sums = np.asarray(entry.sums, np.float64)
        if sums.shape[1] != link.groups * link.repeats * link.size or (link.matrices > 1 and len(sums) < link.matrices):
            raise BitladderError(f"the imatrix belongs to another model: {name} has {sums.shape[1]} columns there")
        whole: Doubles = sums.sum(axis=0)
        if link.matrices == 1:
            return whole[None]
        reached = sums.sum(axis=1, keepdims=True) > 0
        return np.asarray(np.where(reached, sums, whole))
    return None
