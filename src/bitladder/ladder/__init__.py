"""The whole way from a checkpoint to a measured ladder of quants, kept in one directory and resumable."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.ladder.checks import verify_run
    from bitladder.ladder.doctor import Diagnosis, WidthMisfit, diagnose
    from bitladder.ladder.estimate import Estimate, Machine, Stage, choose_effort, estimate, in_words
    from bitladder.ladder.options import RunOptions, choose_rungs
    from bitladder.ladder.run import RunResult, run
    from bitladder.ladder.tracker import Best, Status, TimeLeft

__all__ = [
    "Best",
    "Diagnosis",
    "Estimate",
    "Machine",
    "RunOptions",
    "RunResult",
    "Stage",
    "Status",
    "TimeLeft",
    "WidthMisfit",
    "choose_effort",
    "choose_rungs",
    "diagnose",
    "estimate",
    "in_words",
    "run",
    "verify_run",
]
open_door(__name__)
