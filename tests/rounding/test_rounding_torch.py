"""Rounding by torch against numba's kernels: the same objective, and as low an output error in every type."""

import itertools

import numpy as np
import pytest
from rounding_cases import moments, stock_blocks

from bitladder.engine import Decoding, dequantize_into, torch_device, type_by_name
from bitladder.errors import UsageError
from bitladder.rounding import TYPES, RoundingOptions, SecondMoments, round_matrices, round_tensor

torch = pytest.importorskip("torch")
torch_tiles = pytest.importorskip("bitladder.rounding.torch_tiles")

F32 = np.float32
# One of each kind: scales and minimums, levels unevenly spaced, an F16 step per block, points with free and even signs.
KINDS = ("q4_K", "iq4_xs", "q5_1", "iq3_s", "iq3_xxs")


def weights_of(rows, width=256, seed=0):
    return np.random.default_rng(seed).standard_t(5, size=(rows, width)).astype(F32) * F32(0.05)


def outputs_of(rows, seed=3):
    """Moments of outputs that couple rows strongly."""
    return moments(rows, 400, seed=seed, spread=1.0)


def loss(weights, data, name, h, outputs):
    """tr(O Δ H Δᵀ) in float64, with moments as rounding sees them."""
    values = np.empty(weights.shape, F32)
    dequantize_into(np.ascontiguousarray(data), type_by_name(name), values)
    delta = (weights - values).astype(np.float64)
    left = delta if outputs is None else outputs.astype(np.float64) @ delta
    return float(np.vdot(left @ h.astype(np.float64), delta))


def damped_as_both_ways_do(matrix):
    return None if matrix is None else matrix + 0.1 * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


@pytest.mark.parametrize("coupled", [False, True], ids=["rows apart", "rows coupled"])
@pytest.mark.parametrize("name", TYPES)
def test_every_type_ends_where_the_kernels_of_the_cpu_end(name, coupled):
    options = RoundingOptions(damping=0.1, shrinkage=0, passes=2, enough=0)
    losses = []
    for seed in range(2):
        weights, h = weights_of(24, seed=seed), moments(256, 900, seed)
        o = outputs_of(24, seed) if coupled else None
        stock = stock_blocks(name, weights, h)
        cpu, ours = (round_tensor(weights, stock, name, h, options, o, device) for device in (None, "torch"))
        seen = [damped_as_both_ways_do(each) for each in (h, o)]
        losses.append([loss(weights, data, name, *seen) for data in (stock, ours.data, cpu.data)])
        assert (ours.before, ours.after) == pytest.approx(losses[-1][:2], rel=1e-2)
    before, after, there = np.sum(losses, axis=0)
    assert after < 0.95 * before
    # Side by side, rows take other steps than one after the other: on two small matrices that is 1 % to either side.
    assert after < (1.015 if coupled else 1.001) * there


@pytest.mark.parametrize("name", ["q4_K", "q5_1", "iq3_s"])
def test_groups_and_parts_do_not_change_what_is_lowered(name, monkeypatch):
    monkeypatch.setattr(torch_tiles, "GROUP", 8)
    rows, width = 20, 512  # the last group has fewer rows
    weights, h, o = weights_of(rows, width, 1), moments(width, 900), outputs_of(rows)
    stock = stock_blocks(name, weights, h)
    options = RoundingOptions(passes=2, by_importance=True)
    cpu, ours = (round_tensor(weights, stock, name, h, options, o, device) for device in (None, "torch"))
    assert ours.after < 1.01 * cpu.after


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_are_apart_can_be_rounded_in_pieces(name, monkeypatch):
    weights, h = weights_of(9), moments(256, 300)
    stock, options = stock_blocks(name, weights, h), RoundingOptions(passes=1, enough=0)
    whole = round_tensor(weights, stock, name, h, options, None, "torch")
    monkeypatch.setattr(torch_tiles, "ROWS", 4)
    pieces = round_tensor(weights, stock, name, h, options, None, "torch")
    assert pieces.after == pytest.approx(whole.after, rel=5e-3)


@pytest.mark.parametrize("name", ["q4_K", "q5_1", "iq3_s"])
def test_matrices_side_by_side_are_rounded_as_each_alone(name):
    some = [weights_of(6, seed=seed) for seed in range(3)]
    options = RoundingOptions(passes=2, enough=0)
    ready = [SecondMoments(moments(256, 300, seed), outputs_of(6, seed), options, "torch") for seed in range(3)]
    stock = [stock_blocks(name, weights, moments(256, 300, seed)) for seed, weights in enumerate(some)]
    together = round_matrices(some, stock, name, ready, options, "torch")
    for index in range(3):
        (alone,) = round_matrices(
            some[index : index + 1], stock[index : index + 1], name, ready[index : index + 1], options, "torch"
        )
        assert together[index].before == alone.before
        assert together[index].after == pytest.approx(alone.after, rel=5e-3)


@pytest.mark.parametrize("name", ["q4_K", "q8_0"])
def test_passes_never_raise_the_loss(name):
    # Rows that nearly repeat each other: each would make up for what another has just removed.
    rows = 12
    weights, h = weights_of(rows), moments(256, 300)
    o = (np.ones((rows, rows)) + 0.05 * np.eye(rows)).astype(F32)
    stock = stock_blocks(name, weights, h)
    losses = [
        round_tensor(weights, stock, name, h, RoundingOptions(passes=passes, enough=0), o, "torch").after
        for passes in range(4)
    ]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", KINDS)
def test_odd_weights_and_moments(name):
    weights = weights_of(5)
    weights[0] = 0
    weights[1] = 0.125
    weights[2, :128] = 0
    weights[3, ::16] *= 1000
    h = moments(256, 100)
    h[40:120], h[:, 40:120] = 0, 0
    with np.errstate(all="ignore"):
        stock = stock_blocks(name, weights, np.diag(np.maximum(np.diag(h), 1e-3)))
    rounded = round_tensor(weights, stock, name, h, RoundingOptions(passes=1), None, "torch")
    values = np.empty(weights.shape, F32)
    dequantize_into(np.ascontiguousarray(rounded.data), type_by_name(name), values)
    assert np.isfinite(values).all() and not values[0].any() and rounded.after <= rounded.before


def test_auto_is_the_cpu_where_torch_sees_no_gpu(monkeypatch):
    monkeypatch.setattr("bitladder.engine.devices._found", lambda name: False)
    assert torch_device("auto") is None
    monkeypatch.setattr("bitladder.engine.devices._found", lambda name: name == "mps")
    assert torch_device("auto") == "mps"


@pytest.mark.parametrize(("built", "message"), [((), "built for CPUs only"), (("cuda",), "sees no such device")])
def test_a_device_that_is_not_there_is_refused_with_the_options(built, message, monkeypatch):
    monkeypatch.setattr("bitladder.engine.devices._built_for", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=message):
        Decoding(device="cuda")
    with pytest.raises(UsageError, match="--device is gpu"):
        Decoding(device="gpu")


def test_without_torch_a_device_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"bitladder\[torch\]"):
        torch_device("torch")
