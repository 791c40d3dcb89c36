"""bitladder quantize."""

import dataclasses
import pathlib

import click

from bitladder.cli import options
from bitladder.cli.output import Output, common_options


@click.command("quantize")
@click.argument("preset")
@click.option(
    "-m", "--model", "source", required=True, type=click.Path(path_type=pathlib.Path), help="F16, BF16 or F32 GGUF."
)
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=pathlib.Path), help="File to write.")
@click.option("--imatrix", type=click.Path(path_type=pathlib.Path), help="Importance matrix of the same model.")
@options.threads
@common_options
def command(
    output: Output,
    preset: str,
    source: pathlib.Path,
    out: pathlib.Path,
    imatrix: pathlib.Path | None,
    threads: int | None,
) -> None:
    """Quantize a full-precision GGUF to PRESET (Q4_K_M, IQ3_S, …).

    Types are the library's own choice for the preset; with the same imatrix and library every tensor's bytes equal
    llama-quantize's.
    """
    # Imported here, so that --help does not wait for the native library.
    from bitladder.files import sha256_file
    from bitladder.quantize import quantize

    result = quantize(source, out, preset, imatrix=imatrix, threads=threads, progress=output.progress)
    if output.json:
        output.print_json(dataclasses.asdict(result) | {"path": result.path.name, "sha256": sha256_file(result.path)})
        return
    used: dict[str, int] = {}
    for kind in result.types.values():
        used[kind] = used.get(kind, 0) + 1
    kinds = ", ".join(f"{count} × {kind}" for kind, count in sorted(used.items(), key=lambda item: -item[1]))
    output.line(f"{result.path}: {result.bytes} bytes, {result.bpw:.4f} bpw ({kinds})")
