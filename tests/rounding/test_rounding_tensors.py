"""Rounding of whole tensors: what must hold for any weights and any second moments, however odd."""

import numpy as np
import pytest
from rounding_cases import moments, stock_blocks

from bitladder.engine import dequantize_into, devices, type_by_name
from bitladder.engine.native import ggml
from bitladder.errors import BitladderError
from bitladder.rounding import TYPES, RoundingOptions, SecondMoments, round_tensor, second_moments
from bitladder.rounding import method as rounding_method
from bitladder.rounding.matrix import ScalarRounding
from bitladder.rounding.second_moments import damped, shrunk

F32 = np.float32
# One of each kind: scales and minimums, levels unevenly spaced, an F16 step per block, points of a grid.
KINDS = ("q4_K", "iq4_xs", "q5_1", "iq3_s")
WIDTH = 256


def expand(name, data, width=WIDTH):
    out = np.empty((len(data), width), F32)
    dequantize_into(np.ascontiguousarray(data), type_by_name(name), out)
    return out


def loss(delta, h, outputs=None):
    """tr(O Δ H Δᵀ) in float64."""
    delta = delta.astype(np.float64)
    left = delta if outputs is None else outputs.astype(np.float64) @ delta
    return float(np.vdot(left @ h.astype(np.float64), delta))


def lowered(h, options):
    """The moments that rounding lowers a loss of: shrunk and damped, with their own mean diagonal."""
    return damped(shrunk(h, options.shrinkage), options.damping) * max(np.diag(h).mean(), 0)


def checked(name, weights, h, outputs=None, **options):
    """Round, and hold the result against the library: bytes that it accepts, and losses that are as they are said."""
    with np.errstate(all="ignore"):
        stock = stock_blocks(name, weights, np.diag(np.maximum(np.diag(h), 1e-3)))
    rounded = round_tensor(weights, stock, name, h, RoundingOptions(**options), outputs)
    assert rounded.data.shape == stock.shape
    assert rounded.data.dtype == np.uint8
    data = np.ascontiguousarray(rounded.data)
    assert ggml.ggml_validate_row_data(type_by_name(name).id, data.ctypes.data, data.size)
    values = expand(name, data, weights.shape[1])
    assert np.isfinite(values).all()
    assert rounded.after <= rounded.before
    given, options = (h, outputs), RoundingOptions(**options)
    h, outputs = (None if moments is None else lowered(moments, options) for moments in given)
    scale = loss(np.abs(weights) + np.abs(values), np.abs(h), None if outputs is None else np.abs(outputs))
    before, after = (
        loss(weights - expand(name, stock, weights.shape[1]), h, outputs),
        loss(weights - values, h, outputs),
    )
    assert rounded.before == pytest.approx(before, rel=1e-3, abs=1e-6 * scale)
    assert rounded.after == pytest.approx(after, rel=1e-3, abs=1e-6 * scale)
    return rounded, stock


def ordinary(rows=3, seed=0, width=WIDTH):
    return np.random.default_rng(seed).standard_t(5, size=(rows, width)).astype(F32) * F32(0.05)


@pytest.mark.parametrize("name", TYPES)
def test_every_type_gains_and_loads(name):
    rounded, stock = checked(name, ordinary(2), moments(WIDTH, 2000), passes=1)
    assert rounded.after < 0.95 * rounded.before
    assert not np.array_equal(rounded.data, stock)


def few_tokens(count):
    x = np.random.default_rng(9).normal(size=(count, WIDTH))
    return (x.T @ x / count).astype(F32)


def dead_channels():
    h = moments(WIDTH, 500)
    h[40:120] = 0
    h[:, 40:120] = 0
    return h


def one_channel():
    h = np.zeros((WIDTH, WIDTH), F32)
    h[77, 77] = 3
    return h


# What H can be when a text is short, an expert was seen once, or channels are dead or enormous.
ODD = {
    "one token": lambda: few_tokens(1),
    "two tokens": lambda: few_tokens(2),
    "fewer tokens than channels": lambda: few_tokens(100),
    "dead channels": dead_channels,
    "one channel": one_channel,
    "a huge channel": lambda: np.diag(np.where(np.arange(WIDTH) == 5, 1e12, 1e-3)).astype(F32),
    "tiny": lambda: moments(WIDTH, 500) * F32(1e-30),
    "large": lambda: moments(WIDTH, 500) * F32(1e20),
    "all alike": lambda: np.ones((WIDTH, WIDTH), F32),
    "not quite symmetric": lambda: np.triu(moments(WIDTH, 500)) + np.tril(moments(WIDTH, 500) * F32(1.001), -1),
    "slightly negative": lambda: few_tokens(3) - F32(1e-4) * np.eye(WIDTH, dtype=F32),
}


@pytest.mark.parametrize("damping", [0.1, 0.0])
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("odd", ODD)
def test_odd_second_moments_do_not_diverge(odd, name, damping):
    weights = ordinary()
    rounded, stock = checked(name, weights, ODD[odd](), passes=1, damping=damping, shrinkage=damping)
    # Whatever H leaves free, weights stay weights.
    ours, theirs = (np.abs(expand(name, data)).max() for data in (rounded.data, stock))
    assert ours <= 4 * theirs


