"""bitladder stats."""

import pathlib

import click

from bitladder.cli.outputs import Command, OutputPath
from bitladder.cli.typed import INPUT, Choice
from bitladder.errors import UsageError
from bitladder.show import Output, common_options


@click.command(
    "stats",
    cls=Command,
    page="statistics.md",
    examples=(
        "stats imatrix.gguf --by kind",
        "stats before.gguf after.gguf --heatmap change",
    ),
)
@click.argument("imatrix", type=INPUT)
@click.argument("other", type=INPUT, required=False, metavar="[IMATRIX2]")
@click.option("-m", "--model", type=INPUT, help="The model's GGUF: lists its weights without an entry.")
@click.option(
    "--by",
    type=Choice(["tensor", "layer", "kind"]),
    default="tensor",
    show_default=True,
    help="Rows: each tensor, or averages by layer or kind.",
)
@click.option(
    "--sort", metavar="COLUMN", help="Sort by a column, largest first; -COLUMN reverses the order.  [default: by layer]"
)
@click.option("--kind", "kinds", multiple=True, help="Only tensors of this kind, such as attn_v; may be repeated.")
@click.option("--format", "form", type=Choice(["table", "csv", "json", "md"]), default="table", show_default=True)
@click.option("--heatmap", metavar="COLUMN", help="Show a column as a map of layers × kinds instead of the table.")
@click.option("--plot", type=OutputPath("plot"), help="Draw such a map to a .png (with bitladder[plot]) or .html file.")
@click.option("--statistic", metavar="COLUMN", help="What --plot draws.  [default: sum; of two imatrices, change]")
@common_options
def command(
    output: Output,
    imatrix: pathlib.Path,
    other: pathlib.Path | None,
    model: pathlib.Path | None,
    by: str,
    sort: str | None,
    kinds: tuple[str, ...],
    form: str,
    heatmap: str | None,
    plot: pathlib.Path | None,
    statistic: str | None,
) -> None:
    """Show what an importance matrix holds and what it lacks, or how two of one model differ.

    Figures are those of llama-imatrix --show-statistics. With two files, tensors with the largest change come first.
    """
    from bitladder.show import check_target, print_view, view_differences, view_statistics, write_plot

    form = "json" if output.json else form
    if statistic and not plot:
        raise UsageError("--statistic chooses what --plot draws: add --plot FILE")
    if heatmap and form != "table":
        raise UsageError(f"--heatmap is for the terminal: leave out --format {form}, or use --plot FILE")
    if plot:
        check_target(plot)
    if other:
        view = view_differences(imatrix, other, model, kinds, by, sort)
    else:
        view = view_statistics(imatrix, model, kinds, by, sort)
    if plot:
        figures = view.map(statistic or ("change" if other else "sum"))
        write_plot(plot, figures, view.heading, view.rows, view.columns, view.notes)
        output.progress.info(f"wrote {plot}")
    print_view(output, view, form, heatmap, with_rows=form != "table" or not (heatmap or plot))
