"""A checkpoint to a GGUF: `convert`, and before it `doctor`, which says whether the model works."""

import dataclasses
import pathlib

import click

from bitladder.cli.options import options_from
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
def convert_command(model: str, out: pathlib.Path | None, options: ConvertOptions, *, output: Output) -> None:
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


@click.command(
    "doctor",
    cls=Command,
    page="convert.md",
    examples=("doctor allenai/OLMo-2-0425-1B", "doctor ./checkpoint --json"),
)
@click.argument("model", type=FileOrName())
@options_from(ConvertOptions)
@common_options
def doctor_command(*, output: Output, model: str, options: ConvertOptions) -> int:
    """Say what a run would do with MODEL, and whether it works, without doing it.

    MODEL is a checkpoint's directory, a Hugging Face hub id, or a GGUF. Only headers and small files are read. Time,
    memory and disk are those of the whole ladder with the built-in texts. The exit code is 1 if the model cannot work.
    """
    from bitladder.ladder import RunOptions, diagnose, estimate
    from bitladder.show import diagnosis_json, diagnosis_table

    output.tame_hub()
    diagnosis, cost = diagnose(model, options, progress=output.progress), None
    if diagnosis.works and diagnosis.shape is not None:
        cost = estimate(RunOptions(model, pathlib.Path("ladder"), conversion=options), shape=diagnosis.shape)
    if output.json:
        output.print_json(diagnosis_json(diagnosis, cost))
    else:
        output.print(diagnosis_table(diagnosis, cost))
    return 0 if diagnosis.works else 1
