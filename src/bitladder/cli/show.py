"""`bitladder show`: a finished run as a table with a small plot."""

import pathlib

import click

from bitladder.cli.outputs import Command
from bitladder.cli.typed import Whole
from bitladder.show import Output, common_options


@click.command(
    "show",
    cls=Command,
    page="run.md",
    examples=("show olmo2-ladder",),
)
@click.argument("folder", metavar="RUN_DIR", type=click.Path(exists=True, file_okay=False, path_type=pathlib.Path))
@click.option("--plot/--no-plot", default=True, show_default=True, help="Draw KLD against size below the table.")
@click.option("--width", type=Whole(40), help="Width of the plot.  [default: the terminal's, at most 80]")
@click.option("--height", type=Whole(5, 100), default=16, show_default=True, help="Lines of the plot.")
@common_options
def command(*, output: Output, folder: pathlib.Path, plot: bool, width: int | None, height: int) -> None:
    """Show the ladder of RUN_DIR: sizes, quality with ±, speed, and KLD against size.

    Figures in bold are within noise of the best of their column. ▸ marks the Pareto front: no file of its size or
    smaller has less KLD.
    """
    from bitladder.report import read_run
    from bitladder.show import ladder_json, ladder_table, pareto_plot

    run = read_run(folder)
    if output.json:
        output.print_json(ladder_json(run))
        return
    text = run.base.scores.text
    output.line(f"{run.name}: {text.name}, {run.base.scores.chunks} chunks of {run.base.scores.n_ctx}")
    output.print(ladder_table(run))
    if plot and (lines := pareto_plot(run, width=width or min(output.width, 80), height=height)):
        output.line("")
        for line in lines:
            output.line(line)
