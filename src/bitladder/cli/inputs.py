"""What a ladder is made from and measured with: models (`doctor`, `convert`), `texts`, `tasks`, an imatrix (`stats`).

The native library is imported when a verb does its work, so that help is quick.
"""

import dataclasses
import pathlib

import click

from bitladder.cli import options as shared
from bitladder.cli.options import options_from, warn_unused, warn_unused_by_conversion
from bitladder.cli.outputs import Command, OutputFolder, OutputPath, check_output
from bitladder.cli.typed import FETCHED_TEXT, INPUT, TASK, Choice, FileOrName, NamingGroup, Whole
from bitladder.convert import ConvertOptions
from bitladder.errors import UsageError
from bitladder.show import Output, common_options
from bitladder.units import number_of

_BUILTIN_ABOUT = "half of Python's language reference, built in: to try things, not for quants that you publish"


@click.command(
    "convert",
    cls=Command,
    page="convert.md",
    examples=(
        "convert allenai/OLMo-2-0425-1B",
        "convert ./checkpoint -o model-BF16.gguf --outtype bf16",
    ),
)
@click.argument("model", type=FileOrName())
@click.option(
    "-o",
    "--output",
    "out",
    type=OutputPath("full model"),
    help="The GGUF file to write.  [default: named after the model, in the current directory]",
)
@options_from(ConvertOptions)
@shared.threads
@common_options
def convert_command(
    model: str, out: pathlib.Path | None, options: ConvertOptions, threads: int | None, *, output: Output
) -> None:
    """Convert MODEL, a checkpoint's directory or a Hugging Face hub id, to GGUF."""
    from bitladder import convert as package

    warn_unused_by_conversion(output, model, options)
    target = out or pathlib.Path(package.default_name(model, options.outtype))
    check_output(target, "full model")
    result = package.convert(
        model,
        target,
        outtype=options.outtype,
        upstream=options.upstream,
        converter=options.converter,
        trust_remote_code=options.trust_remote_code,
        projector=target.with_name(f"mmproj-{target.name}") if options.mmproj else None,
        threads=threads,
        progress=output.progress,
    )
    if output.json:
        output.print_json(
            dataclasses.asdict(result)
            | {"path": str(result.path), "projector": result.projector and str(result.projector)}
        )
    else:
        output.line(
            f"{result.path}: {result.architecture}, {result.outtype}, {number_of(result.tensors, 'tensor')}, "
            f"{number_of(result.bytes, 'byte')}"
        )
        if result.projector is not None:
            output.line(f"{result.projector}: projector, {number_of(result.projector.stat().st_size, 'byte')}")


@click.command(
    "doctor",
    cls=Command,
    page="convert.md",
    examples=("doctor allenai/OLMo-2-0425-1B", "doctor ./checkpoint --json"),
)
@click.argument("model", type=FileOrName())
@options_from(ConvertOptions)
@common_options
def doctor_command(*, output: Output, model: str, options: ConvertOptions) -> int:
    """Say what a run would do with MODEL, and whether it works, without doing it.

    MODEL is a checkpoint's directory, a Hugging Face hub id, or a GGUF. Only headers and small files are read. Time,
    memory and disk are those of the whole ladder with the built-in texts. The exit code is 1 if the model cannot work.
    """
    from bitladder.ladder import RunOptions, diagnose, estimate
    from bitladder.show import diagnosis_json, diagnosis_table

    warn_unused_by_conversion(output, model, options)
    diagnosis, cost = diagnose(model, options, progress=output.progress), None
    if diagnosis.works and diagnosis.shape is not None:
        cost = estimate(RunOptions(model, pathlib.Path("ladder"), conversion=options), shape=diagnosis.shape)
    if output.json:
        output.print_json(diagnosis_json(diagnosis, cost))
    else:
        output.print(diagnosis_table(diagnosis, cost))
    return 0 if diagnosis.works else 1


@click.group(
    "texts",
    cls=NamingGroup,
    page="run.md",
    examples=("texts list", "texts fetch wikitext-2"),
)
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
@click.argument("name", type=FETCHED_TEXT)
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

    paths = fetch_texts(name, folder, output.progress)
    if output.json:
        output.print_json([str(path) for path in paths])
        return
    for path in paths:
        output.line(str(path))


@click.command(
    "tasks",
    cls=Command,
    page="tasks.md",
    examples=(
        "tasks",
        "tasks hellaswag:hellaswag_val.txt --task-count 400 -o drawn.txt",
    ),
)
@click.argument("spec", type=TASK, metavar="[NAME[:SOURCE]]", required=False)
@click.option(
    "-o",
    "--output",
    "out",
    type=OutputPath("questions"),
    help="Write the questions to this file, in llama-perplexity's format.",
)
@click.option(
    "--task-count",
    type=Whole(1),
    help="Questions to draw, as `eval` draws them.  [default: all]",
)
@common_options
def tasks_command(spec: str | None, out: pathlib.Path | None, task_count: int | None, *, output: Output) -> None:
    """Read the benchmark NAME from SOURCE (a file, a folder, or by default the hub's data set), and show what it holds.

    Without NAME all benchmarks are listed.
    """
    from bitladder.evaluate import export_task, load_task, parse_specs, summarize, task_command, task_meanings

    if spec is None:
        warn_unused(output, "without NAME", {"out", "task_count"})
        if output.json:
            output.print_json(task_meanings())
        else:
            for name, meaning in task_meanings().items():
                output.line(f"{name}: {meaning}")
        return
    specs = parse_specs(spec, option="")
    if len(specs) != 1:
        raise UsageError("name one task at a time")
    task = load_task(specs[0])
    for note in task.notes:
        output.progress.warn(note)
    summary = summarize(task, task_count)
    if out:
        export_task(task, out, task_count)
    if output.json:
        output.print_json(dataclasses.asdict(summary))
        return
    output.line(str(summary))
    if out:
        output.line(f"wrote {out}; {task_command(task, out, summary.count)}")


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
@click.option("--kind", "kinds", multiple=True, help="Only tensors of this kind, such as attn_v. Can be repeated.")
@click.option(
    "--format",
    "form",
    type=Choice(["table", "csv", "json", "md"]),
    default="table",
    show_default=True,
    help="Form in which the figures are printed.",
)
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
