"""What comes before quantizing: importance matrices (`imatrix`), moments (`calibrate`), other scales (`smooth`)."""

import dataclasses
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
from bitladder.cli.options import names_of, options_from, warn_unused
from bitladder.cli.outputs import Command, OutputPath, check_output
from bitladder.cli.typed import INPUT, TEXT
from bitladder.engine import Decoding
from bitladder.errors import UsageError
from bitladder.refine import ModelFiles, SmoothingOptions
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


@click.command(
    "smooth",
    cls=Command,
    page="smooth.md",
    examples=("smooth -m model-F16.gguf --imatrix imatrix.gguf -f held-out.txt",),
)
@click.option("-m", "--model", required=True, type=INPUT, help="Full-precision GGUF: F32, F16, BF16.")
@click.option("--imatrix", required=True, type=INPUT, help="Importance matrix of that model.")
@click.option(
    "-o", "--output", "out", type=OutputPath("full model"), help="GGUF to write.  [default: MODEL-smooth.gguf]"
)
@click.option(
    "--imatrix-out",
    help="Importance matrix to write for the new file.  [default: NAME.imatrix.gguf in the folder of -o]",
)
@click.option(
    "--moments",
    multiple=True,
    type=INPUT,
    help="Second moments of the model. Those of the new file are written as NAME.MOMENTS. Can be repeated.",
)
@options_from(SmoothingOptions)
@click.option(
    "-f", "--file", "text", type=TEXT, help="Text for a trial, which shows the KLD of Q4_K_M before and after."
)
@options_from(Decoding, parameter="decoding", leave_out=("n_batch", "n_ubatch", "device"))
@common_options
def smooth_command(
    output: Output,
    model: pathlib.Path,
    imatrix: pathlib.Path,
    out: pathlib.Path | None,
    imatrix_out: pathlib.Path | None,
    moments: tuple[pathlib.Path, ...],
    options: SmoothingOptions,
    text: str | None,
    decoding: Decoding,
) -> None:
    """Rescale the channels of a model before it is quantized: the same model, less quantization loss.

    Powers of two move between norms, v, up and the weights that read them, and channels are reordered. The logits are
    compared before and after. Quantize the new file with the new importance matrix. LoRA adapters of the model do not
    fit the new file.
    """
    from bitladder.refine import smooth_model, try_smoothing

    if text is None:
        warn_unused(output, "without -f", {"trial_chunks", "n_ctx", "gpu_layers"})
    loaded = load_text(text, model) if text else None
    out = out or model.with_name(f"{model.stem}-smooth.gguf")
    imatrix_out = imatrix_out or out.with_name(f"{out.stem}.imatrix.gguf")
    source = ModelFiles(model, imatrix, moments)
    smoothed = ModelFiles(out, imatrix_out, tuple(out.with_name(f"{out.stem}.{path.name}") for path in moments))
    for path, kind in (
        (out, "full model"),
        (imatrix_out, "imatrix"),
        *((path, "moments") for path in smoothed.moments),
    ):
        check_output(path, kind)
    if len({path.name for path in moments}) < len(moments):
        raise UsageError("two of --moments have the same name, and so would their copies; rename one")
    result = smooth_model(source, smoothed, options, threads=decoding.threads, progress=output.progress)
    trial = None
    if loaded is not None:
        trial = try_smoothing(source, smoothed, loaded, decoding, options, progress=output.progress)
    if output.json:
        facts = {"path": out.name, "imatrix": imatrix_out.name, "links": result.links, "logits_moved": result.moved}
        facts |= {"head_noise": result.head_noise, "moments": [path.name for path in smoothed.moments]}
        output.print_json(facts | ({} if trial is None else {"trial": dataclasses.asdict(trial)}))
        return
    done = [f"{count} × {kind}" for kind, count in result.links.items()]
    if result.head_noise is not None:
        done.append(f"channels ordered (error of the head's rounded inputs × {result.head_noise:.2f})")
    output.line(
        f"{out}: {', '.join(done)}; logits moved by {result.moved:.1e} of their range. Its imatrix: {imatrix_out}"
    )
    for path in smoothed.moments:
        output.line(f"{path}: second moments of the new file")
    if trial is not None:
        output.line(
            f"{trial.preset} on {number_of(trial.tokens, 'token')}: KLD {trial.before:.5f} original, {trial.after:.5f} "
            f"smoothed (difference ± {trial.error:.5f})"
        )
