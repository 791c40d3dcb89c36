"""`bitladder convert`: a Hugging Face checkpoint to a GGUF file."""

import dataclasses
import pathlib

import click

from bitladder.cli.from_options import options_from
from bitladder.cli.outputs import Command, OutputPath, check_output
from bitladder.cli.typed import FileOrName
from bitladder.convert import ConvertOptions
from bitladder.show import Output, common_options


@click.command(
    "convert",
    cls=Command,
    page="convert.md",
    examples=(
        "convert allenai/OLMo-2-0425-1B",
        "convert ./checkpoint -o model-BF16.gguf --outtype bf16",
    ),
)
@click.argument("model", type=FileOrName())
@click.option(
    "-o",
    "--output",
    "out",
    type=OutputPath("full model"),
    help="The GGUF file to write.  [default: named after the model, in the current directory]",
)
@options_from(ConvertOptions)
@common_options
def command(model: str, out: pathlib.Path | None, options: ConvertOptions, *, output: Output) -> None:
    """Convert MODEL, a checkpoint's directory or a Hugging Face hub id, to GGUF."""
    from bitladder import convert as package

    target = out or pathlib.Path(package.default_name(model, options.outtype))
    check_output(target, "full model")
    result = package.convert(
        model,
        target,
        outtype=options.outtype,
        upstream=options.upstream,
        converter=options.converter,
        trust_remote_code=options.trust_remote_code,
        projector=target.with_name(f"mmproj-{target.name}") if options.mmproj else None,
        progress=output.progress,
    )
    if output.json:
        output.print_json(
            dataclasses.asdict(result)
            | {"path": str(result.path), "projector": result.projector and str(result.projector)}
        )
    else:
        output.line(
            f"{result.path}: {result.architecture}, {result.outtype}, {result.tensors} tensors, {result.bytes:,} bytes"
        )
        if result.projector is not None:
            output.line(f"{result.projector}: projector, {result.projector.stat().st_size:,} bytes")
