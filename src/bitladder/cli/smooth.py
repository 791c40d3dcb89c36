"""bitladder smooth."""

import dataclasses
import pathlib

import click

from bitladder.cli import options
from bitladder.show.output import Output, common_options


@click.command("smooth")
@click.option(
    "-m", "--model", required=True, type=click.Path(path_type=pathlib.Path), help="Full-precision GGUF: F32, F16, BF16."
)
@click.option(
    "--imatrix",
    required=True,
    type=click.Path(path_type=pathlib.Path),
    help="Importance matrix of that model: how large its channels are.",
)
@click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=pathlib.Path),
    help="GGUF to write.  [default: MODEL-smooth.gguf]",
)
@click.option(
    "--imatrix-out",
    type=click.Path(path_type=pathlib.Path),
    help="Importance matrix of the new file, which it needs instead.  [default: beside -o, as NAME.imatrix.gguf]",
)
@click.option(
    "--moments",
    multiple=True,
    type=click.Path(path_type=pathlib.Path),
    help="Second moments of the model: those of the new file are written beside -o, as NAME.MOMENTS. Can be repeated.",
)
@click.option("--scales/--no-scales", default=True, show_default=True, help="Balance channels.")
@click.option(
    "--order/--no-order",
    default=True,
    show_default=True,
    help="Order channels, where the head is the token embedding and so has no scales to move.",
)
@click.option("-f", "--file", "text", help="Text to try it on: the KLD of a Q4_K_M before and after is printed.")
@click.option("--chunks", default=8, show_default=True, type=click.IntRange(1), help="Chunks of that text.")
@options.n_ctx
@options.threads
@options.gpu_layers
@common_options
def command(
    output: Output,
    model: pathlib.Path,
    imatrix: pathlib.Path,
    out: pathlib.Path | None,
    imatrix_out: pathlib.Path | None,
    moments: tuple[pathlib.Path, ...],
    scales: bool,
    order: bool,
    text: str | None,
    chunks: int,
    n_ctx: int,
    threads: int | None,
    gpu_layers: int,
) -> None:
    """Balance a model's channels before it is quantized: it computes the same, and blocks of it lose less.

    Scales move between norms, v, up and the weights behind them, by powers of two, and channels change places. The
    logits are compared before and after. Quantize the new file with the new importance matrix. Adapters (LoRA) of the
    model do not fit the new one.
    """
    # Imported here, so that --help does not wait for the native library.
    from bitladder.evaluate import Settings
    from bitladder.files import sha256_file
    from bitladder.refine.smooth import smooth_model, smoothed_moments, trial
    from bitladder.text.texts import load_text

    loaded = load_text(text) if text else None
    out = out or model.with_name(f"{model.stem}-smooth.gguf")
    imatrix_out = imatrix_out or out.with_name(f"{out.stem}.imatrix.gguf")
    result = smooth_model(
        model, imatrix, out, imatrix_out, scales=scales, order=order, threads=threads, progress=output.progress
    )
    scaled = [out.with_name(f"{out.stem}.{path.name}") for path in moments]
    digest = sha256_file(out) if moments else ""
    for old, new in zip(moments, scaled, strict=True):
        smoothed_moments(old, result.changes, new, digest)
    tried = None
    if loaded is not None:
        settings = Settings(n_ctx=n_ctx, chunks=chunks, threads=threads, gpu_layers=gpu_layers)
        tried = trial(
            (model, imatrix), (out, imatrix_out), loaded, settings, folder=out.parent, progress=output.progress
        )
    if output.json:
        said = {"path": out.name, "imatrix": imatrix_out.name, "links": result.links, "logits_moved": result.moved}
        said["head_noise"] = result.head_noise
        said["moments"] = [path.name for path in scaled]
        output.print_json(said | ({} if tried is None else {"trial": dataclasses.asdict(tried)}))
        return
    done = [f"{count} × {kind}" for kind, count in result.links.items()]
    if result.head_noise is not None:
        done.append(f"channels ordered (error of the head's rounded inputs × {result.head_noise:.2f})")
    output.line(
        f"{out}: {', '.join(done)}; logits moved by {result.moved:.1e} of their range. Its imatrix: {imatrix_out}"
    )
    for path in scaled:
        output.line(f"{path}: its second moments")
    if tried is not None:
        output.line(
            f"{tried.preset} on {tried.tokens} tokens: KLD {tried.before:.5f} as it is, {tried.after:.5f} smoothed "
            f"(difference ± {tried.error:.5f})"
        )
