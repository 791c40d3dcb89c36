"""bitladder smooth."""

import dataclasses
import pathlib

import click

from bitladder.cli.from_options import options_from
from bitladder.cli.outputs import Command, OutputPath, check_output
from bitladder.cli.typed import INPUT, FileOrName
from bitladder.engine import Decoding
from bitladder.errors import UsageError
from bitladder.refine import ModelFiles, SmoothingOptions
from bitladder.show import Output, common_options
from bitladder.text import load_text


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
    "-f", "--file", "text", type=FileOrName(), help="Text for a trial: prints the KLD of Q4_K_M before and after."
)
@options_from(Decoding, parameter="decoding", leave_out=("n_batch", "n_ubatch"))
@common_options
def command(
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
            f"{trial.preset} on {trial.tokens} tokens: KLD {trial.before:.5f} original, {trial.after:.5f} smoothed "
            f"(difference ± {trial.error:.5f})"
        )
