"""Rounding experts: each with the moments of its own inputs, one after the other."""

import tracemalloc

import numpy as np

from bitladder.calibrate import (
    Correlations,
    MomentsFile,
    MomentShape,
    Provenance,
    pack_triangle,
    unpack_triangle,
    writing_moments,
)
from bitladder.engine import quantize_rows, type_by_name
from bitladder.refine.round.output_rounding import OutputRounding
from bitladder.rounding import RoundingOptions, round_tensor

EXPERTS, EXPERT_WIDTH = 200, 128


def write_expert_moments(path, name, unreached=()):
    """Second moments of hundreds of experts, written one after the other."""
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 400, EXPERTS)
    counts[list(unreached)] = 0

    def matrices():
        for count in counts:
            x = rng.normal(size=(40, EXPERT_WIDTH)).astype(np.float32) * np.linspace(0.2, 2, EXPERT_WIDTH)
            inputs = (x.T @ x / 40 if count else np.zeros((EXPERT_WIDTH,) * 2)).astype(np.float32)
            yield Correlations.of(pack_triangle(inputs)[None])

    with writing_moments(path, Provenance(["none"], 1, 64), {name: MomentShape(EXPERTS, EXPERT_WIDTH)}, {}) as writer:
        writer.write_inputs(name, matrices(), counts)
    return counts


def test_hundreds_of_experts_are_rounded_one_by_one(tmp_path):
    """In the memory of a few of them; one that no token reached is rounded for the mean of the others' inputs."""
    name, kind = "blk.0.ffn_up_exps.weight", type_by_name("q4_0")
    counts = write_expert_moments(tmp_path / "m.gguf", name, unreached=[7, 150])
    weights = np.random.default_rng(0).standard_t(5, (EXPERTS, 8, EXPERT_WIDTH)).astype(np.float32)
    importance, options = np.ones((EXPERTS, EXPERT_WIDTH), np.float32), RoundingOptions(method="feedback")
    with MomentsFile(tmp_path / "m.gguf") as moments:
        rounding = OutputRounding([moments], options)
        first = quantize_rows(weights[0], kind, importance[0])
        round_tensor(weights[0], first, "q4_0", unpack_triangle(moments.packed(name, 0)), options)  # compiles
        tracemalloc.start()
        blocks = rounding(name, weights, kind, importance)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 0.25 * EXPERTS * EXPERT_WIDTH**2 * 4
        known = {index: moments.packed(name, index).astype(np.float64) for index in range(EXPERTS)}
        mean = unpack_triangle(sum(known[i] * counts[i] for i in known) / counts.sum()).astype(np.float32)
        for index, inputs in ((7, mean), (150, mean), (8, unpack_triangle(known[8].astype(np.float32)))):
            stock = quantize_rows(weights[index], kind, importance[index])
            expected = round_tensor(weights[index], stock, "q4_0", inputs, options)
            # Ties aside, these are the same blocks; another expert's moments give others.
            assert np.mean(blocks[index] == expected.data) > 0.99
            other = round_tensor(weights[index], stock, "q4_0", unpack_triangle(known[9]), options)
            assert np.mean(blocks[index] == other.data) < 0.95
