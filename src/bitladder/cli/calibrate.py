"""What quants are calibrated with: `texts`, the importance matrix and second moments of them, and what it holds."""

import pathlib

import click

from bitladder.calibrate import (
    ImatrixOptions,
    MomentsOptions,
    collect_imatrix,
    collect_moments,
    merge_imatrices,
    merge_moments,
)
from bitladder.cli import options as shared
from bitladder.cli.options import options_from
from bitladder.cli.outputs import Command, OutputFolder, OutputPath
from bitladder.cli.typed import INPUT, Choice, NamingGroup
from bitladder.engine import Decoding
from bitladder.errors import UsageError
from bitladder.show import Output, common_options
from bitladder.text import Reading, load_text

_BUILTIN_ABOUT = "half of Python's language reference, built in: to try things, not for quants that you publish"


@click.group("texts", cls=NamingGroup, context_settings={"help_option_names": ["-h", "--help"]})
def texts_command() -> None:
    """List the texts that there are to calibrate on and to measure with, and fetch them.

    Any other text is a file of your own.
    """


@texts_command.command(
    "list",
    cls=Command,
    short_help="List the texts that have names.",
    page="run.md",
    examples=("texts list",),
)
@common_options
def list_texts(*, output: Output) -> None:
    """List the texts that have names: those that are built in, and those that `fetch` downloads."""
    from bitladder.hub import TEXTS
    from bitladder.text import BUILTIN

    about = dict.fromkeys(BUILTIN, _BUILTIN_ABOUT) | {name: archive.about for name, archive in TEXTS.items()}
    if output.json:
        output.print_json(about)
        return
    for name, meaning in about.items():
        output.line(f"{name}: {meaning}")


@texts_command.command(
    "fetch",
    cls=Command,
    short_help="Download texts, and check that they are the published ones.",
    page="run.md",
    examples=("texts fetch wikitext-2", "texts fetch wikitext-2 -o texts"),
)
@click.argument("name")
@click.option(
    "-o",
    "--output",
    "folder",
    type=OutputFolder(),
    default=".",
    show_default=True,
    help="Directory for the files.",
)
@common_options
def fetch_text(*, output: Output, name: str, folder: pathlib.Path) -> None:
    """Download the texts NAME from the hub, for example wikitext-2, and check that they are the published ones."""
    from bitladder.hub import fetch_texts

    output.tame_hub()
    output.progress.info(f"{name}, from the hub")
    paths = fetch_texts(name, folder)
    if output.json:
        output.print_json([str(path) for path in paths])
        return
    for path in paths:
        output.line(str(path))


@click.command(
    "imatrix",
    cls=Command,
    page="imatrix.md",
    examples=(
        "imatrix -m model-F16.gguf -f calibration.txt -o imatrix.gguf",
        "imatrix --in-file a.gguf --in-file b.gguf -o both.gguf",
    ),
)
@shared.calibrating("imatrix", "imatrix.gguf", "Matrix")
@options_from(Reading, parameter="reading", spread=False)
@options_from(Decoding, parameter="decoding")
@options_from(ImatrixOptions)
@common_options
def imatrix_command(
    output: Output,
    model: pathlib.Path | None,
    files: tuple[str, ...],
    out: pathlib.Path,
    reading: Reading,
    decoding: Decoding,
    options: ImatrixOptions,
    in_files: tuple[pathlib.Path, ...],
) -> None:
    """Compute an importance matrix from calibration texts, or merge several.

    Files are interchangeable with llama-imatrix. The same command continues an interrupted run.
    """
    if not files:
        n_ctx, form = decoding.n_ctx, options.form
        result = merge_imatrices(out, in_files, n_ctx=n_ctx, form=form, progress=output.progress)
    elif model is None:
        raise UsageError("a text needs a model: pass -m")
    else:
        shared.warn_if_quantized(output, "-m", model)
        texts = [load_text(spec, model) for spec in files]
        result = collect_imatrix(
            model,
            texts,
            out,
            reading=reading,
            decoding=decoding,
            options=options,
            in_files=in_files,
            progress=output.progress,
        )
    if output.json:
        output.print_json({"path": out.name, "entries": result.entries, "chunks": result.chunks, "gaps": result.gaps})
        return
    output.line(f"{out}: {result.entries} entries from {result.chunks} chunks of {decoding.n_ctx} tokens")


@click.command(
    "calibrate",
    cls=Command,
    page="moments.md",
    examples=("calibrate -m model-F16.gguf -f calibration.txt -o moments.gguf --imatrix imatrix.gguf",),
)
@shared.calibrating("moments", "moments.gguf", "Moments")
@click.option("--imatrix", type=OutputPath("imatrix"), help="Write the importance matrix of the same chunks too.")
@options_from(MomentsOptions, leave_out=("form",))
@options_from(Reading, parameter="reading")
@options_from(Decoding, parameter="decoding", leave_out=("n_batch",))
@common_options
def calibrate_command(
    output: Output,
    model: pathlib.Path | None,
    files: tuple[str, ...],
    out: pathlib.Path,
    imatrix: pathlib.Path | None,
    options: MomentsOptions,
    reading: Reading,
    decoding: Decoding,
    in_files: tuple[pathlib.Path, ...],
) -> None:
    """Collect the calibration statistics that --rounding needs, or merge several files of them.

    The statistics are second moments: E[w xxᵀ] of the inputs x of every weight. The weight w of a token is the cost of
    an error there: an error at an attention sink reaches every later token. --imatrix also writes an importance matrix.
    The same command continues an interrupted run.
    """
    if not files:
        if imatrix:
            raise UsageError("--imatrix needs a text: pass -f")
        result = merge_moments(out, in_files, progress=output.progress)
    elif model is None:
        raise UsageError("a text needs a model: pass -m")
    else:
        shared.warn_if_quantized(output, "-m", model)
        texts = [load_text(spec, model) for spec in files]
        result = collect_moments(
            model,
            texts,
            out,
            reading=reading,
            decoding=decoding,
            options=options,
            imatrix=imatrix,
            in_files=in_files,
            progress=output.progress,
        )
    if output.json:
        output.print_json(
            {
                "path": out.name,
                "weights": result.weights,
                "entries": result.entries,
                "chunks": result.chunks,
                "n_ctx": decoding.n_ctx,
                "passes": result.passes,
                "weighting": result.weighting,
                "imatrix": imatrix.name if imatrix else None,
                "gaps": result.gaps,
            }
        )
        return
    output.line(
        f"{out}: {result.entries} entries for {result.weights} weights from {result.chunks} chunks, "
        f"tokens weighted by {result.weighting}"
    )


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
def stats_command(
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
