"""bitladder imatrix."""

import pathlib

import click

from bitladder.calibrate import ImatrixOptions, collect_imatrix, merge_imatrices
from bitladder.cli import options as shared
from bitladder.cli.from_options import options_from
from bitladder.cli.outputs import Command
from bitladder.engine import Decoding
from bitladder.errors import UsageError
from bitladder.show import Output, common_options
from bitladder.text import Reading, load_text


@click.command(
    "imatrix",
    cls=Command,
    page="imatrix.md",
    examples=(
        "imatrix -m model-F16.gguf -f calibration.txt -o imatrix.gguf",
        "imatrix --in-file a.gguf --in-file b.gguf -o both.gguf",
    ),
)
@shared.calibrating("imatrix", "imatrix.gguf", "Matrix")
@options_from(Reading, parameter="reading", spread=False)
@options_from(Decoding, parameter="decoding")
@options_from(ImatrixOptions)
@common_options
def command(
    output: Output,
    model: pathlib.Path | None,
    files: tuple[str, ...],
    out: pathlib.Path,
    reading: Reading,
    decoding: Decoding,
    options: ImatrixOptions,
    in_files: tuple[pathlib.Path, ...],
) -> None:
    """Compute an importance matrix from calibration texts, or merge several.

    Files are interchangeable with llama-imatrix. The same command continues an interrupted run.
    """
    if not files:
        n_ctx, form = decoding.n_ctx, options.form
        result = merge_imatrices(out, in_files, n_ctx=n_ctx, form=form, progress=output.progress)
    elif model is None:
        raise UsageError("a text needs a model: pass -m")
    else:
        shared.warn_if_quantized(output, "-m", model)
        texts = [load_text(spec, model) for spec in files]
        result = collect_imatrix(
            model,
            texts,
            out,
            reading=reading,
            decoding=decoding,
            options=options,
            in_files=in_files,
            progress=output.progress,
        )
    if output.json:
        output.print_json({"path": out.name, "entries": result.entries, "chunks": result.chunks, "gaps": result.gaps})
        return
    output.line(f"{out}: {result.entries} entries from {result.chunks} chunks of {decoding.n_ctx} tokens")
