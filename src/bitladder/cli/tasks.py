"""`bitladder tasks`: what a benchmark's source holds, and writing it for llama-perplexity."""

import dataclasses
import pathlib

import click

from bitladder.cli.outputs import Command, OutputPath
from bitladder.cli.typed import Whole
from bitladder.errors import UsageError
from bitladder.show import Output, common_options


@click.command(
    "tasks",
    cls=Command,
    page="tasks.md",
    examples=(
        "tasks",
        "tasks hellaswag:hellaswag_val.txt --task-count 400 -o drawn.txt",
    ),
)
@click.argument("spec", metavar="[NAME[:SOURCE]]", required=False)
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
def command(spec: str | None, out: pathlib.Path | None, task_count: int | None, *, output: Output) -> None:
    """Read the benchmark NAME from SOURCE (a file, a folder, or by default the hub's data set), and show what it holds.

    Without NAME all benchmarks are listed.
    """
    from bitladder.evaluate import export_task, load_task, parse_specs, summarize, task_command, task_meanings

    if spec is None:
        if output.json:
            output.print_json(task_meanings())
        else:
            for name, meaning in task_meanings().items():
                output.line(f"{name}: {meaning}")
        return
    specs = parse_specs(spec)
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
