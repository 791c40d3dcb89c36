"""What a person reads of a run: the model card, the HTML report and their tables. Reads only the run directory."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.report.best import USUAL_MEMORIES, best_fitting, by_size, recommended, worth_their_size
    from bitladder.report.card import render_card, write_card
    from bitladder.report.finished_run import (
        FinishedRun,
        RunModel,
        UnfinishedRun,
        read_run,
        read_unfinished,
    )
    from bitladder.report.page import render_report, write_report
    from bitladder.report.tables import gigabytes, percent, with_error

__all__ = [
    "USUAL_MEMORIES",
    "FinishedRun",
    "RunModel",
    "UnfinishedRun",
    "best_fitting",
    "by_size",
    "gigabytes",
    "percent",
    "read_run",
    "read_unfinished",
    "recommended",
    "render_card",
    "render_report",
    "with_error",
    "worth_their_size",
    "write_card",
    "write_report",
]
open_door(__name__)
