"""Rounding to points of a grid against brute force over all points and signs, and against feedback written plainly."""

import itertools

import numpy as np
import pytest
from rounding_cases import moments, stock_blocks

from bitladder.rounding.factors import damped, upper_factor
from bitladder.rounding.vector import HOLD, factor_points, round_vector
from bitladder.rounding.vectorformats import VECTOR_FORMATS, VectorBlocks, grid, unpack_vector
from bitladder.rounding.vectorkernels import search, settle
from bitladder.rounding.vectorrowkernels import open_points, pass_points

F32 = np.float32


def triangle(width, seed, correlation=1.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(50, width)) + correlation * rng.normal(size=(50, 1))
    upper, d = upper_factor(x.T @ x / 50)
    return (np.sqrt(d)[:, None] * upper.T).astype(F32)


def signs(width, parity):
    every = np.array(list(itertools.product((1, -1), repeat=width)), np.float64)
    return every if parity < 0 else every[(every < 0).sum(axis=1) % 2 == parity]


def least(r, t, points, parity):
    """The least |r − T v|² of all points and signs."""
    best = np.inf
    for pattern in signs(points.shape[1], parity):
        rest = r - (points * pattern) @ t.T.astype(np.float64)
        best = min(best, (rest**2).sum(axis=1).min())
    return best


def found(r, t, points, parity, hold):
    costs, values = np.empty(len(points), F32), np.empty(points.shape[1], F32)
    columns = np.ascontiguousarray(points.T)
    whole = np.zeros((2 * len(t), 2 * len(t)), F32)  # as the kernels hand it down: part of a larger matrix
    whole[: len(t), : len(t)] = t
    index, cost = search(r, whole[: len(t), : len(t)], columns, parity, F32(hold), costs, costs.view(np.int32), values)
    assert np.array_equal(np.abs(values), points[index])
    assert parity < 0 or (values < 0).sum() % 2 == parity
    assert ((r.astype(np.float64) - t.astype(np.float64) @ values) ** 2).sum() == pytest.approx(cost, rel=1e-3)
    return cost


@pytest.mark.parametrize("parity", [-1, 0, 1])
@pytest.mark.parametrize("name", ["iq3_s", "iq3_xxs"])
def test_search_with_all_signs_finds_the_best_of_all_points(name, parity):
    points = grid(name)
    for seed in range(6):
        t = triangle(4, seed)
        wanted = np.random.default_rng(seed).normal(size=4) * points.mean()
        r = (t @ wanted).astype(F32)
        assert found(r, t, points, parity, np.inf) == pytest.approx(least(r, t, points, parity), rel=1e-3)


@pytest.mark.parametrize("name", VECTOR_FORMATS)
def test_search_that_holds_clear_signs_is_nearly_as_good(name):
    form, points = VECTOR_FORMATS[name], grid(name)
    parity = 0 if form.even else -1
    ours, best = 0.0, 0.0
    for seed in range(12 if form.group == 4 else 3):
        t = triangle(form.group, seed, 0.5)
        wanted = np.random.default_rng(seed).normal(size=form.group) * points.mean()
        r = (t @ wanted).astype(F32)
        mine, true = found(r, t, points, parity, HOLD[form.even] * points.min()), least(r, t, points, parity)
        assert mine >= true * (1 - 1e-4)
        ours, best = ours + mine, best + true
    assert ours <= 1.1 * best


def test_two_groups_that_share_a_parity():
    points = grid("iq3_xxs")
    costs = np.empty(len(points), F32)
    kit = (np.ascontiguousarray(points.T), 8, True, F32(HOLD[True] * points.min()), costs, costs.view(np.int32))
    for seed in range(8):
        whole = np.zeros((16, 16), F32)
        whole[:8, :8] = triangle(8, seed)
        t = whole[:8, :8]
        r = (t @ np.random.default_rng(seed).normal(size=8) * points.mean()).astype(F32)
        codes, values = np.empty(2, np.uint16), np.empty(8, F32)
        cost = settle(r, t, kit, codes, values)
        assert np.array_equal(np.abs(values), points[codes].reshape(8))
        assert (values < 0).sum() % 2 == 0
        assert ((r - t @ values) ** 2).sum() == pytest.approx(cost, rel=1e-3)
        # Not worse than either parity for the first group, done plainly; and the best first group cannot be undercut.
        assert cost >= least(r[:4], t[:4, :4], points, -1) * (1 - 1e-4)


def plain_feedback(weights, blocks, h):
    """Groups of four from left to right, each the best of all points and signs given the errors before it (float64)."""
    upper, d = upper_factor(h)
    t, points = np.sqrt(d)[:, None] * upper.T, grid(blocks.format.name).astype(np.float64)
    signed = (points[:, None] * signs(4, -1)).reshape(-1, 4)
    steps = np.repeat(blocks.steps().astype(np.float64), blocks.format.sub, axis=1)
    values = np.zeros(weights.shape)
    for row in range(len(weights)):
        for at in range(0, weights.shape[1], 4):
            stop = at + 4
            r = t[at:stop, :stop] @ (weights[row, :stop] - values[row, :stop])
            candidates = signed * steps[row, at]
            values[row, at:stop] = candidates[((r - candidates @ t[at:stop, at:stop].T) ** 2).sum(axis=1).argmin()]
    return values


