"""What makes a quant better at the same size: `smooth` before it is made, `tune` afterwards."""

import dataclasses
import pathlib

import click

from bitladder.cli import options as shared
from bitladder.cli.options import options_from
from bitladder.cli.outputs import Command, OutputPath, check_output
from bitladder.cli.typed import INPUT, TEXT
from bitladder.cli.unused import warn_unused
from bitladder.engine import Decoding
from bitladder.errors import UsageError
from bitladder.files import sha256_file
from bitladder.refine import ModelFiles, SmoothingOptions, TuneOptions
from bitladder.show import Output, common_options
from bitladder.text import load_text
from bitladder.units import number_of


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


@click.command(
    "tune",
    cls=Command,
    page="tune.md",
    examples=("tune model-Q4_K_M.gguf -m model-F16.gguf -o tuned.gguf -f calibration.txt",),
)
@click.argument("quant", type=INPUT)
@click.option("-m", "--model", required=True, type=INPUT, help="The full-precision GGUF that QUANT was made from.")
@click.option("-o", "--output", "out", required=True, type=OutputPath("quant"), help="GGUF to write.")
@click.option(
    "-f", "--file", "files", multiple=True, required=True, type=TEXT, help="Calibration text. Can be repeated."
)
@options_from(TuneOptions, tune_chunks=64)
@shared.guard("KLD must fall")
@options_from(Decoding, parameter="decoding", leave_out=("n_batch", "n_ubatch"))
@common_options
def tune_command(
    output: Output,
    quant: pathlib.Path,
    model: pathlib.Path,
    out: pathlib.Path,
    files: tuple[str, ...],
    options: TuneOptions,
    guard: str,
    decoding: Decoding,
) -> None:
    """Tune the scales of QUANT for the predictions of the whole model: same types and size, lower KLD.

    The F16 numbers of blocks move along the gradient of the KLD from the full-precision model. The integers do not
    change. Needs torch (pip install 'bitladder[torch]').
    """
    from bitladder.refine import tune

    if guard == "none":
        warn_unused(output, "with --guard none", {"tune_guard_chunks", "gpu_layers"})
    texts = [load_text(spec, model) for spec in files]
    held_out = None if guard == "none" else load_text(guard, model)
    if held_out is not None and held_out.sha256 in {text.sha256 for text in texts}:
        raise UsageError(f"--guard {guard} is also a calibration text; name another text")
    shared.warn_if_quantized(output, "-m", model)
    tuned = tune(model, quant, out, texts, held_out, options, decoding, output.progress)
    if output.json:
        facts = dataclasses.asdict(tuned) | {"path": out.name, "sha256": sha256_file(out)}
        facts |= {
            key: figure.model_dump() for key in ("before", "after", "difference") if (figure := getattr(tuned, key))
        }
        output.print_json(facts)
        return
    output.line(f"{out}: {number_of(tuned.steps, 'step')} of {tuned.n_ctx} tokens")
    if tuned.before and tuned.after and tuned.difference:
        before, after, gap = tuned.before, tuned.after, tuned.difference
        output.line(
            f"held-out text: KLD {before.value:.5f} ± {before.error:.5f} before, {after.value:.5f} ± {after.error:.5f} "
            f"tuned (difference {gap.value:+z.5f} ± {gap.error:.5f}, paired)"
        )
    else:
        output.line("not checked on held-out text (--guard none)")
    if not tuned.kept:
        output.line("no gain: the file is a copy of QUANT")
