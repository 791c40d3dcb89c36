"""How many threads NumPy's multiplication may start."""

import contextlib

import numpy as np
import pytest

from bitladder.engine import devices
from bitladder.evaluate import MeasureOptions, make_base
from bitladder.keys import Algorithm
from bitladder.text import load_text


@contextlib.contextmanager
def blas_threads(count):
    """Gives NumPy's multiplication so many threads, and yields what says how many it has."""
    controls = devices._controls()
    if controls is None:
        pytest.skip("NumPy uses another BLAS than its own OpenBLAS")
    get, put = controls
    before = get()
    put(count)
    try:
        yield get
    finally:
        put(before)


def test_threads_are_put_back_by_whoever_leaves_last():
    with blas_threads(2) as get:
        first, second = devices.single_threaded(), devices.single_threaded()
        first.__enter__()
        second.__enter__()
        assert get() == 1
        first.__exit__(None, None, None)
        assert get() == 1
        second.__exit__(None, None, None)
        assert get() == 2


def test_an_algorithm_adds_up_alike_whatever_threads_there_are():
    rng = np.random.default_rng(0)
    design = rng.standard_normal((60, 300))

    def solved():
        return np.linalg.solve(design.T @ design + np.eye(300), design.T @ design[:, 0]).tobytes()

    found = []
    for count in (1, 2):
        with blas_threads(count):
            found.append((solved(), Algorithm("solved", ("first",)).entry(solved)()))
    (one, one_entry), (two, two_entry) = found
    assert one == one_entry == two_entry
    if one == two:
        pytest.skip("this BLAS adds up alike with two threads")


def test_a_base_has_the_same_bytes_whatever_threads_there_are(tiny_gguf, tmp_path):
    text = load_text("pydoc:test")
    for count in (1, 2):
        with blas_threads(count):
            make_base(tiny_gguf, text, tmp_path / str(count), MeasureOptions(n_ctx=32, chunks=2, threads=1))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
