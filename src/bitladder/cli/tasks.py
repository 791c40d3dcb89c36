"""`bitladder tasks`: what a benchmark's source holds, and writing it for llama-perplexity."""

import dataclasses
import pathlib

import click

from bitladder.cli.outputs import Command, OutputPath
from bitladder.errors import UsageError
from bitladder.show.output import Output, common_options


@click.command("tasks", cls=Command)
@click.argument("spec", metavar="NAME[:SOURCE]")
@click.option(
    "-o",
    "--output",
    "out",
    type=OutputPath("questions"),
    help="Write the questions to this file, in llama-perplexity's format.",
)
@click.option(
    "--task-count",
    type=click.IntRange(min=1),
    help="Questions to draw, as `eval` draws them.  [default: all]",
)
@common_options
def command(spec: str, out: pathlib.Path | None, task_count: int | None, *, output: Output) -> None:
    """Read the benchmark NAME from SOURCE (a file, a folder, or by default the hub's data set), and show what it holds.

    NAME is arc, hellaswag, mmlu, truthfulqa, winogrande, or continuation with a text as SOURCE.
    """
    # Imported here, so that --help does not wait for the native library.
    from bitladder.evaluate import tasks

    specs = tasks.parse_specs(spec)
    if len(specs) != 1:
        raise UsageError("name one task at a time")
    task = tasks.load_task(specs[0])
    for note in task.notes:
        output.progress.warn(note)
    summary = tasks.summarize(task, task_count)
    if out:
        tasks.export_task(task, out, task_count)
    if output.json:
        output.print_json(dataclasses.asdict(summary))
        return
    output.line(str(summary))
    if out:
        output.line(f"wrote {out}; {tasks.command_line(task, out, summary.count)}")
