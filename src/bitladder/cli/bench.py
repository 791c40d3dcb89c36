"""`bitladder bench`: tokens per second of GGUF files."""

import pathlib
from typing import TYPE_CHECKING, Any

import click

from bitladder.cli import options
from bitladder.errors import UsageError
from bitladder.show.output import Output, common_options

if TYPE_CHECKING:
    from bitladder.evaluate.speed_rows import SpeedRow

_FORMATS = ("md", "json", "jsonl", "csv")


@click.command("bench")
@click.option(
    "-m",
    "--model",
    "models",
    type=click.Path(path_type=pathlib.Path),
    multiple=True,
    required=True,
    help="A GGUF file; several take turns, repetition by repetition.",
)
@click.option(
    "-p", "--n-prompt", "prompts", multiple=True, default=("512",), show_default=True, help="Prompt tokens; 0: no test."
)
@click.option(
    "-n", "--n-gen", "gens", multiple=True, default=("128",), show_default=True, help="Generated tokens; 0: no test."
)
@click.option("-pg", "pairs", multiple=True, metavar="PP,TG", help="Prompt, then generated tokens, timed as one.")
@click.option(
    "-d", "--n-depth", "depths", multiple=True, default=("0",), show_default=True, help="Tokens before, not timed."
)
@click.option(
    "-r", "--repetitions", default=5, show_default=True, type=click.IntRange(1), help="Times each test is measured."
)
@options.threads
@click.option(
    "-ngl", "--n-gpu-layers", "gpu_layers", default=-1, show_default=True, help="Layers on the GPU; -1: all of them."
)
@options.n_batch(2048)
@options.n_ubatch
@click.option(
    "-fa",
    "--flash-attn",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Flash attention.",
)
@click.option("--no-warmup", is_flag=True, help="Do not run each test once before it is measured.")
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(dir_okay=False, path_type=pathlib.Path),
    help="Write the rows to this file as well, as its suffix says: .md, .csv, .jsonl, otherwise JSON.",
)
@click.option("--format", "form", type=click.Choice(["table", *_FORMATS]), default="table", show_default=True)
@common_options
def command(
    *,
    output: Output,
    models: tuple[pathlib.Path, ...],
    prompts: tuple[str, ...],
    gens: tuple[str, ...],
    pairs: tuple[str, ...],
    depths: tuple[str, ...],
    repetitions: int,
    threads: int | None,
    gpu_layers: int,
    n_batch: int,
    n_ubatch: int,
    flash_attn: str,
    no_warmup: bool,
    out: pathlib.Path | None,
    form: str,
) -> None:
    """Measure prompt processing (pp) and text generation (tg) in tokens per second, as llama-bench does.

    -p, -n and -d take lists ("128,512") and ranges ("512-4096*2"), and may be repeated, as may -pg.
    """
    # Imported here, so that --help does not wait for the native library.
    from bitladder.evaluate.speed import SpeedError, bench
    from bitladder.evaluate.speed_rows import SpeedSettings
    from bitladder.evaluate.speed_tests import choose_tests

    if out and out.name in _FORMATS:
        raise UsageError(f"-o {out} names a file here; llama-bench's -o {out} is --format {out}")
    tests = choose_tests(prompts, gens, pairs, depths)
    settings = SpeedSettings(threads, gpu_layers, n_batch, n_ubatch, flash_attn, not no_warmup)
    try:
        rows = bench(models, tests, repetitions, settings, output.progress)
    except SpeedError as error:
        if error.rows:
            _show(output, error.rows, "json" if output.json else form, out)
        raise
    _show(output, rows, "json" if output.json else form, out)


def _show(output: Output, rows: "list[SpeedRow]", form: str, out: pathlib.Path | None) -> None:
    from bitladder.files import write_text
    from bitladder.show.speed_tables import render

    if form != "table":
        output.line(render(rows, form).removesuffix("\n"))
    else:
        output.print(_table(rows))
    if out:
        suffix = out.suffix.removeprefix(".")
        write_text(out, render(rows, suffix if suffix in _FORMATS else "json"))


def _table(rows: "list[SpeedRow]") -> Any:
    from rich.table import Column, Table

    from bitladder.show.speed_tables import columns

    heads, cells = columns(rows)
    left = {"model", "file", "backend"}
    table = Table(*(Column(head, justify="left" if head in left else "right", overflow="fold") for head in heads))
    for line in cells:
        table.add_row(*line)
    return table
