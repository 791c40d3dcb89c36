"""Options of a run that makes the presets by themselves: quick, and what most tests of a run need."""

import pathlib
from typing import Any

from bitladder.ladder import RunOptions
from bitladder.options import build


def plain_options(**changes: Any) -> RunOptions:
    """Options with --mode naive and --rounding stock, but for `changes`, which may name nested fields.

    `method` is that of rounding.
    """
    plain = {"model": "org/name", "out": pathlib.Path("out"), "mode": "naive", "method": "stock"}
    return build(RunOptions, plain | changes)
