"""Rotary position embedding: config.json's description becomes GGUF's.

transformers 5 writes `rope_parameters`. Older versions write `rope_theta` and an optional `rope_scaling`.
"""

import math
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from bitladder.convert.checkpoint import Config
from bitladder.errors import BitladderError

DEFAULT_THETA = 10000.0


def describe_rope(
    config: Config, writer: gguf.GGUFWriter, head_dim: int, *, takes_factors: bool
) -> NDArray[np.float32] | None:
    """Writes the metadata of the rope.

    Parameters:
        config: the checkpoint's config.json.
        writer: gets the metadata.
        head_dim: values of a head.
        takes_factors: whether llama.cpp's graph of the architecture uses a `rope_freqs` tensor.

    Returns:
        The divisors of the frequencies of a llama3 rope, float32, shape [head_dim / 2]; None for other ropes.

    Raises:
        BitladderError: llama.cpp cannot reproduce the rope type.
    """
    values = config.get("rope_parameters", config.get("rope_scaling", {}))
    where = f"{config.path}: rope_parameters" if config.get("rope_parameters") else f"{config.path}: rope_scaling"
    if not isinstance(values, dict):
        raise BitladderError(f"{where} should be an object, not {values!r}")
    rope = Config(values, config.path)
    theta = rope.number("rope_theta", config.number("rope_theta", DEFAULT_THETA))
    if rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1.0:
        raise BitladderError(f"{where}: a partial_rotary_factor other than 1 is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    writer.add_rope_freq_base(theta)
    if kind == "default":
        return None
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.number("factor"))
        return None
    if kind == "yarn":
        _describe_yarn(config, rope, writer)
        return None
    if kind == "llama3" and takes_factors:
        return llama3_divisors(
            head_dim,
            theta,
            factor=rope.number("factor"),
            low=rope.number("low_freq_factor"),
            high=rope.number("high_freq_factor"),
            context=rope.number("original_max_position_embeddings"),
        )
    known = "linear, yarn and llama3" if takes_factors else "linear and yarn"
    raise BitladderError(
        f"{where}: rope type {kind!r} is not supported for this architecture (only {known});"
        " --converter PATH runs llama.cpp's own convert_hf_to_gguf.py"
    )


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


def _describe_yarn(config: Config, rope: Config, writer: gguf.GGUFWriter) -> None:
    """Writes YaRN (arXiv 2309.00071), with an attention factor relative to llama.cpp's, which follows from `factor`."""
    if rope.get("truncate", True) is not True:
        raise BitladderError(f"{config.path}: a yarn rope with truncate = false is not supported by llama.cpp")
    factor = rope.number("factor")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    context = rope.integer("original_max_position_embeddings", config.integer("max_position_embeddings"))
    writer.add_rope_scaling_orig_ctx_len(context)
    if rope.get("beta_fast"):
        writer.add_rope_scaling_yarn_beta_fast(rope.number("beta_fast"))
    if rope.get("beta_slow"):
        writer.add_rope_scaling_yarn_beta_slow(rope.number("beta_slow"))
    attention = _yarn_attention(rope, factor) / _mscale(factor, 1.0)
    # llama.cpp overrides `yarn_attn_factor` and multiplies by `attn_factor`.
    if not math.isclose(attention, 1.0):
        writer.add_rope_scaling_attn_factors(attention)


def _yarn_attention(rope: Config, factor: float) -> float:
    """The factor of the cosines and sines, as transformers chooses it."""
    if rope.get("attention_factor") is not None:
        return rope.number("attention_factor")
    above: Any = rope.get("mscale")
    below: Any = rope.get("mscale_all_dim")
    if above and below:
        return _mscale(factor, float(above)) / _mscale(factor, float(below))
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
