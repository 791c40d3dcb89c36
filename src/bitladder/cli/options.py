"""Options that several commands have, with llama.cpp's spelling."""

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
