"""What quants are calibrated with: the importance matrix (`imatrix`) and second moments (`calibrate`) of texts."""

import pathlib

import click

from bitladder.calibrate import (
    ImatrixOptions,
    MomentsOptions,
    collect_imatrix,
    collect_moments,
    merge_imatrices,
    merge_moments,
)
from bitladder.cli import options as shared
from bitladder.cli.options import options_from
from bitladder.cli.outputs import Command, OutputPath
from bitladder.cli.unused import names_of, warn_unused
from bitladder.engine import Decoding
from bitladder.errors import UsageError
from bitladder.show import Output, common_options
from bitladder.text import Reading, Text, load_text
from bitladder.units import number_of


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
@options_from(Decoding, parameter="decoding", leave_out=("device",))
@options_from(ImatrixOptions)
@common_options
def imatrix_command(
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
        warn_unused(output, "without -f", {"model", "process_output", *names_of(Reading, Decoding, but=("n_ctx",))})
        n_ctx, form = decoding.n_ctx, options.form
        result = merge_imatrices(out, in_files, n_ctx=n_ctx, form=form, progress=output.progress)
    else:
        model, texts = _read(output, model, files)
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
    output.line(
        f"{out}: {number_of(result.entries, 'entry', 'entries')} from {number_of(result.chunks, 'chunk')} of "
        f"{decoding.n_ctx} tokens"
    )


@click.command(
    "calibrate",
    cls=Command,
    page="moments.md",
    examples=("calibrate -m model-F16.gguf -f calibration.txt -o moments.gguf --imatrix imatrix.gguf",),
)
@shared.calibrating("moments", "moments.gguf", "Moments")
@click.option("--imatrix", type=OutputPath("imatrix"), help="Write the importance matrix of the same chunks too.")
@options_from(MomentsOptions, leave_out=("form",))
@options_from(Reading, parameter="reading")
@options_from(Decoding, parameter="decoding", leave_out=("n_batch",))
@common_options
def calibrate_command(
    output: Output,
    model: pathlib.Path | None,
    files: tuple[str, ...],
    out: pathlib.Path,
    imatrix: pathlib.Path | None,
    options: MomentsOptions,
    reading: Reading,
    decoding: Decoding,
    in_files: tuple[pathlib.Path, ...],
) -> None:
    """Collect the calibration statistics that --rounding needs, or merge several files of them.

    The statistics are second moments: E[w xxᵀ] of the inputs x of every weight. The weight w of a token is the cost of
    an error there: an error at an attention sink reaches every later token. --imatrix also writes an importance matrix.
    The same command continues an interrupted run.
    """
    if not files:
        if imatrix:
            raise UsageError("--imatrix needs a text: pass -f")
        warn_unused(output, "without -f", {"model", *names_of(MomentsOptions, Reading, Decoding)})
        result = merge_moments(out, in_files, progress=output.progress)
    else:
        if imatrix is None:
            warn_unused(output, "without --imatrix", {"process_output"})
        model, texts = _read(output, model, files)
        result = collect_moments(
            model,
            texts,
            out,
            reading=reading,
            decoding=decoding,
            options=options,
            imatrix=imatrix,
            in_files=in_files,
            progress=output.progress,
        )
    if output.json:
        output.print_json(
            {
                "path": out.name,
                "weights": result.weights,
                "entries": result.entries,
                "chunks": result.chunks,
                "n_ctx": decoding.n_ctx,
                "passes": result.passes,
                "weighting": result.weighting,
                "imatrix": imatrix.name if imatrix else None,
                "gaps": result.gaps,
            }
        )
        return
    output.line(
        f"{out}: {number_of(result.entries, 'entry', 'entries')} for {number_of(result.weights, 'weight')} from "
        f"{number_of(result.chunks, 'chunk')}, tokens weighted by {result.weighting}"
    )


def _read(output: Output, model: pathlib.Path | None, files: tuple[str, ...]) -> tuple[pathlib.Path, list[Text]]:
    """The model and the texts to calibrate on. Raises UsageError without a model."""
    if model is None:
        raise UsageError("a text needs a model: pass -m")
    shared.warn_if_quantized(output, "-m", model)
    return model, [load_text(spec, model) for spec in files]
