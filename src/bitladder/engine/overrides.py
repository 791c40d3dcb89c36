"""Metadata that the library is told to read otherwise: tried in a process of its own.

The library trusts what it reads of a model's shape and ends the process where numbers are absurd (block_count −1).
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping

from bitladder.engine.presets import Request, preset_types
from bitladder.errors import BitladderError

_SECONDS = 120


def check_overrides(path: str | os.PathLike[str], kv: Mapping[str, int | float | bool | str]) -> None:
    """Raise BitladderError that names the values if the library breaks down with them; `kv` as in `presets.Request`."""
    if kv:
        _check(os.fspath(path), json.dumps(dict(kv)))


@functools.cache
def _check(path: str, kv: str) -> None:
    given = ", ".join(f"{key}={value}" for key, value in json.loads(kv).items())
    try:
        tried = subprocess.run(
            [sys.executable, "-P", "-m", "bitladder.engine.overrides", path],
            input=kv.encode(),
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BitladderError(f"the library comes to no end with {given}") from None
    if tried.returncode != 0:
        lines = [line.strip() for line in tried.stderr.decode("utf-8", "replace").splitlines() if "ASSERT" in line]
        reason = f" ({lines[0].rpartition('/')[2]})" if lines else ""
        raise BitladderError(f"the library breaks down with {given}{reason}; give values that the model can have")


if __name__ == "__main__":
    os.environ["GGML_NO_BACKTRACE"] = "1"  # else the library has a debugger print where it was
    with contextlib.suppress(BitladderError):  # what it refuses in words it will refuse again
        preset_types(sys.argv[1], Request("Q8_0", only_copy=True, kv=json.load(sys.stdin)))
