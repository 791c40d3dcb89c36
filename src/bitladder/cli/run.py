"""`bitladder run`: a model to a directory of measured quants."""

import click

from bitladder.cli.from_options import options_from
from bitladder.cli.options import hours_option, within_hours
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
def command(*, output: Output, options: RunOptions, hours: float | None) -> None:
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
