"""Rounding to points of a grid against brute force over all points and signs, and against feedback written plainly."""

import itertools

import numpy as np
import pytest
from rounding_cases import moments, stock_blocks

from bitladder.rounding import RoundingOptions, SecondMoments
from bitladder.rounding.matrix import VectorRounding
from bitladder.rounding.method import round_blocks
from bitladder.rounding.point_kernels import Points, choose, search
from bitladder.rounding.second_moments import damped, upper_factor
from bitladder.rounding.vector_types import VECTOR_TYPES

F32 = np.float32
HOLD = {False: RoundingOptions().hold, True: RoundingOptions().hold_even}


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


def as_grid(points, unit, even, hold):
    costs = np.empty(len(points), F32)
    return Points(np.ascontiguousarray(points.T), unit, even, F32(hold), costs, costs.view(np.int32))


def found(r, t, points, parity, hold):
    values = np.empty(points.shape[1], F32)
    grid = as_grid(points, points.shape[1], False, hold)
    whole = np.zeros((2 * len(t), 2 * len(t)), F32)  # as the kernels hand it down: part of a larger matrix
    whole[: len(t), : len(t)] = t
    index, cost = search(r, whole[: len(t), : len(t)], grid, parity, values)
    assert np.array_equal(np.abs(values), points[index])
    assert parity < 0 or (values < 0).sum() % 2 == parity
    assert ((r.astype(np.float64) - t.astype(np.float64) @ values) ** 2).sum() == pytest.approx(cost, rel=1e-3)
    return cost


@pytest.mark.parametrize("parity", [-1, 0, 1])
@pytest.mark.parametrize("name", ["iq3_s", "iq3_xxs"])
def test_search_with_all_signs_finds_the_best_of_all_points(name, parity):
    points = VECTOR_TYPES[name].grid
    for seed in range(6):
        t = triangle(4, seed)
        wanted = np.random.default_rng(seed).normal(size=4) * points.mean()
        r = (t @ wanted).astype(F32)
        assert found(r, t, points, parity, np.inf) == pytest.approx(least(r, t, points, parity), rel=1e-3)


@pytest.mark.parametrize("name", VECTOR_TYPES)
def test_search_that_holds_clear_signs_is_nearly_as_good(name):
    form, points = VECTOR_TYPES[name], VECTOR_TYPES[name].grid
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
    points = VECTOR_TYPES["iq3_xxs"].grid
    grid = as_grid(points, 8, True, HOLD[True] * points.min())
    for seed in range(8):
        whole = np.zeros((16, 16), F32)
        whole[:8, :8] = triangle(8, seed)
        t = whole[:8, :8]
        r = (t @ np.random.default_rng(seed).normal(size=8) * points.mean()).astype(F32)
        codes, values = np.empty(2, np.uint16), np.empty(8, F32)
        cost = choose(r, t, grid, codes, values)
        assert np.array_equal(np.abs(values), points[codes].reshape(8))
        assert (values < 0).sum() % 2 == 0
        assert ((r - t @ values) ** 2).sum() == pytest.approx(cost, rel=1e-3)
        # Not worse than either parity for the first group, done plainly; and the best first group cannot be undercut.
        assert cost >= least(r[:4], t[:4, :4], points, -1) * (1 - 1e-4)


def plain_feedback(weights, blocks, h):
    """Groups of four from left to right, each the best of all points and signs given the errors before it (float64)."""
    upper, d = upper_factor(h)
    t, points = np.sqrt(d)[:, None] * upper.T, blocks.type.grid.astype(np.float64)
    signed = (points[:, None] * signs(4, -1)).reshape(-1, 4)
    steps = np.repeat(blocks.steps().astype(np.float64), blocks.type.sub, axis=1)
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
    start = VECTOR_TYPES[name].unpack(stock, weights.shape[1])
    outputs, scales = options.pop("outputs", None), options.pop("scales", False)
    settings = {"method": "best" if scales else "descent", "passes": 0, "damping": 0.05, "shrinkage": 0} | options
    rounding = RoundingOptions(**settings)
    blocks = round_blocks(weights, start, SecondMoments(h, outputs, rounding), rounding)
    assert blocks.pack().shape == stock.shape
    return weights - start.values(), weights - blocks.values()


