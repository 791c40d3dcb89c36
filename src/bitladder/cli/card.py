"""`bitladder card`: the model card and the HTML report of a run, written again."""

import pathlib

import click

from bitladder.cli.outputs import Command, check_output
from bitladder.show.output import Output, common_options


@click.command("card", cls=Command, writes=True)
@click.argument("run_dir", type=click.Path(path_type=pathlib.Path))
@common_options
def command(run_dir: pathlib.Path, *, output: Output) -> None:
    """Write README.md and report.html of RUN_DIR again, from the files in it."""
    # Imported here, so that --help does not wait for the native library.
    from bitladder.report import RunPaths, write_card, write_report

    paths = RunPaths(run_dir)
    check_output(paths.card, "card")
    check_output(paths.page, "report")
    written = [(paths.card, write_card(run_dir)), (paths.page, write_report(run_dir))]
    if output.json:
        output.print_json([{"path": str(path), "changed": changed} for path, changed in written])
        return
    for path, changed in written:
        output.line(f"{path}: {'written' if changed else 'as it was'}")
