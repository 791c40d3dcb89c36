"""What a person reads of a run: the model card, the HTML report and their tables. Reads only the run directory."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.report.best import by_size, worth_their_size
    from bitladder.report.card import render_card, write_card
    from bitladder.report.numbers import gigabytes, percent, with_error
    from bitladder.report.page import render_report, write_report
    from bitladder.report.rundir import Run, RunModel, RunPaths, read_run

__all__ = [
    "Run",
    "RunModel",
    "RunPaths",
    "by_size",
    "gigabytes",
    "percent",
    "read_run",
    "render_card",
    "render_report",
    "with_error",
    "worth_their_size",
    "write_card",
    "write_report",
]
open_door(__name__)
