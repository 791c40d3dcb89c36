"""`bitladder compare`: any GGUFs of one model side by side, whoever made them."""

import pathlib

import click

from bitladder.cli import options
from bitladder.show.output import Output, common_options

_OUT = click.Path(dir_okay=False, path_type=pathlib.Path)


@click.command("compare")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--base", required=True, metavar="MODEL", help="The full-precision GGUF, or a hub id of one.")
@click.option("--base-file", type=_OUT, help="Where the base's predictions are kept.  [default: beside the base]")
@click.option(
    "-f",
    "--file",
    "text",
    default="pydoc:test",
    show_default=True,
    help="Text to measure on: a file, or a built-in text (pydoc:test, pydoc:calibration).",
)
@options.n_ctx
@click.option("--chunks", type=click.IntRange(min=1), help="Chunks to measure on.  [default: the whole text]")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 50),
    default=1,
    show_default=True,
    metavar="PERCENT",
    help="Files whose sizes differ by no more count as equally large.",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="Folder of results, kept by content.  [default: the user's cache folder]",
)
@click.option("--no-cache", is_flag=True, help="Measure everything anew and keep nothing.")
@options.threads
@options.gpu_layers
@click.option("-o", "--output", "out", type=_OUT, help="Write the JSON to this file as well.")
@common_options
def command(
    models: tuple[str, ...],
    base: str,
    base_file: pathlib.Path | None,
    text: str,
    n_ctx: int,
    chunks: int | None,
    tolerance: float,
    cache: pathlib.Path | None,
    no_cache: bool,
    threads: int | None,
    gpu_layers: int,
    out: pathlib.Path | None,
    *,
    output: Output,
) -> None:
    """Compare quants of one model: sizes, types, KLD and perplexity with paired ±, and the winner at equal size.

    MODEL is a GGUF file, or one of the hub: OWNER/REPO:QUANT or OWNER/REPO/FILE.gguf. Files that were made from another
    model or checkpoint than --base are found out and said.
    """
    # Imported here, so that --help does not wait for the native library.
    import platformdirs

    from bitladder.compare import compare
    from bitladder.evaluate import NoResults, ResultFolder, Settings
    from bitladder.files import write_json
    from bitladder.hub import fetch
    from bitladder.show.comparison_tables import sections, to_json
    from bitladder.text.texts import load_text

    output.tame_hub()
    loaded = load_text(text)
    full = fetch(base, "--base")
    found = compare(
        [fetch(model) for model in models],
        full.path,
        loaded,
        Settings(n_ctx=n_ctx, chunks=chunks, threads=threads, gpu_layers=gpu_layers),
        base_file=base_file,
        tolerance=tolerance / 100,
        results=NoResults()
        if no_cache
        else ResultFolder(cache or platformdirs.user_cache_path("bitladder") / "results"),
        progress=output.progress,
    )
    if out:
        write_json(out, to_json(found))
    if output.json:
        output.print_json(to_json(found))
        return
    for title, content in sections(found):
        output.line(title)
        if isinstance(content, list):
            for line in content:
                output.line(f"  {line}")
        else:
            output.print(content)
