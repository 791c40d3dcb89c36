"""Rotary position embedding: config.json's description becomes GGUF's keys, or a tensor of divisors, `rope_freqs`."""

import math
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from bitladder.convert.checkpoint_files import Config, brief, plain
from bitladder.errors import BitladderError
from bitladder.progress import Progress

DEFAULT_THETA = 10000.0
BETA_FAST, BETA_SLOW = 32.0, 1.0  # transformers' and llama.cpp's
# What config.json can say of the rope outside its object.
AT_THE_TOP = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
DEFAULT_CONTEXT = 2048  # transformers' default of max_position_embeddings


def read_rope(config: Config) -> Config:
    """The parameters of the rope, from the places where transformers looks for them.

    `rope_scaling` comes before `rope_parameters`, and `rope_theta` in it before `rope_theta` at the top of config.json;
    but `original_max_position_embeddings` at the top comes before that in it. Source: transformers,
    modeling_rope_utils.

    Raises BitladderError if they are no object, or differ from block to block.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    values = config.get(key, {})
    if not isinstance(values, dict):
        raise config.wrong(key, "an object", values)
    nested = next((name for name, value in values.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise BitladderError(
            f"{config.path}: {key} has values for {brief(nested)} alone; only one rope for all blocks is supported"
        )
    above = {name: config.get(name) for name in AT_THE_TOP}
    merged = _stated(above) | _stated(values)
    context = "original_max_position_embeddings"
    return Config(merged | _stated({context: above[context]}), config.path)


def compare_ropes(config: Config, progress: Progress) -> None:
    """Warns of each value of the rope in config.json that is not used, because another place says something else."""
    used = read_rope(config).values
    places = {key: config.get(key, {}) for key in ("rope_scaling", "rope_parameters")}
    places["its top level"] = {name: config.get(name) for name in AT_THE_TOP}
    for place, values in places.items():
        for name, value in _stated(values).items() if isinstance(values, dict) else ():
            if value != used.get(name):
                value_used = brief(used[name]) if name in used else "its default"
                progress.warn(
                    f"{config.path}: {plain(name)} is {brief(value)} in {place}, but {value_used} counts, as in"
                    " transformers"
                )


def _stated(values: dict[str, Any]) -> dict[str, Any]:
    """The values that are not null, with the kind of rope as `rope_type`."""
    stated = {name: value for name, value in values.items() if value is not None}
    kind = stated.pop("type", None)
    return stated if kind is None else {"rope_type": kind} | stated


def describe_rope(
    config: Config, writer: gguf.GGUFWriter, head_dim: int, *, takes_factors: bool, progress: Progress
) -> NDArray[np.float32] | None:
    """Writes the metadata of the rope.

    Parameters:
        config: the checkpoint's config.json.
        writer: gets the metadata.
        head_dim: values of a head.
        takes_factors: whether llama.cpp's graph of the architecture uses a `rope_freqs` tensor.
        progress: gets warnings.

    Returns:
        The divisors of the frequencies of a llama3 rope, float32, shape [head_dim / 2]; None for other ropes.

    Raises:
        BitladderError: llama.cpp cannot reproduce the rope.
    """
    compare_ropes(config, progress)
    rope = read_rope(config)
    theta = rope.positive("rope_theta", DEFAULT_THETA)
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise BitladderError(f"{config.path}: a partial_rotary_factor other than 1 is not supported")
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(theta)
    context = config.integer("max_position_embeddings", DEFAULT_CONTEXT)
    if kind == "default":
        return None
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.positive("factor"))
        return None
    if kind == "dynamic":
        rope.positive("factor")
        progress.warn(
            f"the rope is dynamic: in llama.cpp the model is right up to {context} tokens (max_position_embeddings),"
            " and is not stretched beyond them"
        )
        return None
    if kind == "yarn":
        return _describe_yarn(rope, writer, head_dim, theta, longest=context, takes_factors=takes_factors)
    if kind == "llama3" and takes_factors:
        return llama3_divisors(
            head_dim,
            theta,
            factor=rope.positive("factor"),
            low=rope.positive("low_freq_factor"),
            high=rope.positive("high_freq_factor"),
            context=rope.positive("original_max_position_embeddings", context),
        )
    known = "linear, dynamic, yarn and llama3" if takes_factors else "linear, dynamic and yarn"
    raise BitladderError(
        f"{config.path}: rope type {brief(kind)} is not supported for this architecture (only {known});"
        " --converter PATH runs llama.cpp's own convert_hf_to_gguf.py"
    )


def _describe_yarn(
    rope: Config, writer: gguf.GGUFWriter, head_dim: int, theta: float, *, longest: int, takes_factors: bool
) -> NDArray[np.float32] | None:
    """Writes YaRN (arXiv 2309.00071), with an attention factor relative to llama.cpp's, which follows from `factor`.

    llama.cpp reads `beta_fast` and `beta_slow` for other architectures only, and has no `truncate`. Values other than
    its own become divisors of the frequencies. `longest` is max_position_embeddings.
    """
    context = rope.integer("original_max_position_embeddings", longest)
    factor = rope.positive("factor", longest / context)
    fast = rope.positive("beta_fast") if rope.get("beta_fast") else BETA_FAST
    slow = rope.positive("beta_slow") if rope.get("beta_slow") else BETA_SLOW
    attention = _yarn_attention(rope, factor)
    if theta == 1:
        raise rope.wrong("rope_theta", "another number than 1 for a yarn rope", theta)

    def divisors(fast: float, slow: float, truncate: bool) -> NDArray[np.float32]:
        return yarn_divisors(
            head_dim, theta, factor=factor, context=context, beta_fast=fast, beta_slow=slow, truncate=truncate
        )

    exact = divisors(fast, slow, rope.boolean("truncate", True))
    native = np.array_equal(exact, divisors(BETA_FAST, BETA_SLOW, True))
    if native:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(context)
        attention /= _mscale(factor, 1.0)
    elif not takes_factors:
        raise BitladderError(
            f"{rope.path}: llama.cpp does not read beta_fast, beta_slow and truncate of a yarn rope for this"
            " architecture"
        )
    # llama.cpp overrides `yarn_attn_factor` and multiplies by `attn_factor`.
    if not math.isclose(attention, 1.0):
        writer.add_rope_scaling_attn_factors(attention)
    return None if native else exact


def _yarn_attention(rope: Config, factor: float) -> float:
    """The factor of the cosines and sines, as transformers chooses it."""
    if rope.get("attention_factor") is not None:
        return rope.positive("attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _mscale(factor, rope.positive("mscale")) / _mscale(factor, rope.positive("mscale_all_dim"))
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


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
