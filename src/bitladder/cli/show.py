"""`bitladder show`: a finished run as a table with a small plot."""

import pathlib

import click

from bitladder.cli.outputs import Command
from bitladder.cli.typed import FOLDER, Whole
from bitladder.show import Output, common_options


@click.command(
    "show",
    cls=Command,
    page="run.md",
    examples=("show olmo2-ladder", "show olmo2-ladder --follow"),
)
@click.argument("folder", metavar="RUN_DIR", type=FOLDER)
@click.option("--follow", "follows", is_flag=True, help="Show what a run says until it ends; it may work elsewhere.")
@click.option("--plot/--no-plot", default=True, show_default=True, help="Draw KLD against size below the table.")
@click.option("--width", type=Whole(40), help="Width of the plot.  [default: the terminal's, at most 80]")
@click.option("--height", type=Whole(5, 100), default=16, show_default=True, help="Lines of the plot.")
@common_options
def command(*, output: Output, folder: pathlib.Path, follows: bool, plot: bool, width: int | None, height: int) -> None:
    """Show the ladder of RUN_DIR: sizes, quality with ±, speed, and KLD against size.

    Figures in bold are within noise of the best of their column. ▸ marks the Pareto front: no file of its size or
    smaller has less KLD. Of a run that is not complete the command shows what there is, and how to continue.
    """
    from bitladder.report import read_run, read_unfinished
    from bitladder.rundir import follow, last_command, load_manifest
    from bitladder.show import (
        deletable,
        ladder_json,
        ladder_table,
        mixed_lines,
        pareto_plot,
        text_table,
        unfinished_json,
        unfinished_table,
    )

    if follows:
        for line in follow(folder):
            output.line(line)
    manifest, unfinished = load_manifest(folder), read_unfinished(folder)
    if manifest is not None and unfinished is not None:
        command = last_command(folder) or unfinished.record.command
        output.progress.info(
            f"The run of {', '.join(unfinished.record.rungs)} is not complete. Continue it with: {command}"
        )
        if manifest.whole() is None:
            if output.json:
                output.print_json(unfinished_json(unfinished, command))
            else:
                output.print(unfinished_table(unfinished))
            return
        output.progress.info("The table is that of the complete run before it.")
    run = read_run(folder)
    if output.json:
        output.print_json(ladder_json(run))
        return
    text = run.base.scores.text
    output.line(f"{run.name}: {text.name}, {run.base.scores.chunks} chunks of {run.base.scores.n_ctx}")
    output.print(ladder_table(run))
    if run.texts:
        output.line("\nKLD on each text")
        output.print(text_table(run))
        for line in mixed_lines(run):
            output.line(line)
    if plot and (lines := pareto_plot(run, width=width or min(output.width, 80), height=height)):
        output.line("")
        for line in lines:
            output.line(line)
    for line in deletable(run):
        output.remark(line)
