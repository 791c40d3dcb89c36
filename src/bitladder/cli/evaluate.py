"""What measures: `eval`, `compare` and `bench`."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import click

from bitladder.cli.options import json_file, kept_results, options_from, warn_if_quantized, warn_unused
from bitladder.cli.outputs import Command, OutputPath
from bitladder.cli.typed import INPUT, TEXT, Choice, FileOrName
from bitladder.compare import CompareOptions, compare_quants
from bitladder.errors import UsageError
from bitladder.evaluate import (
    EvalOptions,
    MeasureOptions,
    Results,
    SpeedChoice,
    SpeedError,
    SpeedOptions,
    SpeedRow,
    bench,
    evaluate_files,
)
from bitladder.files import write_json, write_text
from bitladder.show import (
    FORMATS,
    Output,
    common_options,
    comparison_json,
    comparison_sections,
    eval_tables,
    render,
    speed_table,
)
from bitladder.text import load_texts


def _models(about: str) -> Callable[[Any], Any]:
    """The option for the files that are measured; `about` is its help."""
    return click.option("-m", "--model", "models", type=INPUT, multiple=True, required=True, help=about)


@click.command(
    "eval",
    cls=Command,
    page="evaluate.md",
    examples=(
        "eval -m model-Q4_K_M.gguf --base model-F16.gguf -f test.txt",
        "eval -m a.gguf -m b.gguf --tasks hellaswag,arc --task-count 400",
    ),
)
@_models("A GGUF file. Can be repeated.")
@options_from(EvalOptions)
@options_from(MeasureOptions, parameter="settings", leave_out=("n_ctx", "device"))
@kept_results
@json_file("scores")
@common_options
def eval_command(
    models: tuple[pathlib.Path, ...],
    out: pathlib.Path | None,
    results: Results,
    *,
    options: EvalOptions,
    settings: MeasureOptions,
    output: Output,
) -> None:
    """Measure perplexity, divergence from the full-precision model (--base) and benchmarks (--tasks).

    Several models are shown side by side, with the paired difference of each from the first.
    """
    if options.base is None:
        noise = {"noise_chunks"} if options.noise_chunks and options.logits is None else set()
        warn_unused(output, "without --base", {"base_file", *noise})
    if options.tasks is None:
        warn_unused(output, "without --tasks", {"task_count"})
    elif not (options.texts or options.base or options.logits):
        warn_unused(output, "without -f or --base", {"chunks"})
    warn_if_quantized(output, "--base", options.base)
    scores = evaluate_files(models, options, settings, results=results, progress=output.progress)
    values = [model_scores.to_json() for model_scores in scores]
    value = values[0] if len(values) == 1 else values
    if out:
        write_json(out, value)
    if output.json:
        output.print_json(value)
        return
    for title, table in eval_tables(scores):
        output.line(title)
        output.print(table)


@click.command(
    "compare",
    cls=Command,
    page="compare.md",
    examples=("compare mine-Q4_K_M.gguf OWNER/REPO:Q4_K_M --base model-F16.gguf -f test.txt",),
)
@click.argument("models", nargs=-1, required=True, type=FileOrName(), metavar="MODEL...")
@click.option(
    "--base", required=True, type=FileOrName(), metavar="MODEL", help="The full-precision GGUF, or a hub id of one."
)
@click.option(
    "-f",
    "--file",
    "texts",
    type=TEXT,
    default=("pydoc:test",),
    show_default=True,
    multiple=True,
    metavar="TEXT",
    help="Text to measure on: a file, or a built-in text (pydoc:test, pydoc:calibration). Can be repeated.",
)
@options_from(CompareOptions)
@options_from(MeasureOptions, parameter="settings", leave_out=("n_batch", "n_ubatch", "device"))
@kept_results
@json_file("comparison")
@common_options
def compare_command(
    models: tuple[str, ...],
    base: str,
    texts: tuple[str, ...],
    out: pathlib.Path | None,
    results: Results,
    *,
    options: CompareOptions,
    settings: MeasureOptions,
    output: Output,
) -> None:
    """Compare quants of one model: sizes, types, KLD and perplexity with paired ±, and the winner at equal size.

    MODEL is a GGUF file, or one of the hub: OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf. The table marks files that were
    made from another model or checkpoint than --base.
    """
    from bitladder.hub import fetch

    full = fetch(base, "--base")
    warn_if_quantized(output, "--base", full.path)
    loaded = load_texts(texts, full.path, assistant_only=options.assistant_only)
    files = [fetch(model) for model in models]
    compared = compare_quants(files, full.path, loaded, settings, options, results=results, progress=output.progress)
    if out:
        write_json(out, comparison_json(compared))
    if output.json:
        output.print_json(comparison_json(compared))
        return
    for title, content in comparison_sections(compared):
        output.line(title)
        if isinstance(content, list):
            for line in content:
                output.line(f"  {line}")
        else:
            output.print(content)


@click.command(
    "bench",
    cls=Command,
    page="bench.md",
    examples=("bench -m a.gguf -m b.gguf -p 512 -n 128 -r 5",),
)
@_models("A GGUF file. Several files take turns, one repetition each. Can be repeated.")
@options_from(SpeedChoice, parameter="choice")
@options_from(SpeedOptions)
@click.option(
    "-o",
    "--output",
    "out",
    type=OutputPath("speeds"),
    help="Also write the rows to this file. Its suffix sets the format: .md, .csv, .jsonl, otherwise JSON.",
)
@click.option(
    "--format",
    "form",
    type=Choice(["table", *FORMATS]),
    default="table",
    show_default=True,
    help="Form in which the rows are printed.",
)
@common_options
def bench_command(
    models: tuple[pathlib.Path, ...],
    out: pathlib.Path | None,
    form: str,
    *,
    choice: SpeedChoice,
    options: SpeedOptions,
    output: Output,
) -> None:
    """Measure prompt processing (pp) and text generation (tg) in tokens per second, as llama-bench does.

    -p, -n and -d take lists ("128,512") and ranges ("512-4096*2"), and can be repeated, as can -pg.
    """
    if out and out.name in FORMATS:
        raise UsageError(f"-o {out} names a file here; llama-bench's -o {out} is --format {out}")
    form = "json" if output.json else form
    try:
        rows = bench(models, choice.tests(), options, output.progress)
    except SpeedError as error:
        if error.rows:
            _show_speeds(output, error.rows, form, out)
        raise
    _show_speeds(output, rows, form, out)


def _show_speeds(output: Output, rows: Sequence[SpeedRow], form: str, out: pathlib.Path | None) -> None:
    if form == "table":
        output.print(speed_table(rows))
    else:
        output.line(render(rows, form).removesuffix("\n"))
    if out:
        suffix = out.suffix.removeprefix(".")
        write_text(out, render(rows, suffix if suffix in FORMATS else "json"))
