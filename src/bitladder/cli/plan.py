"""`bitladder plan`: what to do to a model, from what it is measured to cost."""

import pathlib
from typing import TYPE_CHECKING, Any

import click

from bitladder.cli import options
from bitladder.cli.output import Output, common_options

if TYPE_CHECKING:
    from bitladder.sensitivity import BlockLoss

_FILE = click.Path(exists=True, dir_okay=False, path_type=pathlib.Path)


@click.command("plan")
@click.option("-m", "--model", required=True, type=_FILE, help="Full-precision GGUF.")
@click.option("--suggest-prune", is_flag=True, help="Measure the model without each of its blocks.")
@click.option("-f", "--file", "text", default="pydoc:test", show_default=True, help="Text to measure on.")
@options.n_ctx
@click.option("--chunks", default=4, show_default=True, type=click.IntRange(min=1), help="Chunks to measure on.")
@options.n_batch(512)
@options.n_ubatch
@options.threads
@options.gpu_layers
@common_options
def command(
    model: pathlib.Path,
    suggest_prune: bool,
    text: str,
    n_ctx: int,
    chunks: int,
    n_batch: int,
    n_ubatch: int,
    threads: int | None,
    gpu_layers: int,
    *,
    output: Output,
) -> None:
    """Say which blocks of a model cost least to leave out (--suggest-prune)."""
    if not suggest_prune:
        raise click.UsageError("say what to plan: --suggest-prune")
    # Imported here, so that --help does not wait for the native library.
    from bitladder.calibrate.texts import load_text
    from bitladder.evaluate import Settings, load_or_compute_base
    from bitladder.sensitivity import blocks_left_out

    loaded = load_text(text)
    settings = Settings(n_ctx, chunks, threads, gpu_layers, n_batch, n_ubatch)
    with load_or_compute_base(model, loaded, settings, progress=output.progress) as base:
        found = blocks_left_out(base, settings, chunks=chunks, progress=output.progress)
    ranked = sorted(found, key=lambda one: one.kld.value)
    if output.json:
        output.print_json([{"block": one.block, "kld": one.kld.model_dump(), "bytes": one.bytes} for one in ranked])
        return
    output.line(f"{model.name} without one block, {chunks} chunks of {loaded.name}; the least loss first")
    output.print(_table(ranked))
    output.line(
        f"least loss: bitladder quantize … --prune-layers {ranked[0].block} (losses of several blocks add up to more "
        "than their sum: prune one, and measure again)"
    )


def _table(ranked: "list[BlockLoss]") -> Any:
    from rich.table import Table

    made = Table("block", "KLD, nats", "size in MB")
    for column in made.columns:
        column.justify = "right"
    for one in ranked:
        made.add_row(str(one.block), f"{one.kld.value:.5f} ± {one.kld.error:.5f}", f"{one.bytes / 1e6:.2f}")
    return made
