"""bitladder calibrate."""

import pathlib
from typing import Any

import click

from bitladder.cli import options
from bitladder.errors import UsageError
from bitladder.show.output import Output, common_options


@click.command("calibrate")
@options.calibrating
@click.option(
    "-o", "--output", "out", default="moments.gguf", show_default=True, type=click.Path(path_type=pathlib.Path)
)
@click.option(
    "--second-moments",
    is_flag=True,
    help="Collect E[w xxᵀ] of the inputs of every weight, which rounding for the output needs. The default, and so far "
    "the only thing to collect; for an importance matrix alone there is bitladder imatrix.",
)
@click.option(
    "--weighting",
    type=click.Choice(["gradients", "positions", "tokens"]),
    help="What a token counts: what an error there costs by gradients (needs torch) or by its position, found by "
    "trying; or 1.  [default: gradients if torch is installed and knows the architecture, else positions]",
)
@click.option(
    "--imatrix",
    "imatrix",
    type=click.Path(path_type=pathlib.Path),
    help="Write the importance matrix of the same chunks too.",
)
@options.n_ctx
@options.n_ubatch
@click.option(
    "--spread/--no-spread",
    default=True,
    show_default=True,
    help="Take --chunks from all over the text, not from its beginning.",
)
@click.option(
    "--in-file",
    "in_files",
    multiple=True,
    type=click.Path(path_type=pathlib.Path),
    help="Moments to add; may be repeated. Without -f they are only merged.",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True),
    help="GiB for moments; what does not fit takes another pass over the text.  [default: a quarter of main memory]",
)
@options.threads
@options.gpu_layers
@common_options
def command(
    output: Output,
    model: pathlib.Path | None,
    files: tuple[str, ...],
    second_moments: bool,
    weighting: str | None,
    memory: float | None,
    out: pathlib.Path,
    **settings: Any,
) -> None:
    """Collect second moments from calibration texts, or merge several files of them.

    Tokens are weighted by what an error there costs: an error at an attention sink reaches every later token. An
    interrupted run goes on where it was.
    """
    # Imported here, so that --help does not wait for the native library.
    from bitladder.calibrate import collect_moments
    from bitladder.text.texts import load_text

    if files and model is None:
        raise UsageError("a text needs a model: pass -m")
    if settings["imatrix"] and settings["imatrix"].resolve() == out.resolve():
        raise UsageError("-o and --imatrix name the same file")
    texts = [load_text(spec) for spec in files]
    settings |= {"memory": None if memory is None else int(memory * 2**30), "progress": output.progress}
    if texts and weighting is None:
        from bitladder.calibrate.gradients import why_not

        reason = why_not(model or "")
        weighting = "gradients" if reason is None else "positions"
        output.remark(f"tokens are weighted by {weighting}" + (f": {reason}" if reason else ""))
    if texts and weighting == "gradients":
        from bitladder.calibrate.gradients import collect_gradient_moments

        result = collect_gradient_moments(model or "", texts, out, **settings)
    else:
        result = collect_moments(model or "", texts, out, weighting=weighting or "tokens", **settings)
    if output.json:
        output.print_json(
            {
                "path": out.name,
                "weights": result.weights,
                "entries": result.entries,
                "chunks": result.chunks,
                "n_ctx": settings["n_ctx"],
                "passes": result.passes,
                "weighting": result.weighting,
                "imatrix": settings["imatrix"].name if settings["imatrix"] else None,
                "gaps": result.gaps,
            }
        )
        return
    output.line(
        f"{out}: {result.entries} entries for {result.weights} weights from {result.chunks} chunks, "
        f"tokens weighted by {result.weighting}"
    )
