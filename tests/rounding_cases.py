"""Second moments and library blocks that the tests of rounding share."""

import numpy as np

from bitladder.engine import quantize_rows, type_by_name


def moments(width, tokens, seed=0, spread=2.0):
    """E[xxᵀ] of inputs with a mean, common causes and a noise of their own, float32 [width, width]."""
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(tokens, 8)) @ rng.normal(size=(8, width))
    x = causes + spread * rng.normal(size=(tokens, width)) + 0.5
    return (x.T @ x / tokens).astype(np.float32)


def stock_blocks(name, weights, h):
    """The library's own blocks, with H's diagonal as importance."""
    return quantize_rows(weights, type_by_name(name), np.diag(h).copy())
