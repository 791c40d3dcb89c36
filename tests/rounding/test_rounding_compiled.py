"""The compiled loops give the same blocks in the process that compiles them and in those that find them compiled."""

import os
import subprocess
import sys
import time

import pytest
from numba.core.registry import CPUDispatcher

from bitladder.rounding import kernels, lane_kernels, point_kernels, scalar_kernels, scalar_refine_kernels
from bitladder.rounding import vector_kernels as vectors

MODULES = (kernels, lane_kernels, point_kernels, scalar_kernels, scalar_refine_kernels, vectors)
ENTRIES = {"open_rows", "change_rows", "open_points", "change_points"}
# A sum in another order changes a block here and there, so many are rounded, with outputs that are known by heads.
ROUND = """
import hashlib
import numpy as np
from bitladder.engine.types import quantize_rows, type_by_name
from bitladder.rounding import RoundingOptions, round_tensor
digests = {kind: hashlib.sha256() for kind in KINDS}
for seed in range(16):
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(4, size=(512, 512)).astype(np.float32)
    tokens = rng.normal(size=(2000, 512)) @ (rng.normal(size=(512, 512)) * rng.exponential(size=512)) + 1
    gradients = rng.normal(size=(8, 200, 64)) @ rng.normal(size=(8, 64, 64))
    outputs = np.zeros((512, 512))
    for head, part in enumerate(gradients):
        outputs[64 * head : 64 * head + 64, 64 * head : 64 * head + 64] = part.T @ part
    for kind, digest in digests.items():
        stock = quantize_rows(weights, type_by_name(kind), None)
        rounded = round_tensor(weights, stock, kind, tokens.T @ tokens, RoundingOptions(), outputs)
        digest.update(rounded.data.tobytes())
for kind, digest in digests.items():
    print(kind, digest.hexdigest())
"""


def test_what_an_entry_calls_is_part_of_it():
    loops = {
        name: loop
        for module in MODULES
        for name, loop in vars(module).items()
        if isinstance(loop, CPUDispatcher) and loop.py_func.__module__ == module.__name__
    }
    assert len(loops) > 30 and set(loops) >= ENTRIES
    apart = {
        name
        for name, loop in loops.items()
        if not loop.targetoptions.get("forceinline") and loop.targetoptions.get("inline") != "always"
    }
    assert apart == ENTRIES
    for module in MODULES:
        for name in ENTRIES & set(vars(module)):
            # An entry that another loop calls would be there twice.
            callers = [other for other, loop in loops.items() if name in loop.py_func.__code__.co_names]
            assert callers == []


def test_compiled_loops_that_are_older_than_a_source_are_dropped(tmp_path, monkeypatch):
    """Numba alone keeps one that has a changed loop of another file in it, and fails at a class that was renamed."""
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels.py"))
    for name, seconds in (
        ("kernels.py", 1000), ("other.py", 3000), ("clock.py", time.time() + 9999),
        ("kernels.loop-3.py311.nbi", 2000), ("kernels.loop-9.py311.nbi", 4000),
    ):  # fmt: skip
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (seconds, seconds))
    kernels._drop_older(tmp_path)
    assert [path.name for path in tmp_path.glob("*.nbi")] == ["kernels.loop-9.py311.nbi"]


@pytest.mark.slow
def test_a_process_that_compiles_rounds_as_one_that_does_not(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}

    def blocks(*kinds):
        code = ROUND.replace("KINDS", repr(kinds))
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return dict(line.split() for line in done.stdout.splitlines())

    first = blocks("q4_K", "iq3_s")
    assert blocks("q4_K", "iq3_s") == first
    assert blocks("iq3_s", "q4_K") == first
