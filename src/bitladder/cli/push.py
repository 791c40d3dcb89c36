"""`bitladder push`: uploads a finished run to the Hugging Face hub."""

import pathlib

import click

from bitladder.cli.outputs import Command
from bitladder.cli.typed import FOLDER
from bitladder.show import Column, Output, Table, common_options, figures


@click.command(
    "push",
    cls=Command,
    page="hub.md",
    examples=(
        "push olmo2-ladder OWNER/OLMo-2-1B-GGUF --dry-run",
        "push olmo2-ladder OWNER/OLMo-2-1B-GGUF --private",
    ),
)
@click.argument("folder", metavar="RUN_DIR", type=FOLDER)
@click.argument("repo", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make the repository private, if it does not exist yet.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out files of this name. May be repeated.")
@click.option("--dry-run", is_flag=True, help="List the files; send nothing.")
@common_options
def command(
    *, output: Output, folder: pathlib.Path, repo: str, private: bool, exclude: tuple[str, ...], dry_run: bool
) -> None:
    """Upload the quants, card, report, scores, recipes and importance matrix of a run to REPO_ID (OWNER/NAME).

    Only files that belong to the run are sent. After an interruption, give the same command again: it continues. Log in
    first with `hf auth login`, or set HF_TOKEN.
    """
    from bitladder.hub import check_repository
    from bitladder.report import publish

    check_repository(repo)
    entries = publish.published_files(folder, exclude)
    publish.check_private(folder, entries)
    warnings = publish.warnings(folder, entries)
    for line in warnings:
        output.progress.warn(line)
    total = sum(entry.bytes for entry in entries)
    listed = [{"name": entry.name, "bytes": entry.bytes, "rung": entry.rung} for entry in entries]
    data = {"repo": repo, "private": private, "files": listed, "bytes": total, "warnings": warnings}
    if dry_run:
        if output.json:
            output.print_json({**data, "url": None})
            return
        table = Table([Column("file", fold=True), *figures("size"), Column("run it with", fold=True)])
        default = publish.default_file(entries)
        for entry in entries:
            hint = f"llama-server -hf {repo}:{entry.rung}" if entry.rung else ""
            hint += f"   (and -hf {repo})" if entry.name == default else ""
            table.add(entry.name, _size(entry.bytes), hint)
        output.print(table)
        output.line(f"{len(entries)} files, {_size(total)}, for {repo}; nothing was sent")
        return
    from bitladder.hub import upload

    output.tame_hub()
    if not publish.name_repository(folder, repo):
        output.progress.warn(
            f"README.md was edited, so its commands do not name {repo}; `bitladder card {folder}` writes it again"
        )
    output.progress.info(f"{len(entries)} files, {_size(total)}, to {repo}")
    url = upload(folder, publish.groups(entries), repo, private=private)
    if output.json:
        output.print_json({**data, "url": url})
    else:
        output.line(url)


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"
