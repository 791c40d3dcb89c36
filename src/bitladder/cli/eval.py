"""`bitladder eval`: perplexity, divergence from the full-precision model, and benchmarks of GGUF files."""

import pathlib

import click

from bitladder.cli.from_options import options_from
from bitladder.cli.options import json_file, kept_results, warn_if_quantized
from bitladder.cli.outputs import Command
from bitladder.cli.typed import INPUT
from bitladder.evaluate import EvalOptions, MeasureOptions, Results, evaluate_files
from bitladder.files import write_json
from bitladder.show import Output, common_options, eval_tables


@click.command(
    "eval",
    cls=Command,
    page="evaluate.md",
    examples=(
        "eval -m model-Q4_K_M.gguf --base model-F16.gguf -f test.txt",
        "eval -m a.gguf -m b.gguf --tasks hellaswag,arc --task-count 400",
    ),
)
@click.option(
    "-m",
    "--model",
    "models",
    type=INPUT,
    multiple=True,
    required=True,
    help="A GGUF file; may be repeated.",
)
@options_from(EvalOptions)
@options_from(MeasureOptions, parameter="settings", leave_out=("n_ctx",))
@kept_results
@json_file("scores")
@common_options
def command(
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
