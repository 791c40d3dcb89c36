"""`bitladder bench`: tokens per second of GGUF files."""

import pathlib
from collections.abc import Sequence

import click

from bitladder.cli.from_options import options_from
from bitladder.cli.outputs import Command, OutputPath
from bitladder.cli.typed import INPUT, Choice
from bitladder.errors import UsageError
from bitladder.evaluate import SpeedChoice, SpeedError, SpeedOptions, SpeedRow, bench
from bitladder.files import write_text
from bitladder.show import FORMATS, Output, common_options, render, speed_table


@click.command(
    "bench",
    cls=Command,
    page="bench.md",
    examples=("bench -m a.gguf -m b.gguf -p 512 -n 128 -r 5",),
)
@click.option(
    "-m",
    "--model",
    "models",
    type=INPUT,
    multiple=True,
    required=True,
    help="A GGUF file. Several files take turns, one repetition each.",
)
@options_from(SpeedChoice, parameter="choice")
@options_from(SpeedOptions)
@click.option(
    "-o",
    "--output",
    "out",
    type=OutputPath("speeds"),
    help="Also write the rows to this file. Its suffix sets the format: .md, .csv, .jsonl, otherwise JSON.",
)
@click.option("--format", "form", type=Choice(["table", *FORMATS]), default="table", show_default=True)
@common_options
def command(
    models: tuple[pathlib.Path, ...],
    out: pathlib.Path | None,
    form: str,
    *,
    choice: SpeedChoice,
    options: SpeedOptions,
    output: Output,
) -> None:
    """Measure prompt processing (pp) and text generation (tg) in tokens per second, as llama-bench does.

    -p, -n and -d take lists ("128,512") and ranges ("512-4096*2"), and may be repeated, as may -pg.
    """
    if out and out.name in FORMATS:
        raise UsageError(f"-o {out} names a file here; llama-bench's -o {out} is --format {out}")
    form = "json" if output.json else form
    try:
        rows = bench(models, choice.tests(), options, output.progress)
    except SpeedError as error:
        if error.rows:
            _show(output, error.rows, form, out)
        raise
    _show(output, rows, form, out)


def _show(output: Output, rows: Sequence[SpeedRow], form: str, out: pathlib.Path | None) -> None:
    if form == "table":
        output.print(speed_table(rows))
    else:
        output.line(render(rows, form).removesuffix("\n"))
    if out:
        suffix = out.suffix.removeprefix(".")
        write_text(out, render(rows, suffix if suffix in FORMATS else "json"))
