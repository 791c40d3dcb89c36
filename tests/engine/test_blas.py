"""How many threads NumPy's multiplication may start."""

import pytest

from bitladder.engine import devices


def test_threads_are_put_back_by_whoever_leaves_last():
    controls = devices._controls()
    if controls is None:
        pytest.skip("NumPy uses another BLAS than its own OpenBLAS")
    get, put = controls
    before = get()
    put(2)
    try:
        first, second = devices.single_threaded(), devices.single_threaded()
        first.__enter__()
        second.__enter__()
        assert get() == 1
        first.__exit__(None, None, None)
        assert get() == 1
        second.__exit__(None, None, None)
        assert get() == 2
    finally:
        put(before)
