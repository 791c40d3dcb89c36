"""Main memory: what is freed is given back."""

import pathlib
import platform
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from bitladder.engine import give_back_memory


def anonymous_memory():
    """Bytes of this process that are not of files."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another library of C gives memory back by itself")
def test_memory_that_threads_freed_goes_back_to_the_system():
    kept = []

    def use():
        blocks = [bytearray(b"1" * 60_000) for _ in range(4000)]
        kept.append(blocks[-1])  # what lies above is never given back unasked

    with ThreadPoolExecutor(1) as pool:
        pool.submit(use).result()
    before = anonymous_memory()
    give_back_memory()
    assert anonymous_memory() < before - 200e6
