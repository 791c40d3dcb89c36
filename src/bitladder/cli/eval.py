"""`bitladder eval`: perplexity, divergence from the full-precision model, and benchmarks of GGUF files."""

import contextlib
import pathlib

import click

from bitladder.cli import options
from bitladder.show.output import Output, common_options

_FILE = click.Path(exists=True, dir_okay=False, path_type=pathlib.Path)
_OUT = click.Path(dir_okay=False, path_type=pathlib.Path)
TEXT_CTX, TASK_CTX = 512, 768


@click.command("eval")
@click.option("-m", "--model", "models", type=_FILE, multiple=True, required=True, help="A GGUF file; may be repeated.")
@click.option(
    "--base",
    type=_FILE,
    help="What to compare with: the full-precision GGUF (its predictions are kept), or a file of its predictions.",
)
@click.option("--base-file", type=_OUT, help="Where the base's predictions are kept.  [default: beside the base]")
@click.option(
    "--kl-divergence-base",
    "logits",
    type=_OUT,
    help="llama-perplexity's file of log-probabilities: written from the model, or read with --kl-divergence.",
)
@click.option("--kl-divergence", "read_logits", is_flag=True, help="Compare with --kl-divergence-base.")
@click.option(
    "-f",
    "--file",
    "text",
    help="Text to measure on: a file, or a built-in text (pydoc:test, pydoc:calibration).  [default: pydoc:test, or "
    "none if only --tasks are asked for]",
)
@click.option(
    "--tasks",
    help="Benchmarks: NAME[:FILE],… of arc, hellaswag, mmlu, truthfulqa, winogrande (without FILE: from the hub) and "
    "continuation:TEXT.",
)
@click.option(
    "--task-count", type=click.IntRange(min=1), help="Questions of each task, drawn at random.  [default: all]"
)
@click.option(
    "-c",
    "--ctx-size",
    "n_ctx",
    type=click.IntRange(4),
    help=f"Tokens of context.  [default: {TEXT_CTX} per chunk of text, {TASK_CTX} for tasks]",
)
@click.option("--chunks", type=click.IntRange(min=1), help="Chunks to measure on.  [default: the whole text]")
@click.option(
    "--noise-chunks",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Chunks for the noise floor of KLD (0: none).",
)
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=pathlib.Path),
    help="Folder of results, kept by content.  [default: the user's cache folder]",
)
@click.option("--no-cache", is_flag=True, help="Measure everything anew and keep nothing.")
@options.n_batch(512)
@options.n_ubatch
@options.threads
@options.gpu_layers
@click.option("-o", "--output", "out", type=_OUT, help="Write the JSON to this file as well.")
@common_options
def command(
    models: tuple[pathlib.Path, ...],
    base: pathlib.Path | None,
    base_file: pathlib.Path | None,
    logits: pathlib.Path | None,
    read_logits: bool,
    text: str | None,
    tasks: str | None,
    task_count: int | None,
    n_ctx: int | None,
    chunks: int | None,
    noise_chunks: int,
    cache: pathlib.Path | None,
    no_cache: bool,
    n_batch: int,
    n_ubatch: int,
    threads: int | None,
    gpu_layers: int,
    out: pathlib.Path | None,
    *,
    output: Output,
) -> None:
    """Measure perplexity, divergence from the full-precision model (--base) and benchmarks (--tasks).

    Several models are shown side by side, with the paired difference of each from the first.
    """
    # Imported here, so that --help does not wait for the native library.
    import platformdirs

    from bitladder import evaluate as package
    from bitladder.evaluate import tasks as benchmarks
    from bitladder.files import write_json
    from bitladder.show.eval_tables import tables
    from bitladder.text.texts import load_text

    if read_logits and (base or not logits):
        raise click.UsageError("--kl-divergence compares with --kl-divergence-base FILE; leave --base out")
    if logits and not read_logits and (len(models) > 1 or base or tasks):
        raise click.UsageError(
            "--kl-divergence-base without --kl-divergence writes the file from one full-precision model: one -m, no "
            "--base, no --tasks"
        )
    questions = tuple(benchmarks.load_task(spec) for spec in benchmarks.parse_specs(tasks)) if tasks else ()
    if text is None and not read_logits and (base or not tasks):
        text = "pydoc:test"
    loaded = load_text(text) if text else None
    if logits and read_logits and n_ctx is None:
        with package.LogitsFile(logits) as file:
            n_ctx = file.layout.n_ctx
    settings = package.Settings(
        n_ctx=n_ctx or TEXT_CTX,
        chunks=chunks,
        threads=threads,
        gpu_layers=gpu_layers,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
    )
    if loaded and logits and not read_logits:
        found = [package.measure_and_keep(models[0], loaded, logits, settings, output.progress)]
    else:
        with contextlib.ExitStack() as stack:
            opened = None
            if reference := logits or base:
                opened = package.open_or_compute(reference, base_file, loaded, settings, models[0], output.progress)
                stack.enter_context(opened)
            wanted = package.Wanted(
                text=loaded,
                settings=settings,
                base=opened,
                tasks=questions,
                task_settings=package.Settings(
                    n_ctx=n_ctx or TASK_CTX, threads=threads, gpu_layers=gpu_layers, n_batch=n_batch, n_ubatch=n_ubatch
                ),
                task_count=task_count,
                noise_chunks=noise_chunks,
            )
            folder = cache or platformdirs.user_cache_path("bitladder") / "results"
            results = package.NoResults() if no_cache else package.ResultFolder(folder)
            found = package.evaluate_several(list(models), wanted, results=results, progress=output.progress)
    data = [scores.to_json() for scores in found]
    value = data[0] if len(data) == 1 else data
    if out:
        write_json(out, value)
    if output.json:
        output.print_json(value)
        return
    for title, table in tables(found):
        output.line(title)
        output.print(table)
