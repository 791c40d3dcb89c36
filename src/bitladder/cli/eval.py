"""`bitladder eval`: perplexity of GGUF files, and their divergence from the full-precision model."""

import pathlib
from typing import TYPE_CHECKING, Any

import click

from bitladder.cli import options
from bitladder.cli.output import Output, common_options

if TYPE_CHECKING:
    from bitladder.evaluate import Figure, Scores

_FILE = click.Path(exists=True, dir_okay=False, path_type=pathlib.Path)
_OUT = click.Path(dir_okay=False, path_type=pathlib.Path)


@click.command("eval")
@click.option("-m", "--model", "models", type=_FILE, multiple=True, required=True, help="A GGUF file; may be repeated.")
@click.option("--base", type=_FILE, help="The full-precision GGUF to compare with; its predictions are kept.")
@click.option("--base-file", type=_OUT, help="Where the base's predictions are kept.  [default: beside the base]")
@click.option(
    "-f",
    "--file",
    "text",
    default="pydoc:test",
    show_default=True,
    help="Text to measure on: a file, or a built-in text (pydoc:test, pydoc:calibration).",
)
@options.n_ctx
@click.option("--chunks", type=click.IntRange(min=1), help="Chunks to measure on.  [default: the whole text]")
@options.n_batch(512)
@options.n_ubatch
@options.threads
@options.gpu_layers
@click.option("-o", "--output", "out", type=_OUT, help="Write the JSON to this file as well.")
@common_options
def command(
    models: tuple[pathlib.Path, ...],
    base: pathlib.Path | None,
    base_file: pathlib.Path | None,
    text: str,
    n_ctx: int,
    chunks: int | None,
    n_batch: int,
    n_ubatch: int,
    threads: int | None,
    gpu_layers: int,
    out: pathlib.Path | None,
    *,
    output: Output,
) -> None:
    """Measure perplexity and, with --base, the divergence from the full-precision model."""
    # Imported here, so that --help does not wait for the native library.
    from bitladder import evaluate as package
    from bitladder.calibrate.texts import load_text
    from bitladder.files import write_json

    loaded = load_text(text)
    settings = package.Settings(n_ctx, chunks, threads, gpu_layers, n_batch, n_ubatch)
    opened = package.open_or_compute(base, base_file, loaded, settings, output.progress) if base else None
    try:
        found = [package.measure(model, loaded, settings, base=opened, progress=output.progress)[0] for model in models]
    finally:
        if opened:
            opened.close()
    data = [scores.to_json() for scores in found]
    value = data[0] if len(data) == 1 else data
    if out:
        write_json(out, value)
    if output.json:
        output.print_json(value)
    else:
        output.print(table(found))


def table(found: "list[Scores]") -> Any:
    """A table with a column for each model; percentages where llama-perplexity prints them."""
    from rich.table import Table

    first = found[0]
    text = first.text.name if first.text else ""
    made = Table(
        title=f"{text}, {first.chunks} chunks of {first.n_ctx}, {first.tokens_scored} tokens scored",
        title_justify="left",
    )
    made.add_column("")
    for scores in found:
        made.add_column(scores.model, justify="right", overflow="fold")
    for label, cell in _ROWS:
        cells = [cell(scores) for scores in found]
        if any(cells):
            made.add_row(label, *cells)
    return made


def _pm(figure: "Figure | None", digits: int, scale: float = 1, unit: str = "") -> str:
    return f"{figure.value * scale:.{digits}f} ± {figure.error * scale:.{digits}f}{unit}" if figure else ""


def _percent(figure: "Figure | None") -> str:
    return _pm(figure, 3, 100, " %")


_ROWS: list[tuple[str, Any]] = [
    ("size", lambda s: f"{s.bytes / 1e6:,.1f} MB"),
    ("bits per weight", lambda s: f"{s.bpw:.3f}"),
    ("PPL", lambda s: _pm(s.ppl, 4)),
    ("PPL base", lambda s: _pm(s.ppl_base, 4)),
    ("ln PPL ratio", lambda s: _pm(s.ln_ppl_ratio, 5)),
    ("ρ PPL", lambda s: f"{100 * s.rho_ppl:.2f} %" if s.rho_ppl is not None else ""),
    ("KLD mean", lambda s: _pm(s.kld, 6)),
    *(
        (f"KLD {label}", lambda s, field=field: f"{getattr(s.kld, field):.6f}" if s.kld else "")
        for label, field in (("max", "max"), ("99.9 %", "p999"), ("99 %", "p99"), ("median", "median"))
    ),
    ("Δp RMS", lambda s: _percent(s.delta_p.rms if s.delta_p else None)),
    ("same top p", lambda s: _percent(s.same_top_p)),
]
