"""`bitladder doctor`: whether a model works, and what a run would do with it."""

import pathlib

import click

from bitladder.cli.from_options import options_from
from bitladder.cli.outputs import Command
from bitladder.cli.typed import FileOrName
from bitladder.convert import ConvertOptions
from bitladder.show import Output, common_options


@click.command(
    "doctor",
    cls=Command,
    page="convert.md",
    examples=("doctor allenai/OLMo-2-0425-1B", "doctor ./checkpoint --json"),
)
@click.argument("model", type=FileOrName())
@options_from(ConvertOptions)
@common_options
def command(*, output: Output, model: str, options: ConvertOptions) -> int:
    """Say what a run would do with MODEL, and whether it works, without doing it.

    MODEL is a checkpoint's directory, a Hugging Face hub id, or a GGUF. Only headers and small files are read. Time,
    memory and disk are those of the whole ladder with the built-in texts. The exit code is 1 if the model cannot work.
    """
    from bitladder.ladder import RunOptions, diagnose, estimate
    from bitladder.show import diagnosis_json, diagnosis_table

    output.tame_hub()
    diagnosis, cost = diagnose(model, options, progress=output.progress), None
    if diagnosis.works and diagnosis.shape is not None:
        cost = estimate(RunOptions(model, pathlib.Path("ladder"), conversion=options), shape=diagnosis.shape)
    if output.json:
        output.print_json(diagnosis_json(diagnosis, cost))
    else:
        output.print(diagnosis_table(diagnosis, cost))
    return 0 if diagnosis.works else 1