@pytest.mark.parametrize("name", KINDS)
def test_without_second_moments_the_library_stands(name):
    rounded, stock = checked(name, ordinary(), np.zeros((WIDTH, WIDTH), F32), passes=1)
    assert np.array_equal(rounded.data, stock)
    assert (rounded.before, rounded.after) == (0, 0)


@pytest.mark.parametrize("name", [*KINDS, "q2_K", "q3_K", "q6_K", "q8_0", "iq3_xxs", "iq2_s"])
def test_odd_weights(name):
    weights = ordinary(6)
    weights[0] = 0
    weights[1] = 0.125
    weights[2] = -0.125
    weights[3, :128] = 0
    weights[4] *= F32(1e-7)
    weights[5, ::16] *= 1000
    rounded, _ = checked(name, weights, moments(WIDTH, 300), passes=1)
    assert not expand(name, rounded.data)[0].any()


@pytest.mark.parametrize("name", KINDS)
def test_rows_do_not_depend_on_each_other_without_output_moments(name):
    weights, h = ordinary(4), moments(WIDTH, 300)
    together, _ = checked(name, weights, h, passes=1)
    for row in range(4):
        alone, _ = checked(name, weights[row : row + 1], h, passes=1)
        assert np.array_equal(alone.data[0], together.data[row])


@pytest.mark.parametrize("name", KINDS)
def test_output_moments_lower_what_they_weigh(name):
    weights, h = ordinary(6, 3), moments(WIDTH, 400)
    outputs = moments(6, 300, seed=4, spread=0.5)
    options = {"passes": 1, "damping": 0.02, "shrinkage": 0.0}
    two, _ = checked(name, weights, h, outputs, **options)
    one, _ = checked(name, weights, h, **options)
    damped_h, damped_outputs = (lowered(each, RoundingOptions(**options)) for each in (h, outputs))
    assert two.after < loss(weights - expand(name, one.data), damped_h, damped_outputs)
    stock = stock_blocks(name, weights, h)
    off, without = (
        round_tensor(weights, stock, name, h, RoundingOptions(two_sided=two_sided, **options), moment).data
        for two_sided, moment in ((False, outputs), (True, None))
    )
    assert np.array_equal(off, without)


@pytest.mark.parametrize("name", ["q4_K", "iq4_nl", "iq3_s"])
def test_how_many_rows_are_taken_together_changes_nothing(name, monkeypatch):
    """Between groups, products of matrices tell rows of each other's errors; within one, loops do."""
    weights, h, outputs = ordinary(70), moments(WIDTH, 600), moments(70, 200)
    stock = stock_blocks(name, weights, h)
    found = []
    for group in (1, 32, 70):
        monkeypatch.setattr(rounding_method, "GROUP", group)
        found.append(round_tensor(weights, stock, name, h, RoundingOptions(passes=3), outputs))
    for one in found[1:]:
        assert one.after == pytest.approx(found[0].after, rel=0.001)
        assert np.mean(one.data == found[0].data) > 0.99


@pytest.mark.parametrize("name", KINDS)
def test_independent_rows_may_be_rounded_some_at_a_time(name, monkeypatch):
    weights, h = ordinary(5 * rounding_method.GROUP + 3), moments(WIDTH, 2000)
    whole, stock = checked(name, weights, h, passes=2, enough=0)
    monkeypatch.setattr(rounding_method, "PIECE", 2 * rounding_method.GROUP * WIDTH)
    seen = []
    real = rounding_method.round_blocks
    monkeypatch.setattr(
        rounding_method, "round_blocks", lambda part, *more: seen.append(len(part)) or real(part, *more)
    )
    pieces, _ = checked(name, weights, h, passes=2, enough=0)
    assert seen == [256, 256, 131] and np.array_equal(pieces.data, whole.data)
    assert pieces.after == pytest.approx(whole.after, rel=1e-5)
    seen.clear()
    outputs = moments(len(weights), 4000)
    round_tensor(weights, stock, name, h, RoundingOptions(passes=1), outputs)
    assert seen == [len(weights)]


def test_the_loss_of_a_wide_matrix_is_estimated():
    weights, h, outputs = ordinary(40, width=1024), moments(1024, 900, spread=0.9), moments(40, 200)
    options = RoundingOptions()
    second = SecondMoments(h, outputs, options)
    ratios = []
    for size in (0.01, 0.1):
        delta = (size * np.random.default_rng(1).standard_normal(weights.shape) * (1 + weights)).astype(F32)
        exact = loss(delta, lowered(h, options), lowered(outputs, options))
        assert second.loss(delta) == pytest.approx(exact, rel=0.1)
        ratios.append(second.loss(delta) / exact)
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-3)


