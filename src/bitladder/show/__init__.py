"""Every table and plot of the terminal, and the one place that prints."""

from typing import TYPE_CHECKING

from bitladder.doors import open_door

if TYPE_CHECKING:
    from bitladder.show.heatmap import check_target, write_plot
    from bitladder.show.imatrix_view import print_view, view_differences, view_statistics
    from bitladder.show.ladder_tables import (
        RunDisplay,
        deletable,
        diagnosis_json,
        diagnosis_table,
        estimate_lines,
        estimate_table,
        ladder_json,
        ladder_table,
        mixed_lines,
        next_steps,
        pareto_plot,
        text_table,
        unfinished_json,
        unfinished_table,
    )
    from bitladder.show.output import Output, common_options, one_printable_line
    from bitladder.show.recipe_tables import (
        difference,
        preflight_json,
        preflight_lines,
        preflight_tables,
        result_line,
        rounding_json,
        rounding_lines,
    )
    from bitladder.show.score_tables import comparison_json, comparison_sections, eval_tables
    from bitladder.show.speed_tables import FORMATS, render, speed_table
    from bitladder.show.table import Column, Table, figures

__all__ = [
    "FORMATS",
    "Column",
    "Output",
    "RunDisplay",
    "Table",
    "check_target",
    "common_options",
    "comparison_json",
    "comparison_sections",
    "deletable",
    "diagnosis_json",
    "diagnosis_table",
    "difference",
    "estimate_lines",
    "estimate_table",
    "eval_tables",
    "figures",
    "ladder_json",
    "ladder_table",
    "mixed_lines",
    "next_steps",
    "one_printable_line",
    "pareto_plot",
    "preflight_json",
    "preflight_lines",
    "preflight_tables",
    "print_view",
    "render",
    "result_line",
    "rounding_json",
    "rounding_lines",
    "speed_table",
    "text_table",
    "unfinished_json",
    "unfinished_table",
    "view_differences",
    "view_statistics",
    "write_plot",
]
open_door(__name__)
