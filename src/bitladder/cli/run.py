"""`bitladder run`: a model to a directory of measured quants."""

import pathlib
from typing import Literal

import click

from bitladder.cli import options as shared
from bitladder.show.output import Output, common_options
from bitladder.show.run_display import RunDisplay
from bitladder.text.texts import BUILTIN


@click.command("run")
@click.argument("model")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(path_type=pathlib.Path),
    metavar="DIR",
    help="Directory for everything; a run that was cut short goes on there.",
)
@click.option(
    "--ladder", default="all", show_default=True, metavar="RUNGS", help="Presets separated by commas, or all (twelve)."
)
@click.option(
    "--calibration",
    multiple=True,
    default=(BUILTIN[0],),
    show_default=True,
    metavar="TEXT",
    help="Text for the importance matrix: a file, or a built-in text. Can be repeated.",
)
@click.option("--text", default=BUILTIN[1], show_default=True, metavar="TEXT", help="Text to measure with.")
@click.option("--chunks", type=click.IntRange(1), help="Measure on at most so many chunks of the text.  [default: all]")
@click.option(
    "--imatrix-chunks",
    type=click.IntRange(1),
    help="Use at most so many chunks of each calibration text.  [default: all]",
)
@shared.n_ctx
@click.option(
    "--mode",
    type=click.Choice(["quality", "size", "naive"]),
    default="quality",
    show_default=True,
    help="Types for the least KLD in the preset's bytes, for the fewest bytes at its KLD, or the preset's own.",
)
@click.option(
    "--rounding",
    type=click.Choice(["stock", "feedback", "descent", "best"]),
    default="best",
    show_default=True,
    help="How blocks are chosen: the library's kernels (stock), or for their layers' outputs.",
)
@click.option(
    "--moments-chunks",
    default=64,
    show_default=True,
    type=click.IntRange(1),
    help="Chunks of each calibration text for the second moments that rounding needs.",
)
@click.option(
    "--tune-chunks",
    default=64,
    show_default=True,
    type=click.IntRange(0),
    help="Chunks of each calibration text on which scales are tuned, if torch is installed; 0 not to. With --rounding "
    "stock they are not.",
)
@click.option(
    "--smooth/--no-smooth",
    default=None,
    help="Balance channels first: the model computes the same and blocks lose less.  [default: yes, but for --mode "
    "naive --rounding stock]",
)
@click.option("--tasks", help="Benchmarks to score with, as for eval: NAME:FILE,… or continuation:TEXT.")
@click.option("--task-count", type=click.IntRange(1), help="Questions of each task, drawn.  [default: all]")
@click.option(
    "--compare",
    multiple=True,
    metavar="MODEL",
    help="A GGUF of somebody else to measure beside the ladder: a file, OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf. Can "
    "be repeated.",
)
@click.option("--bench/--no-bench", default=True, show_default=True, help="Measure tokens per second.")
@click.option(
    "--outtype",
    type=click.Choice(["auto", "f16", "bf16", "f32"]),
    default="auto",
    show_default=True,
    help="Type of the full-precision file's matrices.",
)
@shared.threads
@shared.gpu_layers
@click.option(
    "--converter",
    type=click.Path(path_type=pathlib.Path),
    metavar="PATH",
    help="Let this script (llama.cpp's convert_hf_to_gguf.py) convert, for models bitladder does not know.",
)
@click.option("--quantized-by", metavar="NAME", help="Who made the quants, for the card.")
@click.option("--base-model", "model_id", metavar="ID", help="Hub id of MODEL, for the card of a local model.")
@click.option(
    "--calibration-dataset",
    "datasets",
    multiple=True,
    metavar="ID",
    help="Hub id of a data set that the calibration text is from, for the card. Can be repeated.",
)
@common_options
def command(
    *,
    output: Output,
    model: str,
    out: pathlib.Path,
    ladder: str,
    calibration: tuple[str, ...],
    text: str,
    chunks: int | None,
    imatrix_chunks: int | None,
    n_ctx: int,
    mode: Literal["quality", "size", "naive"],
    rounding: Literal["stock", "feedback", "descent", "best"],
    moments_chunks: int,
    tune_chunks: int,
    smooth: bool | None,
    tasks: str | None,
    task_count: int | None,
    compare: tuple[str, ...],
    bench: bool,
    outtype: str,
    threads: int | None,
    gpu_layers: int,
    converter: pathlib.Path | None,
    quantized_by: str | None,
    model_id: str | None,
    datasets: tuple[str, ...],
) -> None:
    """Make the whole ladder of MODEL: convert, measure, calibrate, quantize, score, and write the card.

    MODEL is a checkpoint's directory, a Hugging Face hub id, or a full-precision GGUF. Everything goes into the
    directory --out. The same command continues a run that was interrupted; what is complete is not made again.
    """
    # Imported here, so that --help does not wait for the native library.
    from bitladder.ladder import RunOptions, choose_rungs, run
    from bitladder.ladder.plan import smooths
    from bitladder.quantize import RUNGS, preset_names
    from bitladder.report import write_card, write_report

    options = RunOptions(
        model=model,
        out=out,
        rungs=choose_rungs(ladder, known=tuple(preset_names()), default=RUNGS),
        calibration=calibration,
        text=text,
        chunks=chunks,
        imatrix_chunks=imatrix_chunks,
        n_ctx=n_ctx,
        mode=mode,
        rounding=rounding,
        moments_chunks=moments_chunks,
        tune_chunks=tune_chunks,
        smooth=smooths(mode, rounding) if smooth is None else smooth,
        tasks=tasks,
        task_count=task_count,
        compare=compare,
        bench=bench,
        outtype=outtype,
        threads=threads,
        gpu_layers=gpu_layers,
        converter=converter,
        quantized_by=quantized_by,
        model_id=model_id,
        datasets=datasets,
    )
    output.tame_hub()
    display = RunDisplay(output, options.rungs)
    with display.shown():
        result = run(options, progress=output.progress, watch=display.watch)
    wrote = [write_card(out), write_report(out)]
    if not result.made:
        said = "card and report were written again; nothing else to do" if any(wrote) else "nothing to do"
        output.progress.info(f"{said}: {out} has the complete ladder ({len(options.rungs)} rungs)")
    if output.json:
        output.print_json(result.scores)
    else:
        others = result.labels[1 + len(options.rungs) :]
        _print_table(output, ["full", *options.rungs, *(f"{name} †" for name in others)], result.scores)


def _print_table(output: Output, labels: list[str], scores: list[dict[str, object]]) -> None:
    from rich.table import Column, Table

    from bitladder.show.ladder_tables import ladder_rows

    # 80 columns, the width of a pipe, are enough for the usual figures; what is wider wraps and is never cut off.
    heads = ("GB", "bpw", "PPL", "ρPPL", "KLD", "RMS Δp")
    columns = (Column(head, justify="right", overflow="fold") for head in heads)
    table = Table("quant", *columns, box=None, pad_edge=False, collapse_padding=True)
    for row in ladder_rows(scores, labels):
        table.add_row(row.label, row.size, row.bpw, row.ppl, row.rho, row.kld, row.rms)
    output.print(table)