@pytest.mark.parametrize("name", ["q5_0", "q4_K"])
def test_the_gain_of_a_pass_is_what_the_loss_falls_by(name):
    weights, h, outputs = ordinary(150, width=512), moments(512, 900), moments(150, 300)
    options = RoundingOptions()
    second = SecondMoments(h, outputs, options)
    full = damped(shrunk(outputs, options.shrinkage), options.damping)
    rows = ScalarRounding(weights, TYPES[name].unpack(stock_blocks(name, weights, h), 512), second, options)
    rounding_method.open_groups(rows, second)
    for turn in range(2):
        before = loss(rows.delta, second.h, full)
        gain, _ = rounding_method.change_groups(rows, second, turn)
        assert gain == pytest.approx(before - loss(rows.delta, second.h, full), rel=1e-3)


def test_methods_build_on_each_other():
    weights, h = ordinary(4, 5), moments(WIDTH, 3000)
    for name in KINDS:
        results = {
            method: checked(name, weights, h, method=method, damping=0.01, shrinkage=0.0)[0].after
            for method in ("feedback", "descent", "best")
        }
        assert results["descent"] < results["feedback"], name
        assert results["best"] < results["descent"], name


@pytest.mark.parametrize("name", ["iq4_nl", "iq4_xs"])
def test_the_largest_weight_may_be_at_either_end_of_the_levels(name):
    """These weights are levels but for a factor, 113 the largest; every second block starts with it at −127."""
    indices = np.random.default_rng(0).integers(3, 16, (4, WIDTH))
    indices[:, ::32] = 15
    steps = np.tile(np.repeat(np.array([1 / 2048, 1 / 1024], F32), 32), WIDTH // 64)
    weights, h = (TYPES[name].levels[indices] * steps).astype(F32), np.eye(WIDTH, dtype=F32)
    blocks = TYPES[name].unpack(stock_blocks(name, weights, h), WIDTH)
    signed = blocks.d if name == "iq4_nl" else blocks.scale
    signed[:, ::2] *= -1
    rounded = round_tensor(weights, blocks.pack(), name, h, RoundingOptions())
    assert loss(weights - expand(name, rounded.data), h) < 1e-6 * loss(weights, h)


def test_q8_0_never_holds_minus_128():
    """Weights at the very end of the range, in columns whose errors add up, ask for more than −127 again and again."""
    rng = np.random.default_rng(0)
    weights = np.where(rng.random((16, WIDTH)) < 0.5, -1, rng.uniform(-1, 0.99, (16, WIDTH))).astype(F32)
    h = (np.ones((WIDTH, WIDTH)) + 0.1 * np.eye(WIDTH)).astype(F32)
    for method in ("feedback", "descent", "best"):
        rounded, _ = checked("q8_0", weights, h, method=method, damping=0.01, shrinkage=0.0)
        assert (rounded.data.reshape(-1, 34)[:, 2:] == 0x81).any()
        assert not (rounded.data.reshape(-1, 34)[:, 2:] == 0x80).any()


def test_same_bytes_twice_and_inputs_untouched():
    weights, h, outputs = ordinary(3), moments(WIDTH, 300), moments(3, 50)
    for name in KINDS:
        stock = stock_blocks(name, weights, h)
        copies = [part.copy() for part in (weights, stock, h, outputs)]
        first, second = (round_tensor(weights, stock, name, h, RoundingOptions(passes=1), outputs) for _ in range(2))
        assert np.array_equal(first.data, second.data)
        assert all(np.array_equal(*pair) for pair in zip((weights, stock, h, outputs), copies, strict=True))


def test_what_cannot_be_rounded_is_said():
    weights, h = ordinary(2), moments(WIDTH, 300)
    for name in KINDS:
        stock = stock_blocks(name, weights, h)
        for bad in (np.nan, np.inf):
            broken = h.copy()
            broken[3, 4] = bad
            with pytest.raises(BitladderError, match="not finite"):
                round_tensor(weights, stock, name, broken, RoundingOptions())
            with pytest.raises(BitladderError, match="not finite"):
                round_tensor(weights, stock, name, h, RoundingOptions(), np.full((2, 2), bad, F32))
        with pytest.raises(BitladderError, match="do not fit"):
            round_tensor(weights, stock, name, h[:, :-1], RoundingOptions())
        with pytest.raises(BitladderError, match="do not fit"):
            round_tensor(weights, stock, name, h, RoundingOptions(), np.eye(3, dtype=F32))


def test_stock_and_other_types_stay():
    weights, h = ordinary(2), moments(WIDTH, 300)
    for name, method in (("q4_K", "stock"), ("iq3_s", "stock"), ("tq1_0", "best")):
        stock = stock_blocks(name, weights, h)
        assert round_tensor(weights, stock, name, h, RoundingOptions(method=method)).data is stock


def test_moments_are_made_ready_without_threads_of_blas(monkeypatch):
    """Several tensors are made ready at once. More threads would wait for one another, and sum in another order."""
    controls = devices._controls()
    if controls is None:
        pytest.skip("NumPy has no OpenBLAS of its own")
    get, put = controls
    seen, before = [], get()
    damped = second_moments.damped
    monkeypatch.setattr(second_moments, "damped", lambda *arguments: [seen.append(get()), damped(*arguments)][1])
    try:
        put(2)
        second_moments.SecondMoments(np.eye(32, dtype=np.float32), None, RoundingOptions())
        assert (seen, get()) == ([1], 2)
    finally:
        put(before)
