"""A run: `run` makes a model a directory of measured quants, `estimate` says before what that takes."""

import dataclasses
import pathlib

import click

from bitladder.cli.options import hours_option, options_from, within_hours
from bitladder.cli.outputs import Command, check_folder, typed_command
from bitladder.cli.typed import FileOrName
from bitladder.ladder import RunOptions
from bitladder.show import Output, common_options


@click.command(
    "run",
    cls=Command,
    page="run.md",
    examples=(
        "run allenai/OLMo-2-0425-1B --out olmo2-ladder",
        "run model-F16.gguf --out ladder --ladder Q4_K_M,Q6_K --mode naive --rounding stock",
    ),
)
@click.argument("model", type=FileOrName())
@options_from(RunOptions, arguments=("model",))
@hours_option
@common_options
def run_command(*, output: Output, options: RunOptions, hours: float | None) -> None:
    """Make the whole ladder of MODEL: convert, measure, calibrate, quantize, score, and write the card.

    MODEL is a checkpoint's directory, a Hugging Face hub id, or a full-precision GGUF. Everything goes into the
    directory --out. The same command continues a run that was interrupted; what is complete is not made again.
    """
    from bitladder.ladder import run
    from bitladder.report import read_run, write_card, write_report
    from bitladder.rundir import Layout, RunLog
    from bitladder.show import RunDisplay, ladder_table, next_steps

    check_folder(options.out, Layout(options.out).written_by_runs(), but=("model",))
    output.tame_hub()
    options = within_hours(options, hours)
    if hours is not None:
        output.progress.info(f"--hours {hours:g}: effort {options.effort}")
    with RunLog(output.progress, Layout(options.out), typed_command()) as log:
        display = RunDisplay(output, log)
        with display.shown():
            result = run(options, progress=log, watch=display.watch)
    written = [write_card(options.out), write_report(options.out)]
    if not result.made:
        count = "1 rung" if len(result.rungs) == 1 else f"{len(result.rungs)} rungs"
        done = "card and report were written again; nothing else to do" if any(written) else "nothing to do"
        output.progress.info(f"{done}: {options.out} has the complete ladder ({count})")
    if output.json:
        output.print_json(result.scores)
    else:
        finished = read_run(options.out)
        output.print(ladder_table(finished))
        for line in next_steps(finished):
            output.remark(line)


@click.command(
    "estimate",
    cls=Command,
    page="cost.md",
    examples=(
        "estimate allenai/OLMo-2-0425-1B",
        "estimate model-F16.gguf --ladder Q4_K_M,Q6_K --mode naive --rounding stock -t 8",
    ),
)
@click.argument("model", type=FileOrName())
@options_from(RunOptions, arguments=("model",), leave_out=("replace_model", "keep"), out=pathlib.Path("ladder"))
@hours_option
@common_options
def estimate_command(*, output: Output, options: RunOptions, hours: float | None) -> None:
    """Show the time, memory and disk that each step of `bitladder run` would take for MODEL.

    Give the options of the run. Nothing is loaded: of MODEL only config.json and headers are read, and of a hub id
    nothing else is fetched. This machine is measured for some seconds.
    """
    from bitladder.ladder import estimate
    from bitladder.show import estimate_lines, estimate_table

    output.tame_hub()
    options = within_hours(options, hours)
    total = estimate(options)
    if output.json:
        sums = {name: getattr(total, name) for name in ("seconds", "core_seconds", "memory_bytes", "disk_bytes")}
        output.print_json(dataclasses.asdict(total) | sums)
        return
    output.print(estimate_table(total))
    for text in estimate_lines(total):
        output.line(text)
