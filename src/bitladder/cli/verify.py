"""bitladder verify."""

import collections
import pathlib

import click

from bitladder.cli import options
from bitladder.cli.outputs import Command
from bitladder.errors import BitladderError
from bitladder.show import Output, common_options

_FILE = click.Path(exists=True, dir_okay=False, path_type=pathlib.Path)


@click.command(
    "verify",
    cls=Command,
    page="quantize.md",
    examples=("verify model-Q4_K_M.gguf -m model-F16.gguf --imatrix imatrix.gguf",),
)
@click.argument("quant", type=_FILE)
@click.option(
    "-m", "--model", "source", required=True, type=_FILE, help="The full-precision GGUF that QUANT was made from."
)
@click.option("--imatrix", type=_FILE, help="The importance matrix that QUANT was made with.")
@click.option(
    "--moments",
    type=_FILE,
    multiple=True,
    help="The second moments that QUANT was made with, if it was made with --rounding.",
)
@options.threads
@common_options
def command(
    output: Output,
    quant: pathlib.Path,
    source: pathlib.Path,
    imatrix: pathlib.Path | None,
    moments: tuple[pathlib.Path, ...],
    threads: int | None,
) -> None:
    """Make every tensor of QUANT again, and compare the bytes. The exit code is 1 if a tensor differs."""
    from bitladder.refine import verify

    options.warn_if_quantized(output, "-m", source)
    verified = verify(quant, source, imatrix=imatrix, moments=moments, threads=threads, progress=output.progress)
    if output.json:
        output.print_json({"quant": quant.name, "tensors": verified.origins, "differing": verified.differing})
    else:
        counts = collections.Counter(verified.origins.values()).most_common()
        output.line(f"{quant}: {', '.join(f'{count} tensors {way}' for way, count in counts)}")
    if verified.differing:
        some = ", ".join(verified.differing[:4]) + (", …" if len(verified.differing) > 4 else "")
        raise BitladderError(
            f"{len(verified.differing)} tensors of {quant} cannot be made from {source} and these files ({some}); "
            "another imatrix, other options or another version of the library made them"
        )