def run(name, weights, h, **options):
    stock = stock_blocks(name, weights, h)
    settings = {"passes": 0, "scales": False, "damping": 0.05, "output_damping": 0.1, "by_importance": False} | options
    outputs = settings.pop("outputs", None)
    data, before, after = round_vector(weights, stock, name, h, outputs, **settings)
    assert data.shape == stock.shape
    values = unpack_vector(name, data, weights.shape[1]).values()
    assert np.array_equal(weights - values, after)
    assert np.array_equal(weights - unpack_vector(name, stock, weights.shape[1]).values(), before)
    return data, before, after


def test_feedback_is_what_the_formula_says():
    rng = np.random.default_rng(5)
    weights, h = rng.normal(size=(2, 256)).astype(F32), moments(256, 2000)
    _, before, after = run("iq3_s", weights, h)
    full = damped(h, 0.05)
    stock = unpack_vector("iq3_s", stock_blocks("iq3_s", weights, h), 256)
    plain = weights - plain_feedback(weights, stock, full)
    ours, theirs, start = (np.vdot(delta @ full, delta) for delta in (after, plain, before))
    # Only signs that are clear are held; it may cost next to nothing.
    assert ours == pytest.approx(theirs, rel=0.05)
    assert ours < 0.8 * start


@pytest.mark.parametrize("name", VECTOR_FORMATS)
def test_every_pass_lowers_the_loss(name):
    rng = np.random.default_rng(1)
    weights, h = rng.standard_t(4, size=(2, 256)).astype(F32), moments(256, 600)
    full = damped(h, 0.05)
    f = {}
    for passes, scales in ((0, False), (1, False), (0, True), (1, True), (2, True)):
        _, before, after = run(name, weights, h, passes=passes, scales=scales)
        f[passes, scales] = np.vdot(after @ full, after)
    start = np.vdot(before @ full, before)
    assert f[1, False] < f[0, False] < start
    assert f[2, True] <= f[1, True] < f[0, True] < start
    assert f[2, True] < f[1, False]


def test_single_rows_never_get_worse_and_d_stays_an_f16():
    """All the passes' steps from any start: here the library's own blocks, which feedback never saw."""
    rng = np.random.default_rng(2)
    weights, h = rng.normal(size=(3, 256)).astype(F32), moments(256, 600)
    stock = stock_blocks("iq3_s", weights, h)
    start = unpack_vector("iq3_s", stock, 256)
    factors = factor_points(h, 32, 4, 0.05, False)
    points = np.ascontiguousarray(grid("iq3_s").T)
    costs = np.empty(512, F32)
    kit = (points, 4, False, F32(HOLD[False]), costs, costs.view(np.int32))
    delta, none = weights - start.values(), np.zeros((0, 0), F32)
    codes, d, scale, values = start.codes.copy(), start.d.copy(), start.scale.copy(), start.signed()
    state = (d, scale, (start.format.multipliers, 2, 32, 8), kit, codes, values, delta)
    open_points(
        weights, 0, weights.copy(), none, factors.ut, factors.order, factors.roots, factors.opening, *state
    )  # fmt: skip
    losses = []
    for turn in range(3):
        if turn:
            slopes = delta @ factors.h
            shifts = np.empty_like(slopes)
            pass_points(0, slopes, none, shifts, factors.h, *factors.unit, *factors.sub, *state, True)
            assert np.allclose(slopes, delta @ factors.h, atol=1e-3)
        now = VectorBlocks(start.format, codes, (values < 0).astype(np.uint8), d, scale)
        assert np.array_equal(now.signed(), values)
        assert np.array_equal(d, d.astype(np.float16).astype(F32))
        assert (scale.min(), scale.max()) >= (0, 0)
        assert scale.max() <= 15
        error = (weights - now.values()).astype(np.float64)
        assert np.allclose(error, delta, atol=1e-4)
        losses.append(np.einsum("ij,jk,ik->i", error, factors.h.astype(np.float64), error))
    assert (losses[1] <= losses[0] * (1 + 1e-6)).all()
    assert (losses[2] <= losses[1] * (1 + 1e-6)).all()


def test_other_orders_and_other_rows():
    rng = np.random.default_rng(4)
    weights, h = rng.normal(size=(4, 512)).astype(F32), moments(512, 900)
    h[256:] *= 3
    h[:, 256:] *= 3
    outputs = moments(4, 100, seed=2, spread=0.5)
    full, out = damped(h, 0.05), damped(outputs, 0.1)

    def two_sided(delta):
        return np.vdot(out @ delta @ full, delta)

    _, before, plain = run("iq3_s", weights, h, passes=1)
    _, _, ordered = run("iq3_s", weights, h, passes=1, by_importance=True)
    _, _, coupled = run("iq3_s", weights, h, passes=1, outputs=outputs)
    assert two_sided(coupled) < two_sided(plain) < two_sided(before)
    assert np.vdot(ordered @ full, ordered) < np.vdot(before @ full, before)
    assert not np.array_equal(ordered, plain)
