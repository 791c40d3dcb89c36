"""`bitladder card`: the model card and the HTML report of a run, written again."""

import pathlib

import click

from bitladder.cli.outputs import Command, check_output
from bitladder.cli.typed import FOLDER
from bitladder.show import Output, common_options


@click.command(
    "card",
    cls=Command,
    writes=True,
    page="report.md",
    examples=("card olmo2-ladder",),
)
@click.argument("run_dir", type=FOLDER)
@click.option("--repo", metavar="OWNER/NAME", help="Repository of the hub for the card's download links and commands.")
@common_options
def command(run_dir: pathlib.Path, *, output: Output, repo: str | None) -> None:
    """Write README.md and report.html of RUN_DIR again, from the files in it."""
    from bitladder.hub import check_repository
    from bitladder.report import publish, write_card, write_report
    from bitladder.rundir import Layout

    layout = Layout(run_dir)
    check_output(layout.card, "card")
    check_output(layout.report, "report")
    if repo is not None:
        check_repository(repo)
        publish.name_repository(run_dir, repo)
    written = [(layout.card, write_card(run_dir)), (layout.report, write_report(run_dir))]
    if output.json:
        output.print_json([{"path": str(path), "changed": changed} for path, changed in written])
        return
    for path, changed in written:
        output.line(f"{path}: {'written' if changed else 'unchanged'}")
