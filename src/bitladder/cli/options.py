"""Options that several commands have, with llama.cpp's spelling."""

import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, get_args

import click

from bitladder.cli.file_kinds import is_quant
from bitladder.cli.from_options import typed
from bitladder.cli.outputs import OutputFolder, OutputPath
from bitladder.cli.typed import INPUT, FileOrName, Whole
from bitladder.errors import UsageError
from bitladder.options import Effort
from bitladder.show import Output

if TYPE_CHECKING:
    from bitladder.ladder import RunOptions

threads = click.option("-t", "--threads", type=Whole(1), help="Threads.  [default: all CPUs]")
gpu_layers = click.option(
    "-ngl", "--gpu-layers", "--n-gpu-layers", "gpu_layers", default=0, show_default=True, help="Layers on the GPU."
)
n_ctx = click.option(
    "-c", "--ctx-size", "n_ctx", default=512, show_default=True, type=Whole(4), help="Tokens per chunk."
)
n_ubatch = click.option(
    "-ub",
    "--ubatch-size",
    "n_ubatch",
    default=512,
    show_default=True,
    type=Whole(1),
    help="Tokens computed at once.",
)


def warn_if_quantized(output: Output, option: str, path: pathlib.Path | None) -> None:
    """Warns of a quant where a full-precision model is meant: what is measured with it is not wrong, but of the quant.

    Parameters:
        output: gets the warning.
        option: the option that names the model.
        path: the model, or None.
    """
    if path is not None and is_quant(path):
        output.progress.warn(f"{option} {path.name} is quantized; give the F16, BF16 or F32 model if you have it")


def calibrating(kind: str, default: str, added: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """-m, -f, -o and --in-file of a command that collects figures of texts, or merges files of them.

    Parameters:
        kind: the kind of the file that is written (`cli.file_kinds`).
        default: its usual name.
        added: what --in-file adds, in a word.
    """
    options = (
        click.option("-m", "--model", type=INPUT, help="Full-precision GGUF."),
        click.option(
            "-f", "--file", "files", multiple=True, type=FileOrName(), help="Calibration text; may be repeated."
        ),
        click.option(
            "-o",
            "--output",
            "out",
            default=default,
            show_default=True,
            type=OutputPath(kind, adds_to=("in_files",)),
            help="File to write. It may be one of --in-file, which is then added to.",
        ),
        click.option(
            "--in-file",
            "in_files",
            multiple=True,
            type=INPUT,
            help=f"{added} to add; may be repeated. Without -f, they are only merged.",
        ),
    )

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def guard(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--guard: a text on which something must hold."""
    return click.option(
        "--guard",
        type=FileOrName(),
        default="pydoc:test",
        show_default=True,
        metavar="TEXT",
        help=f"Text on which {what}. Use neither a calibration text nor your evaluation text. none: no check.",
    )


def effort(command: Callable[..., Any]) -> Callable[..., Any]:
    """--effort of a command whose options have values by effort. It stands above those (`from_options`)."""

    @functools.wraps(command)
    def wrapper(*args: Any, effort: str, **kwargs: Any) -> Any:
        return command(*args, **kwargs)

    return click.option(
        "--effort",
        type=click.Choice(get_args(Effort)),
        default="high",
        show_default=True,
        help="How much time may be spent; an option that you give counts more.",
    )(wrapper)


hours_option = click.option(
    "--hours",
    type=float,
    metavar="N",
    help="Take the highest effort whose estimate is at most N hours, instead of --effort.",
)


def within_hours(options: "RunOptions", hours: float | None) -> "RunOptions":
    """The options with the highest effort that --hours allows. Raises UsageError if --effort is there too."""
    from bitladder.ladder import RunOptions, choose_effort

    if hours is None:
        return options
    chosen = typed(RunOptions)
    if not hours > 0:
        raise UsageError(f"--hours is {hours:g}; it must be more than 0")
    if "effort" in chosen:
        raise UsageError("--effort and --hours both choose the effort: give one of them")
    return choose_effort(options, hours, chosen)


def n_batch(default: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """-b with a default of the command's own."""
    return click.option(
        "-b",
        "--batch-size",
        "n_batch",
        default=default,
        show_default=True,
        type=Whole(1),
        help="Tokens decoded together.",
    )


def kept_results(command: Callable[..., Any]) -> Callable[..., Any]:
    """--cache and --no-cache: gives the command `results`, where results of measurements are kept."""

    @functools.wraps(command)
    def wrapper(*args: Any, cache: pathlib.Path | None, no_cache: bool, **kwargs: Any) -> Any:
        import platformdirs

        from bitladder.evaluate import NoResults, ResultFolder

        folder = platformdirs.user_cache_path("bitladder") / "results" if cache is None else cache
        return command(*args, results=NoResults() if no_cache else ResultFolder(folder), **kwargs)

    folder = click.option(
        "--cache",
        type=OutputFolder(),
        help="Folder where results are kept.  [default: the user's cache folder]",
    )
    none = click.option("--no-cache", is_flag=True, help="Measure everything again, and keep no results and no base.")
    return folder(none(wrapper))


def json_file(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """-o of a command that prints JSON: a file of the kind (`cli.file_kinds`) to write the JSON to."""
    return click.option("-o", "--output", "out", type=OutputPath(kind), help="Write the JSON to this file as well.")
