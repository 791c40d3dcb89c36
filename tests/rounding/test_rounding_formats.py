"""The block layouts of rounding against the library: every byte read, written, and worth what its kernel says."""

import numpy as np
import pytest

from bitladder.engine import dequantize_into, quantize_rows, type_by_name
from bitladder.rounding import TYPES, can_round
from bitladder.rounding.scalar_types import NONE, SCALAR_TYPES
from bitladder.rounding.vector_types import VECTOR_TYPES

# Where in a block of bytes the F16 numbers lie (ggml-common.h).
HALVES = dict.fromkeys(TYPES, (0,)) | {
    **dict.fromkeys(("q4_1", "q5_1", "q4_K", "q5_K"), (0, 2)),
    "q2_K": (80, 82),
    "q3_K": (108,),
    "q6_K": (208,),
}
EVERY = list(TYPES)
EXTREMES = np.array([65504, -65504, 6e-8, -6e-8, 6.1e-5, 0.0, -0.0, 1.0], np.float16)


def library(name, data, width):
    out = np.empty((len(data), width), np.float32)
    dequantize_into(data, type_by_name(name), out)
    return out


def put_halves(name, data, halves):
    """Blocks [count, bytes] with `halves` float16 [count, n] where their F16 numbers are."""
    for place, values in zip(HALVES[name], halves.T, strict=False):
        data[:, place : place + 2] = np.ascontiguousarray(values)[:, None].view(np.uint8)


def blocks_of(name, filling, rng, count=48):
    kind = type_by_name(name)
    if filling == "random":
        data = rng.integers(0, 256, (count, kind.block_bytes), np.uint8)
        bits = rng.integers(0, 1 << 16, (count, 2), np.uint16)
        bits[(bits & 0x7C00) == 0x7C00] &= 0xBFFF  # no NaN and no infinity
        halves = bits.view(np.float16)
    else:
        data = np.full((count, kind.block_bytes), filling, np.uint8)
        halves = np.stack([np.resize(EXTREMES, count), np.resize(EXTREMES[::-1], count)], axis=1)
    put_halves(name, data, halves)
    return data


@pytest.mark.parametrize("filling", ["random", 0, 255, 0x80, 0x0F, 0xF0])
@pytest.mark.parametrize("name", EVERY)
def test_any_bytes_come_back_and_mean_what_the_library_says(name, filling):
    kind = type_by_name(name)
    width = 2 * kind.block
    data = blocks_of(name, filling, np.random.default_rng(len(name))).reshape(-1, kind.row_bytes(width))
    blocks = TYPES[name].unpack(data, width)
    assert np.array_equal(blocks.pack(), data)
    assert blocks.pack().dtype == np.uint8
    ours, theirs = blocks.values(), library(name, data, width)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.array_equal(ours, theirs)
    # Flat bytes are as good as rows of them.
    assert np.array_equal(TYPES[name].unpack(data.reshape(-1), width).values(), ours)


@pytest.mark.parametrize("name", EVERY)
def test_what_the_library_makes_of_weights_comes_back(name):
    kind = type_by_name(name)
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(4, 512)).astype(np.float32)
    weights[1] *= 1e-6
    weights[2] = 0
    weights[3] = 0.25
    data = quantize_rows(weights, kind, np.ones(512, np.float32))
    blocks = TYPES[name].unpack(data, 512)
    assert np.array_equal(blocks.pack(), data)
    assert np.array_equal(blocks.values(), library(name, data, 512))


@pytest.mark.parametrize("name", SCALAR_TYPES)
def test_scalar_parts_lie_in_their_ranges_and_reach_both_ends(name):
    form = SCALAR_TYPES[name]
    kind = type_by_name(name)
    assert kind.block_bytes == form.block_bytes
    assert kind.block == form.block
    assert (np.diff(form.levels) > 0).all()
    data = blocks_of(name, "random", np.random.default_rng(1), 400)
    blocks = form.unpack(data, kind.block)
    assert (blocks.indices.min(), blocks.indices.max()) == (0, len(form.levels) - 1)
    for values, limits in ((blocks.scale, form.scales), (blocks.minimum, form.minimums)):
        assert (values.min(), values.max()) == limits
    # Each part can be set by itself: all else stays.
    for part, limits in (("scale", form.scales), ("minimum", form.minimums)):
        for value in limits if limits != NONE else ():
            blocks = form.unpack(data, kind.block)
            getattr(blocks, part)[:] = value
            again = form.unpack(blocks.pack(), kind.block)
            assert (getattr(again, part) == value).all()
            assert np.array_equal(again.indices, blocks.indices)
            assert np.array_equal(again.d, blocks.d)


@pytest.mark.parametrize("name", VECTOR_TYPES)
def test_points_and_signs(name):
    form = VECTOR_TYPES[name]
    kind = type_by_name(name)
    assert (kind.block_bytes, kind.block) == (form.block_bytes, 256)
    points = form.grid
    assert points.shape == (form.points, form.group)
    assert (points > 0).all()
    assert len(np.unique(points, axis=0)) == form.points
    blocks = form.unpack(blocks_of(name, "random", np.random.default_rng(1), 400), 256)
    assert blocks.codes.max() == form.points - 1
    assert (blocks.scale.min(), blocks.scale.max()) == (0, 15)
    minuses = blocks.minus.reshape(-1, 8).sum(axis=1)
    assert bool((minuses % 2 == 0).all()) == form.even
    # Any code and scale can be set, and any signs that are even where they must be.
    rng = np.random.default_rng(2)
    blocks.codes = rng.integers(0, form.points, blocks.codes.shape).astype(np.uint16)
    blocks.scale[:] = rng.integers(0, 16, blocks.scale.shape)
    blocks.minus[:] = rng.integers(0, 2, blocks.minus.shape)
    if form.even:
        eights = blocks.minus.reshape(-1, 8)
        eights[:, 7] = eights[:, :7].sum(axis=1) & 1
    data = blocks.pack()
    again = form.unpack(data, 256)
    for part in ("codes", "scale", "minus", "d"):
        assert np.array_equal(getattr(again, part), getattr(blocks, part)), part
    assert np.array_equal(blocks.values(), library(name, data, 256))


def test_which_types_can_be_rounded():
    assert all(can_round(name) for name in EVERY)
    assert all(type_by_name(name).name == name for name in EVERY)
    assert not any(can_round(name) for name in ("f16", "bf16", "f32", "iq1_s", "tq1_0", "Q4_K"))
