"""bitladder tune."""

import dataclasses
import pathlib

import click

from bitladder.cli import options as shared
from bitladder.cli.from_options import options_from
from bitladder.cli.outputs import Command, OutputPath
from bitladder.cli.typed import INPUT, FileOrName
from bitladder.engine import Decoding
from bitladder.errors import UsageError
from bitladder.files import sha256_file
from bitladder.refine import TuneOptions
from bitladder.show import Output, common_options
from bitladder.text import load_text


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
    "-f", "--file", "files", multiple=True, required=True, type=FileOrName(), help="Calibration text; may be repeated."
)
@options_from(TuneOptions)
@shared.guard("KLD must fall")
@options_from(Decoding, parameter="decoding", leave_out=("n_batch", "n_ubatch", "gpu_layers"))
@common_options
def command(
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
    output.line(f"{out}: {tuned.steps} steps of {tuned.n_ctx} tokens")
    if tuned.before and tuned.after and tuned.difference:
        before, after, gap = tuned.before, tuned.after, tuned.difference
        output.line(
            f"held-out text: KLD {before.value:.5f} ± {before.error:.5f} before, {after.value:.5f} ± {after.error:.5f} "
            f"tuned (difference {gap.value:+.5f} ± {gap.error:.5f}, paired)"
        )
    else:
        output.line("not checked on held-out text (--guard none)")
    if not tuned.kept:
        output.line("no gain: the file is a copy of QUANT")
