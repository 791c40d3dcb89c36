"""The inner loops of rounding against brute force, numpy's F16, and feedback written as GPTQ's paper has it."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from rounding_cases import moments, stock_blocks

from bitladder.rounding import RoundingOptions, SecondMoments
from bitladder.rounding.kernels import half
from bitladder.rounding.lane_kernels import LANES, half_lanes, new_lanes, quadratic_lanes, round_lanes
from bitladder.rounding.matrix import hessians
from bitladder.rounding.method import round_blocks
from bitladder.rounding.scalar_kernels import Rows, Shape, descend, feedback, nearest, part_of, shape_of
from bitladder.rounding.scalar_refine_kernels import refine_plain, refine_scaled, refit
from bitladder.rounding.scalar_types import NONE, SCALAR_TYPES
from bitladder.rounding.second_moments import couplings, damped, upper_factor

F32 = np.float32
# With integer scales, and with an F16 step for each block: with and without offset, levels evenly spaced or not.
SCALED = ("q4_K", "q3_K", "iq4_xs")
PLAIN = ("q4_1", "q4_0", "iq4_nl")


@pytest.mark.parametrize("levels", [*{kind.levels.tobytes(): kind.levels for kind in SCALAR_TYPES.values()}.values()])
@pytest.mark.parametrize("first", [0, 1])
def test_nearest_level(levels, first):
    uniform = bool((np.diff(levels) == 1).all())
    rng = np.random.default_rng(0)
    tried = np.concatenate([rng.uniform(levels[0] - 3, levels[-1] + 3, 300), levels, levels + 0.5, [1e9, -1e9]])
    for x in tried.astype(F32):
        index = nearest(x, levels, uniform, first)
        assert first <= index < len(levels)
        distances = np.abs(levels[first:] - x)
        assert abs(levels[index] - x) == distances.min()


def test_half_is_the_nearest_f16():
    every = np.arange(1 << 15, dtype=np.uint16)[::7].view(np.float16)
    every = every[np.isfinite(every)].astype(F32)
    middles = (every[:-1] + every[1:]) / 2
    rng = np.random.default_rng(0)
    tried = np.concatenate([every, middles, np.exp(rng.uniform(-20, 11, 500)).astype(F32), [F32(65519), F32(65503.9)]])
    for x in tried.astype(F32):
        wanted = np.clip(F32(x), F32(0), F32(65504)).astype(np.float16)
        assert half(x) == F32(wanted)
        assert half(-x) == -F32(wanted)
    assert half(F32(1e9)) == 65504
    assert half(F32(-1e9)) == -65504


def test_factors_multiply_to_what_they_factor():
    h = damped(moments(64, 500), 0.03)
    assert np.diag(h).mean() == pytest.approx(1.03)
    upper, d = upper_factor(h)
    assert np.allclose(np.tril(upper, -1), 0)
    assert np.allclose(np.diag(upper), 1)
    assert np.allclose(upper @ np.diag(d) @ upper.T, h)
    second = SecondMoments(moments(64, 500), None, RoundingOptions(damping=0.03, shrinkage=0))
    order = np.argsort(-np.diag(h), kind="stable")
    ut, d = (part.astype(np.float64) for part in second.factor(order))
    assert np.allclose(ut.T @ np.diag(d) @ ut, h[np.ix_(order, order)], atol=1e-4)
    local = second.local(32)
    for block in range(2):
        part = h[32 * block : 32 * block + 32, 32 * block : 32 * block + 32]
        ut, d = local.ut[block].astype(np.float64), local.d[block].astype(np.float64)
        assert np.allclose(ut.T @ np.diag(d) @ ut, part, atol=1e-4)
        assert np.allclose(local.inverse[block] @ part, np.eye(32), atol=1e-3)


def test_couplings_split_the_two_sided_loss_by_rows():
    rng = np.random.default_rng(0)
    h, outputs = moments(16, 200).astype(np.float64), moments(6, 200, seed=1)
    delta = rng.normal(size=(6, 16))
    leading, coupling = (matrix.astype(np.float64) for matrix in couplings(outputs, 0.1)[:2])
    full = damped(outputs, 0.1)
    _, d = upper_factor(full)
    total = np.trace(full @ delta @ h @ delta.T)
    parts = [delta[i] + leading[i, :i] @ delta[:i] for i in range(6)]
    assert sum(d[i] * part @ h @ part for i, part in enumerate(parts)) == pytest.approx(total, rel=1e-5)
    # Moving one row, all others as they are.
    for i in range(6):
        change = rng.normal(size=16)
        moved = delta.copy()
        moved[i] += change
        seen = coupling[i] @ delta
        expected = full[i, i] * ((seen + change) @ h @ (seen + change) - seen @ h @ seen)
        assert np.trace(full @ moved @ h @ moved.T) - total == pytest.approx(expected, rel=1e-4)


def gptq(weights, h, steps, offsets, levels, order):
    """The paper's algorithm (arXiv 2210.17323): errors divided by, and handed on with, Cholesky's factor of H⁻¹."""
    inverse = np.linalg.cholesky(np.linalg.inv(h[np.ix_(order, order)])).T
    rest = weights[:, order].astype(np.float64)
    indices = np.empty(weights.shape, np.int64)
    for place, column in enumerate(order):
        scaled = (rest[:, place] - offsets[:, column]) / steps[:, column]
        indices[:, column] = np.abs(scaled[:, None] - levels).argmin(axis=1)
        error = rest[:, place] - (levels[indices[:, column]] * steps[:, column] + offsets[:, column])
        rest[:, place:] -= np.outer(error / inverse[place, place], inverse[place, place:])
    return indices


@pytest.mark.parametrize("by_importance", [False, True])
@pytest.mark.parametrize("name", ["q4_0", "q4_K", "iq4_nl", "q3_K"])
def test_feedback_is_gptq_with_the_steps_of_the_type(name, by_importance):
    rng = np.random.default_rng(5)
    weights = rng.normal(size=(6, 256)).astype(F32)
    h = moments(256, 2000)
    start = SCALAR_TYPES[name].unpack(stock_blocks(name, weights, h), 256)
    options = RoundingOptions(method="feedback", damping=0.05, shrinkage=0, by_importance=by_importance)
    blocks = round_blocks(weights, start, SecondMoments(h, None, options), options)
    assert np.array_equal(start.steps(), blocks.steps())
    full = damped(h, 0.05)
    order = np.argsort(-np.diag(full), kind="stable") if by_importance else np.arange(256)
    sub = start.type.sub
    steps, offsets = (np.repeat(part.astype(np.float64), sub, axis=1) for part in (start.steps(), start.offsets()))
    expected = gptq(weights, full, steps, offsets, start.type.levels.astype(np.float64), order)
    # A tie that float32 decides otherwise would change the rest of its row.
    same = (expected == blocks.indices).all(axis=1)
    assert same.sum() >= 5


class Row:
    """One row of a type, and f in float64 by the definition."""

    def __init__(self, name, seed):
        rng = np.random.default_rng(seed)
        self.weights = rng.standard_t(4, size=(1, 256)).astype(F32)
        h = moments(256, 400, seed)
        kind = self.kind = SCALAR_TYPES[name]
        self.blocks = blocks = kind.unpack(stock_blocks(name, self.weights, h), 256)
        second = SecondMoments(h, None, RoundingOptions(damping=0.05, shrinkage=0))
        self.h = second.h
        (self.hessian,) = hessians(second, kind.sub)
        self.shape, self.lanes = shape_of(kind), new_lanes(kind.sub)
        self.delta = self.weights - blocks.values()
        rows = Rows(blocks.d, blocks.dmin, blocks.scale, blocks.minimum, blocks.indices, self.delta)
        self.row = part_of(rows, 0, 0, 256, self.shape)
        self.slope = self.h @ self.delta[0]

    def parts(self):
        return self.blocks.steps()[0], self.blocks.offsets()[0]

    def f(self):
        step, offset = (np.repeat(part, self.kind.sub).astype(np.float64) for part in self.parts())
        values = self.kind.levels[self.blocks.indices[0]].astype(np.float64) * step + offset
        delta = self.weights[0].astype(np.float64) - values
        h = self.h.astype(np.float64)
        # What the kernels carry along is what it should be.
        assert np.allclose(self.delta[0], delta, atol=1e-4)
        assert np.allclose(self.slope, h @ delta, atol=1e-3)
        return delta @ h @ delta

    def run(self, what):
        if what == "descend":
            return descend(self.h, self.shape, self.row, self.slope)
        if what == "refit":
            return refit(self.hessian, self.shape, self.row, self.slope)
        if self.kind.scales == NONE:
            steps = np.array([1, 0.95, 1.05, 0.9, 1.1], F32)
            return refine_plain(self.hessian, self.shape, self.row, steps, self.slope, self.lanes)
        return refine_scaled(self.hessian, self.shape, self.row, self.slope, self.lanes)


@pytest.mark.parametrize("name", SCALED + PLAIN)
def test_no_step_ever_raises_the_loss(name):
    changed = dict.fromkeys(("descend", "refine", "refit"), 0)
    for seed in range(3):
        row = Row(name, seed)
        f = row.f()
        for what in ("descend", "refine", "refit", "descend", "refit", "refine"):
            count = row.run(what)
            now = row.f()
            assert now <= f * (1 + 1e-6), what
            assert count == 0 or now < f
            changed[what] += count
            f = now
        limits, scale = row.kind.scales, row.blocks.scale
        assert limits[0] <= scale.min() and scale.max() <= limits[1]
        for numbers in (row.blocks.d, row.blocks.dmin):
            assert np.array_equal(numbers, numbers.astype(np.float16).astype(F32))
    assert all(changed.values()), changed


def test_descent_ends_where_no_single_index_helps():
    row = Row("q4_K", 7)
    while row.run("descend"):
        pass
    f = row.f()
    for column in range(0, 256, 5):
        index = row.blocks.indices[0, column]
        step = np.repeat(row.parts()[0], 32).astype(np.float64)[column]
        for other in range(16):
            change = (row.kind.levels[other] - row.kind.levels[index]) * step
            delta = row.delta[0].astype(np.float64)
            delta[column] -= change
            assert delta @ row.h.astype(np.float64) @ delta >= f * (1 - 1e-5)


def test_against_the_true_optimum_of_small_problems():
    """Four columns and eight levels: all 4,096 choices are tried."""
    levels = np.arange(-4, 4, dtype=F32)
    choices = np.array(list(itertools.product(range(8), repeat=4)))
    shape = Shape(4, 1, levels, (levels[1:] + levels[:-1]) / 2, True, 0, F32(0), np.ones(4, np.int64), 1)
    none = np.zeros(4, F32)
    ratios = {"nearest": [], "feedback": [], "descent": []}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        target = rng.uniform(-3.5, 2.5, 4).astype(F32)
        x = rng.normal(size=(30, 4)) + 1.5 * rng.normal(size=(30, 1))
        second = SecondMoments(x.T @ x / 30, None, RoundingOptions(damping=0.01, shrinkage=0))
        h, columns = second.h.astype(np.float64), np.arange(4)

        def cost(indices, target=target, h=h):
            delta = target - levels[indices]
            return np.einsum("...i,ij,...j->...", delta, h, delta)

        best = cost(choices).min()
        indices, delta = np.zeros(4, np.uint8), np.empty(4, F32)
        row = Rows(np.ones(1, F32), none, np.ones(1, np.int16), np.ones(1, np.int16), indices, delta)
        feedback(target, none, second.factor(columns)[0], columns, shape, row, delta)
        ratios["nearest"].append(cost(np.abs(target[:, None] - levels).argmin(axis=1)) / best)
        ratios["feedback"].append(cost(indices) / best)
        slope = second.h @ delta
        while descend(second.h, shape, row, slope):
            pass
        ratios["descent"].append(cost(indices) / best)
    means = {name: float(np.mean(values)) for name, values in ratios.items()}
    assert min(map(min, ratios.values())) >= 1 - 1e-6
    assert 1 <= means["descent"] <= means["feedback"] < means["nearest"]
    assert means["descent"] < 1.35
    # Often the optimum itself.
    assert np.mean(np.array(ratios["descent"]) < 1 + 1e-6) > 0.5


@pytest.mark.parametrize("name", ["q4_K", "q6_K", "q8_0", "iq4_nl"])
def test_lanes_do_what_feedback_does_with_each_step(name):
    """Levels and costs of sixteen steps at once, against feedback written plainly in float64."""
    kind, rng = SCALAR_TYPES[name], np.random.default_rng(3)
    second = SecondMoments(moments(kind.sub, 300), None, RoundingOptions(damping=0.05, shrinkage=0))
    local, lanes = second.local(kind.sub), new_lanes(kind.sub)
    target = rng.normal(size=kind.sub).astype(F32)
    lanes.size[:] = np.linspace(0.7, 1.3, LANES) * 2.5 / np.abs(kind.levels).max()
    lanes.size[8:] *= -1
    lanes.shift[:] = rng.normal(size=LANES) * 0.1
    round_lanes(target, local.ut[0], local.d[0], shape_of(kind), lanes)
    quadratic_lanes(second.h, lanes)
    levels, h = kind.levels.astype(np.float64)[kind.lowest :], second.h.astype(np.float64)
    same = 0
    for lane in range(LANES):
        chosen = lanes.level.reshape(-1, LANES)[:, lane].astype(np.float64)
        assert set(chosen) <= set(levels)
        errors, expected = np.zeros(kind.sub), np.zeros(kind.sub)
        for j in range(kind.sub):
            aim = target[j] + local.ut[0, j, :j] @ errors[:j] - lanes.shift[lane]
            expected[j] = levels[np.abs(levels - aim / lanes.size[lane]).argmin()]
            errors[j] = target[j] - expected[j] * lanes.size[lane] - lanes.shift[lane]
        same += np.array_equal(chosen, expected)
        errors = target - chosen * lanes.size[lane] - lanes.shift[lane]
        assert lanes.cost[lane] == pytest.approx(errors @ h @ errors, rel=1e-3)
        assert lanes.square[lane] == pytest.approx(chosen @ h @ chosen, rel=1e-4)
    assert same >= LANES - 2  # a tie that float32 decides otherwise changes the columns behind it


def test_lanes_round_to_the_nearest_f16():
    rng = np.random.default_rng(0)
    odd = [0, 65519, 1e9, 6.1e-5, 6.104e-5, 5.96e-8, 2e-8, 3e-8, 2**-14, 2**-14 - 2**-25, 1]
    tried = np.concatenate([np.exp(rng.uniform(-20, 11, 16 * 60 - len(odd))), odd]).astype(F32)
    tried[::2] *= -1
    for first in range(0, len(tried), LANES):
        numbers = tried[first : first + LANES].copy()
        half_lanes(numbers)
        assert np.array_equal(numbers, numbers.astype(np.float16).astype(F32))
        wanted = np.clip(tried[first : first + LANES], -65504, 65504)
        best = wanted.astype(np.float16).astype(F32)
        assert np.array_equal(np.abs(numbers - wanted), np.abs(best - wanted))


def test_where_nothing_can_be_written_loops_are_compiled_again():
    """As for a user without a home whose package belongs to somebody else."""
    code = """
import numba.core.caching as caching
def refuse(self): raise OSError(30, "read-only")
caching._CacheLocator.ensure_cache_path = refuse
from bitladder.rounding.kernels import half
print(half(0.1))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == float(np.float16(0.1))
