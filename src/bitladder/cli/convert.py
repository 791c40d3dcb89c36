"""`bitladder convert`: a Hugging Face checkpoint to a GGUF file."""

import dataclasses
import pathlib

import click

from bitladder.cli.outputs import Command, OutputPath, check_output
from bitladder.show.output import Output, common_options


@click.command("convert", cls=Command)
@click.argument("model")
@click.option(
    "-o",
    "--output",
    "out",
    type=OutputPath("full model"),
    help="The GGUF file to write.  [default: named after the model, in the current directory]",
)
@click.option(
    "--outtype",
    type=click.Choice(["auto", "f16", "bf16", "f32"]),
    default="auto",
    show_default=True,
    help="Type of the matrices (vectors stay F32); auto is bf16 for a bfloat16 checkpoint, otherwise f16.",
)
@click.option(
    "--converter",
    type=click.Path(path_type=pathlib.Path),
    metavar="PATH",
    help="Let this script (llama.cpp's convert_hf_to_gguf.py) convert, for models bitladder does not know.",
)
@common_options
def command(
    model: str, out: pathlib.Path | None, outtype: str, converter: pathlib.Path | None, *, output: Output
) -> None:
    """Convert MODEL, a checkpoint's directory or a Hugging Face hub id, to GGUF."""
    # Imported here, so that --help does not wait for gguf and numpy.
    from bitladder import convert as package

    target = out or pathlib.Path(package.default_name(model, outtype))
    check_output(target, "full model")
    result = package.convert(model, target, outtype=outtype, converter=converter, progress=output.progress)
    if output.json:
        output.print_json(dataclasses.asdict(result) | {"path": str(result.path)})
    else:
        output.line(
            f"{result.path}: {result.architecture}, {result.outtype}, {result.tensors} tensors, {result.bytes:,} bytes"
        )
