"""bitladder tune."""

import dataclasses
import pathlib

import click

from bitladder.cli import options
from bitladder.errors import UsageError
from bitladder.show.output import Output, common_options

_FILE = click.Path(exists=True, dir_okay=False, path_type=pathlib.Path)


@click.command("tune")
@click.argument("quant", type=_FILE)
@click.option("-m", "--model", required=True, type=_FILE, help="The full-precision GGUF it was made from.")
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=pathlib.Path), help="GGUF to write.")
@click.option("-f", "--file", "files", multiple=True, required=True, help="Calibration text; may be repeated.")
@click.option("--chunks", type=click.IntRange(1), help="Chunks to use of each text, from all over it; all by default.")
@click.option(
    "--rate",
    default=3e-4,
    show_default=True,
    type=click.FloatRange(0, 0.1, min_open=True),
    help="How far one chunk moves a scale at most, as a share of it.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the order of chunks.")
@options.guard("KLD must fall")
@options.n_ctx
@options.threads
@common_options
def command(
    output: Output,
    quant: pathlib.Path,
    model: pathlib.Path,
    out: pathlib.Path,
    files: tuple[str, ...],
    chunks: int | None,
    rate: float,
    seed: int,
    guard: str,
    guard_chunks: int,
    n_ctx: int,
    threads: int | None,
) -> None:
    """Tune QUANT's scales for the whole model's predictions: same types and bytes, lower KLD.

    The F16 numbers of blocks move along the gradient of the KLD from the full-precision model; integers stay. Needs
    torch (pip install 'bitladder[torch]').
    """
    # Imported here, so that --help does not wait for the native library.
    from bitladder.evaluate import Settings
    from bitladder.files import sha256_file
    from bitladder.refine.tune import TuneOptions, tune
    from bitladder.text.texts import load_text

    texts = [load_text(spec) for spec in files]
    held_out = (
        None if guard == "none" else (load_text(guard), Settings(n_ctx=n_ctx, chunks=guard_chunks, threads=threads))
    )
    if held_out is not None and held_out[0].sha256 in {text.sha256 for text in texts}:
        raise UsageError(f"--guard {guard} is a text that is tuned on; name another one")
    wanted = TuneOptions(n_ctx, chunks, rate, seed)
    made = tune(model, quant, out, texts, wanted, held_out=held_out, threads=threads, progress=output.progress)
    if output.json:
        said = dataclasses.asdict(made) | {"path": out.name, "sha256": sha256_file(out)}
        said |= {
            key: figure.model_dump() for key in ("before", "after", "difference") if (figure := getattr(made, key))
        }
        output.print_json(said)
        return
    output.line(f"{out}: {made.steps} steps of {made.n_ctx} tokens")
    if made.before and made.after and made.difference:
        before, after, gap = made.before, made.after, made.difference
        output.line(
            f"held-out text: KLD {before.value:.5f} ± {before.error:.5f} before, {after.value:.5f} ± {after.error:.5f} "
            f"tuned (difference {gap.value:+.5f} ± {gap.error:.5f}, paired)"
        )
    else:
        output.line("not tried on held-out text (--guard none)")
    if not made.kept:
        output.line("that is no gain: the file is QUANT as it was")
