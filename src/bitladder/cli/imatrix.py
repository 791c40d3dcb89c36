"""bitladder imatrix."""

import pathlib

import click

from bitladder.cli import options
from bitladder.errors import UsageError
from bitladder.show.output import Output, common_options


@click.command("imatrix")
@options.calibrating
@click.option(
    "-o", "--output", "out", default="imatrix.gguf", show_default=True, type=click.Path(path_type=pathlib.Path)
)
@options.n_ctx
@options.n_batch(2048)
@options.n_ubatch
@click.option(
    "--in-file",
    "in_files",
    multiple=True,
    type=click.Path(path_type=pathlib.Path),
    help="Matrix to add; may be repeated.",
)
@click.option("--output-format", "form", type=click.Choice(["gguf", "dat"]), default="gguf", show_default=True)
@options.threads
@options.gpu_layers
@common_options
def command(
    output: Output,
    model: pathlib.Path | None,
    files: tuple[str, ...],
    out: pathlib.Path,
    n_ctx: int,
    n_batch: int,
    n_ubatch: int,
    chunks: int | None,
    from_chunk: int,
    process_output: bool,
    parse_special: bool,
    in_files: tuple[pathlib.Path, ...],
    form: str,
    threads: int | None,
    gpu_layers: int,
) -> None:
    """Compute an importance matrix from calibration texts, or merge several.

    Files are interchangeable with llama-imatrix. An interrupted run goes on where it was.
    """
    # Imported here, so that --help does not wait for the native library.
    from bitladder.calibrate import collect_imatrix
    from bitladder.text.texts import load_text

    if files and model is None:
        raise UsageError("a text needs a model: pass -m")
    if n_batch > n_ctx and n_batch % n_ctx:
        raise UsageError(f"-b {n_batch} must be smaller than -c {n_ctx} or a multiple of it")
    result = collect_imatrix(
        model or pathlib.Path(),
        [load_text(spec) for spec in files],
        out,
        n_ctx=n_ctx,
        chunks=chunks,
        from_chunk=from_chunk,
        parse_special=parse_special,
        process_output=process_output,
        in_files=in_files,
        form=form,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        threads=threads,
        gpu_layers=gpu_layers,
        progress=output.progress,
    )
    if output.json:
        output.print_json({"path": out.name, "entries": result.entries, "chunks": result.chunks, "gaps": result.gaps})
        return
    output.line(f"{out}: {result.entries} entries from {result.chunks} chunks of {n_ctx} tokens")