def test_feedback_is_what_the_formula_says():
    rng = np.random.default_rng(5)
    weights, h = rng.normal(size=(2, 256)).astype(F32), moments(256, 2000)
    before, after = run("iq3_s", weights, h)
    full = damped(h, 0.05)
    stock = VECTOR_TYPES["iq3_s"].unpack(stock_blocks("iq3_s", weights, h), 256)
    plain = weights - plain_feedback(weights, stock, full)
    ours, theirs, start = (np.vdot(delta @ full, delta) for delta in (after, plain, before))
    # Only signs that are clear are held; it may cost next to nothing.
    assert ours == pytest.approx(theirs, rel=0.05)
    assert ours < 0.8 * start


@pytest.mark.parametrize("name", VECTOR_TYPES)
def test_every_pass_lowers_the_loss(name):
    rng = np.random.default_rng(1)
    weights, h = rng.standard_t(4, size=(2, 256)).astype(F32), moments(256, 600)
    full = damped(h, 0.05)
    f = {}
    for passes, scales in ((0, False), (1, False), (0, True), (1, True), (2, True)):
        before, after = run(name, weights, h, passes=passes, scales=scales)
        f[passes, scales] = np.vdot(after @ full, after)
    start = np.vdot(before @ full, before)
    assert f[1, False] < f[0, False] < start
    assert f[2, True] <= f[1, True] < f[0, True] < start
    assert f[2, True] < f[1, False]


def test_single_rows_never_get_worse_and_d_stays_an_f16():
    """All the passes' steps from any start: here the library's own blocks, which feedback never saw."""
    rng = np.random.default_rng(2)
    weights, h = rng.normal(size=(3, 256)).astype(F32), moments(256, 600)
    start = VECTOR_TYPES["iq3_s"].unpack(stock_blocks("iq3_s", weights, h), 256)
    options = RoundingOptions(damping=0.05)
    second = SecondMoments(h, None, options)
    rows = VectorRounding(weights, start, second, options)
    none, nothing = np.zeros((0, 0), F32), np.zeros_like(weights)
    rows.open(0, slice(0, 256), weights.copy(), nothing, none)
    losses = []
    for turn in range(3):
        if turn:
            slopes = rows.delta @ second.h
            rows.change(turn - 1, 0, 0, 0, slopes, none)
            assert np.allclose(slopes, rows.delta @ second.h, atol=1e-3)
        now = rows.blocks()
        assert np.array_equal(now.d, now.d.astype(np.float16).astype(F32))
        assert now.scale.min() >= 0 and now.scale.max() <= 15
        error = (weights - now.values()).astype(np.float64)
        assert np.allclose(error, rows.delta, atol=1e-4)
        losses.append(np.einsum("ij,jk,ik->i", error, second.h.astype(np.float64), error))
    assert (losses[1] <= losses[0] * (1 + 1e-6)).all()
    assert (losses[2] <= losses[1] * (1 + 1e-6)).all()


def test_other_orders_and_other_rows():
    rng = np.random.default_rng(4)
    weights, h = rng.normal(size=(4, 512)).astype(F32), moments(512, 900)
    h[256:] *= 3
    h[:, 256:] *= 3
    outputs = moments(4, 100, seed=2, spread=0.5)
    full, out = damped(h, 0.05), damped(outputs, 0.05)

    def two_sided(delta):
        return np.vdot(out @ delta @ full, delta)

    before, plain = run("iq3_s", weights, h, passes=1)
    _, ordered = run("iq3_s", weights, h, passes=1, by_importance=True)
    _, coupled = run("iq3_s", weights, h, passes=1, outputs=outputs)
    assert two_sided(coupled) < two_sided(plain) < two_sided(before)
    assert np.vdot(ordered @ full, ordered) < np.vdot(before @ full, before)
    assert not np.array_equal(ordered, plain)
