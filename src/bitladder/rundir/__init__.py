"""The directory of a run: every path of it, and the manifest that says what is complete. A run writes it, the report
reads it."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.rundir.layout import NAIVE, Layout, naive
    from bitladder.rundir.manifest import (
        CachedHash,
        Manifest,
        OutputFile,
        RunLog,
        RunRecord,
        StepRecord,
        check_source,
        complete_manifest,
        follow,
        is_running,
        last_command,
        load_manifest,
        make_again,
        run_command,
    )

__all__ = [
    "NAIVE",
    "CachedHash",
    "Layout",
    "Manifest",
    "OutputFile",
    "RunLog",
    "RunRecord",
    "StepRecord",
    "check_source",
    "complete_manifest",
    "follow",
    "is_running",
    "last_command",
    "load_manifest",
    "make_again",
    "naive",
    "run_command",
]
open_door(__name__)
