"""`bitladder compare`: any GGUFs of one model side by side, whoever made them."""

import pathlib

import click

from bitladder.cli.from_options import options_from
from bitladder.cli.options import json_file, kept_results, warn_if_quantized
from bitladder.cli.outputs import Command
from bitladder.cli.typed import FileOrName
from bitladder.compare import CompareOptions, compare_quants
from bitladder.evaluate import MeasureOptions, Results
from bitladder.files import write_json
from bitladder.show import Output, common_options, comparison_json, comparison_sections
from bitladder.text import load_texts


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
    type=FileOrName(),
    default=("pydoc:test",),
    show_default=True,
    multiple=True,
    metavar="TEXT",
    help="Text to measure on: a file, or a built-in text (pydoc:test, pydoc:calibration). Can be repeated.",
)
@options_from(CompareOptions)
@options_from(MeasureOptions, parameter="settings", leave_out=("n_batch", "n_ubatch"))
@kept_results
@json_file("comparison")
@common_options
def command(
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
    output.tame_hub()
    # Imported here, after the bars of the hub were hidden.
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
