"""Divisors of the rotary frequencies: ropes that llama.cpp knows only as a tensor, `rope_freqs`."""

import math

import numpy as np
from numpy.typing import NDArray

from bitladder.errors import BitladderError


def llama3_divisors(
    head_dim: int, theta: float, *, factor: float, low: float, high: float, context: float
) -> NDArray[np.float32]:
    """The divisors of the rotary frequencies in Llama 3.1's rope.

    A wavelength below context / high stays. A wavelength above context / low is stretched by `factor`. Between the two
    the frequency is interpolated. Source: transformers, modeling_rope_utils.

    Parameters:
        head_dim: values of a head.
        theta: base of the frequencies.
        factor: factor of the longest wavelengths.
        low: low_freq_factor of config.json.
        high: high_freq_factor of config.json.
        context: tokens of context of the original model.

    Returns:
        float32, shape [head_dim / 2].
    """
    if high <= low:
        raise BitladderError(f"rope: high_freq_factor {high:g} should be above low_freq_factor {low:g}")
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelength = 2 * math.pi / frequency
    kept = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    divisors: NDArray[np.float32] = (1.0 / ((1.0 - kept) / factor + kept)).astype(np.float32)
    return divisors


def yarn_divisors(
    head_dim: int, theta: float, *, factor: float, context: int, beta_fast: float, beta_slow: float, truncate: bool
) -> NDArray[np.float32]:
    """The divisors of the rotary frequencies in YaRN (arXiv 2309.00071).

    Values of a head that turn more than `beta_fast` times within the context stay. Those that turn less than
    `beta_slow` times are stretched by `factor`. Between the two the frequency is interpolated. Source: transformers,
    modeling_rope_utils.

    Parameters:
        head_dim: values of a head.
        theta: base of the frequencies.
        factor: factor of the slow values.
        context: tokens of context of the original model.
        beta_fast: turns from which on a value is fast.
        beta_slow: turns up to which a value is slow.
        truncate: whether the limits are rounded to whole pairs of values.

    Returns:
        float32, shape [head_dim / 2].
    """

    def pair(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(beta_fast), pair(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0
    stretched = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    divisors: NDArray[np.float32] = (1.0 / (stretched / factor + 1.0 - stretched)).astype(np.float32)
    return divisors
