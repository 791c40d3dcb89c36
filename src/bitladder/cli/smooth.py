"""bitladder smooth."""

import dataclasses
import pathlib

import click

from bitladder.cli.from_options import options_from
from bitladder.cli.outputs import Command, OutputPath, check_output
from bitladder.engine.decoding import Decoding
from bitladder.errors import UsageError
from bitladder.refine import ModelFiles, SmoothingOptions, smooth_model, try_smoothing
from bitladder.show.output import Output, common_options
from bitladder.text.texts import load_text

_PATH = click.Path(path_type=pathlib.Path)


@click.command("smooth", cls=Command)
@click.option("-m", "--model", required=True, type=_PATH, help="Full-precision GGUF: F32, F16, BF16.")
@click.option(
    "--imatrix", required=True, type=_PATH, help="Importance matrix of that model: how large its channels are."
)
@click.option(
    "-o", "--output", "out", type=OutputPath("full model"), help="GGUF to write.  [default: MODEL-smooth.gguf]"
)
@click.option(
    "--imatrix-out",
    type=OutputPath("imatrix"),
    help="Importance matrix of the new file, which it needs instead.  [default: beside -o, as NAME.imatrix.gguf]",
)
@click.option(
    "--moments",
    multiple=True,
    type=_PATH,
    help="Second moments of the model: those of the new file are written beside -o, as NAME.MOMENTS. Can be repeated.",
)
@options_from(SmoothingOptions)
@click.option("-f", "--file", "text", help="Text to try it on: the KLD of a Q4_K_M before and after is printed.")
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
    """Balance a model's channels before it is quantized: it computes the same, and blocks of it lose less.

    Scales move between norms, v, up and the weights behind them, by powers of two, and channels change places. The
    logits are compared before and after. Quantize the new file with the new importance matrix. Adapters (LoRA) of the
    model do not fit the new one.
    """
    loaded = load_text(text) if text else None
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
        output.line(f"{path}: its second moments")
    if trial is not None:
        output.line(
            f"{trial.preset} on {trial.tokens} tokens: KLD {trial.before:.5f} as it is, {trial.after:.5f} smoothed "
            f"(difference ± {trial.error:.5f})"
        )
