"""`bitladder texts`: texts to calibrate on and to measure with."""

import pathlib

import click

from bitladder.cli.outputs import Command, OutputFolder
from bitladder.cli.typed import NamingGroup
from bitladder.show import Output, common_options

BUILTIN_ABOUT = "half of Python's language reference, built in: to try things, not for quants that you publish"


@click.group("texts", cls=NamingGroup, context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """List the texts that there are to calibrate on and to measure with, and fetch them.

    Any other text is a file of your own.
    """


@command.command(
    "list",
    cls=Command,
    short_help="List the texts that have names.",
    page="run.md",
    examples=("texts list",),
)
@common_options
def list_texts(*, output: Output) -> None:
    """List the texts that have names: those that are built in, and those that `fetch` downloads."""
    from bitladder.hub import TEXTS
    from bitladder.text import BUILTIN

    about = dict.fromkeys(BUILTIN, BUILTIN_ABOUT) | {name: archive.about for name, archive in TEXTS.items()}
    if output.json:
        output.print_json(about)
        return
    for name, meaning in about.items():
        output.line(f"{name}: {meaning}")


@command.command(
    "fetch",
    cls=Command,
    short_help="Download texts, and check that they are the published ones.",
    page="run.md",
    examples=("texts fetch wikitext-2", "texts fetch wikitext-2 -o texts"),
)
@click.argument("name")
@click.option(
    "-o",
    "--output",
    "folder",
    type=OutputFolder(),
    default=".",
    show_default=True,
    help="Directory for the files.",
)
@common_options
def fetch(*, output: Output, name: str, folder: pathlib.Path) -> None:
    """Download the texts NAME from the hub, for example wikitext-2, and check that they are the published ones."""
    from bitladder.hub import fetch_texts

    output.tame_hub()
    output.progress.info(f"{name}, from the hub")
    paths = fetch_texts(name, folder)
    if output.json:
        output.print_json([str(path) for path in paths])
        return
    for path in paths:
        output.line(str(path))
