"""`bitladder card`: the model card of a run, written again."""

import pathlib

import click

from bitladder.cli.output import Output, common_options


@click.command("card")
@click.argument("run_dir", type=click.Path(path_type=pathlib.Path))
@common_options
def command(run_dir: pathlib.Path, *, output: Output) -> None:
    """Write README.md of RUN_DIR again, from the files in it."""
    from bitladder.report import write_card

    changed = write_card(run_dir)
    if output.json:
        output.print_json({"path": str(run_dir / "README.md"), "changed": changed})
    else:
        output.line(f"{run_dir / 'README.md'}: {'written' if changed else 'as it was'}")
