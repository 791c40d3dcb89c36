"""`bitladder estimate`: what a run takes, before it."""

import dataclasses
import pathlib

import click

from bitladder.cli.from_options import options_from
from bitladder.cli.options import hours_option, within_hours
from bitladder.cli.outputs import Command
from bitladder.cli.typed import FileOrName
from bitladder.ladder import RunOptions
from bitladder.show import Output, common_options


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
def command(*, output: Output, options: RunOptions, hours: float | None) -> None:
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
