"""The whole way from a checkpoint to a measured ladder of quants, kept in one directory and resumable."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.ladder.layout import Layout
    from bitladder.ladder.manifest import Manifest, RunRecord, complete_manifest, load_manifest
    from bitladder.ladder.options import RunOptions, choose_rungs
    from bitladder.ladder.run import RunResult, run
    from bitladder.ladder.tracker import Best, Status

__all__ = [
    "Best",
    "Layout",
    "Manifest",
    "RunOptions",
    "RunRecord",
    "RunResult",
    "Status",
    "choose_rungs",
    "complete_manifest",
    "load_manifest",
    "run",
]
open_door(__name__)
