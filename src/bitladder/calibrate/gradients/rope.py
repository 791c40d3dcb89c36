"""Rotary position embedding in torch, as ggml computes it (ggml_rope_ext)."""

import math

import torch

from bitladder.calibrate.gradients.hyperparameters import Rope


def rope_tables(rope: Rope, length: int, divisors: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of positions 0…length−1, float32 [length, dimensions / 2].

    `divisors` [dimensions / 2] divide the frequencies (a file's rope_freqs). YaRN (arXiv 2309.00071): low
    frequencies are stretched by `factor`, high ones are not, and between the two they are mixed by a ramp.
    """
    pairs = torch.arange(0, rope.dimensions, 2, dtype=torch.float64)
    frequencies = rope.base ** (-pairs / rope.dimensions)
    if divisors is not None:
        frequencies = frequencies / divisors.to(torch.float64)
    stretched = frequencies / rope.factor
    magnitude = rope.attention_factor
    if rope.scaling == "yarn":
        keep = _ramp(rope)
        frequencies = stretched * (1 - keep) + frequencies * keep
        magnitude *= 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0
    else:
        frequencies = stretched
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return (angles.cos() * magnitude).float(), (angles.sin() * magnitude).float()


def _ramp(rope: Rope) -> torch.Tensor:
    """How much of its own frequency each pair keeps under YaRN: 1 for the fast, 0 for the slow."""

    def pair(turns: float) -> float:
        # The pair that makes so many turns over the original context.
        ratio = rope.original_context / (turns * 2 * math.pi)
        return rope.dimensions * math.log(ratio) / (2 * math.log(rope.base))

    low = max(0.0, math.floor(pair(rope.beta_fast)))
    high = min(rope.dimensions - 1.0, math.ceil(pair(rope.beta_slow)))
    position = torch.arange(rope.dimensions // 2, dtype=torch.float64)
    return 1 - ((position - low) / max(0.001, high - low)).clamp(0, 1)


def rotate(values: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], *, interleaved: bool) -> torch.Tensor:
    """Rotate the pairs of [..., length, dimensions] by each position's angles."""
    cosines, sines = tables
    if interleaved:
        first, second = values[..., 0::2], values[..., 1::2]
    else:
        first, second = values.chunk(2, dim=-1)
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
