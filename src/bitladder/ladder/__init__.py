"""The whole way from a checkpoint to a measured ladder of quants, kept in one directory and resumable."""

from bitladder.ladder.layout import Layout
from bitladder.ladder.manifest import Manifest, RunRecord, complete_manifest, load_manifest
from bitladder.ladder.options import RunOptions, choose_rungs
from bitladder.ladder.run import RunResult, run

__all__ = [
    "Layout",
    "Manifest",
    "RunOptions",
    "RunRecord",
    "RunResult",
    "choose_rungs",
    "complete_manifest",
    "load_manifest",
    "run",
]
