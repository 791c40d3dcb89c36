"""Options that several commands have, with llama.cpp's spelling."""

import pathlib
from collections.abc import Callable
from typing import Any

import click

threads = click.option("-t", "--threads", type=click.IntRange(1), help="Threads.  [default: all CPUs]")
gpu_layers = click.option(
    "-ngl", "--gpu-layers", "--n-gpu-layers", "gpu_layers", default=0, show_default=True, help="Layers on the GPU."
)
n_ctx = click.option(
    "-c", "--ctx-size", "n_ctx", default=512, show_default=True, type=click.IntRange(4), help="Tokens per chunk."
)
n_ubatch = click.option(
    "-ub",
    "--ubatch-size",
    "n_ubatch",
    default=512,
    show_default=True,
    type=click.IntRange(1),
    help="Tokens computed at once.",
)
_calibrating = (
    click.option("-m", "--model", type=click.Path(path_type=pathlib.Path), help="Full-precision GGUF."),
    click.option("-f", "--file", "files", multiple=True, help="Calibration text; may be repeated."),
)


def calibrating(command: Callable[..., Any]) -> Callable[..., Any]:
    """-m and -f: a model and calibration texts."""
    for option in reversed(_calibrating):
        command = option(command)
    return command


def guard(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--guard and --guard-chunks: a text on which something must hold."""
    text = click.option(
        "--guard",
        default="pydoc:test",
        show_default=True,
        help=f"Text, other than calibration's and the one to judge by, on which {what}; none to skip.",
    )
    chunks = click.option("--guard-chunks", default=8, show_default=True, type=click.IntRange(1), help="Chunks of it.")
    return lambda command: text(chunks(command))


def n_batch(default: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """-b with a default of the command's own."""
    return click.option(
        "-b",
        "--batch-size",
        "n_batch",
        default=default,
        show_default=True,
        type=click.IntRange(1),
        help="Tokens decoded together.",
    )
