"""A run: `estimate` says before what it takes, `run` makes it; then `show` its ladder, write its `card`, `push` it."""

import dataclasses
import pathlib
import shlex

import click

from bitladder.cli.options import hours_option, options_from, warn_unused, warn_unused_by_run, within_hours
from bitladder.cli.outputs import Command, check_folder, check_output, typed_command
from bitladder.cli.typed import FOLDER, FileOrName, Whole
from bitladder.errors import Terminated
from bitladder.ladder import RunOptions
from bitladder.show import Column, Output, Table, common_options, figures
from bitladder.units import number_of


@click.command(
    "run",
    cls=Command,
    page="run.md",
    examples=(
        "run allenai/OLMo-2-0425-1B --out olmo2-ladder",
        "run model-F16.gguf --out ladder --ladder Q4_K_M,Q6_K --mode naive --rounding stock",
    ),
)
@click.argument("model", type=FileOrName())
@options_from(RunOptions, arguments=("model",))
@hours_option
@common_options
def run_command(*, output: Output, options: RunOptions, hours: float | None) -> None:
    """Make the whole ladder of MODEL: convert, measure, calibrate, quantize, score, and write the card.

    MODEL is a checkpoint's directory, a Hugging Face hub id, or a full-precision GGUF. Everything goes into the
    directory --out. The same command continues a run that was interrupted; what is complete is not made again.
    """
    from bitladder.ladder import run
    from bitladder.report import read_run, write_card, write_report
    from bitladder.rundir import Layout, RunLog
    from bitladder.show import RunDisplay, ladder_table, next_steps

    check_folder(options.out, Layout(options.out).written_by_runs(), but=("model",))
    options = within_hours(options, hours)
    if hours is not None:
        output.progress.info(f"--hours {hours:g}: effort {options.effort}")
    warn_unused_by_run(output, options)
    with RunLog(output.progress, Layout(options.out), typed_command()) as log:
        display = RunDisplay(output, log)
        with display.shown():
            result = run(options, progress=log, watch=display.watch)
    written = [write_card(options.out), write_report(options.out)]
    if not result.made:
        count = number_of(len(result.rungs), "rung")
        done = "card and report were written again; nothing else to do" if any(written) else "nothing to do"
        output.progress.info(f"{done}: {options.out} has the complete ladder ({count})")
    if output.json:
        output.print_json(result.scores)
    else:
        finished = read_run(options.out)
        output.print(ladder_table(finished))
        for line in next_steps(finished):
            output.remark(line)


@click.command(
    "estimate",
    cls=Command,
    page="cost.md",
    examples=(
        "estimate allenai/OLMo-2-0425-1B",
        "estimate model-F16.gguf --ladder Q4_K_M,Q6_K --mode naive --rounding stock -t 8",
    ),
)
@click.argument("model", type=FileOrName())
@options_from(
    RunOptions,
    arguments=("model",),
    leave_out=("replace_model", "keep", "cluster", "share"),
    out=pathlib.Path("ladder"),
)
@hours_option
@common_options
def estimate_command(*, output: Output, options: RunOptions, hours: float | None) -> None:
    """Show the time, memory and disk that each step of `bitladder run` would take for MODEL.

    Give the options of the run. Nothing is loaded: of MODEL only config.json and headers are read, and of a hub id
    nothing else is fetched. This machine is measured for some seconds.
    """
    from bitladder.ladder import estimate
    from bitladder.show import estimate_lines, estimate_table

    options = within_hours(options, hours)
    warn_unused_by_run(output, options)
    total = estimate(options)
    if output.json:
        output.print_json(dataclasses.asdict(total) | total.sums())
        return
    output.print(estimate_table(total))
    for text in estimate_lines(total):
        output.line(text)


@click.command(
    "show",
    cls=Command,
    page="run.md",
    examples=("show olmo2-ladder", "show olmo2-ladder --follow"),
)
@click.argument("folder", metavar="RUN_DIR", type=FOLDER)
@click.option("--follow", "follows", is_flag=True, help="Show what a run says until it ends; it may work elsewhere.")
@click.option("--plot/--no-plot", default=True, show_default=True, help="Draw KLD against size below the table.")
@click.option("--width", type=Whole(40), help="Width of the plot.  [default: the terminal's, at most 80]")
@click.option("--height", type=Whole(5, 100), default=16, show_default=True, help="Lines of the plot.")
@common_options
def show_command(
    *, output: Output, folder: pathlib.Path, follows: bool, plot: bool, width: int | None, height: int
) -> int:
    """Show the ladder of RUN_DIR: sizes, quality with ±, speed, and KLD against size.

    Figures in bold are within noise of the best of their column. ▸ marks the Pareto front: no file of its size or
    smaller has less KLD. Of a run that is not complete the command shows what there is, and how to continue.
    """
    from bitladder.report import read_run, read_unfinished
    from bitladder.rundir import is_running, load_manifest, run_command
    from bitladder.show import (
        deletable,
        ladder_json,
        ladder_table,
        mixed_lines,
        pareto_plot,
        text_table,
        unfinished_json,
        unfinished_table,
    )

    if not plot:
        warn_unused(output, "with --no-plot", {"width", "height"})
    if follows and (stopped := _follow(output, folder)):
        return stopped
    manifest, unfinished = load_manifest(folder), read_unfinished(folder)
    if manifest is not None and unfinished is not None:
        command = run_command(folder, manifest)
        what = f"The run of {', '.join(unfinished.record.rungs)}"
        output.progress.info(
            f"{what} is at work. Follow it with: bitladder show {shlex.quote(str(folder))} --follow"
            if is_running(folder)
            else f"{what} is not complete. Continue it with: {command}"
        )
        if manifest.whole() is None:
            if output.json:
                output.print_json(unfinished_json(unfinished, command))
            else:
                output.print(unfinished_table(unfinished))
            return 0
        output.progress.info("The table is that of the complete run before it.")
    run = read_run(folder)
    if output.json:
        output.print_json(ladder_json(run))
        return 0
    text = run.base.scores.text
    output.line(f"{run.name}: {text.name}, {number_of(run.base.scores.chunks, 'chunk')} of {run.base.scores.n_ctx}")
    output.print(ladder_table(run))
    if run.texts:
        output.line("\nKLD on each text")
        output.print(text_table(run))
        for line in mixed_lines(run):
            output.line(line)
    if plot and (lines := pareto_plot(run, width=width or min(output.width, 80), height=height)):
        output.line("")
        for line in lines:
            output.line(line)
    for line in deletable(run):
        output.remark(line)
    return 0


def _follow(output: Output, folder: pathlib.Path) -> int:
    """Prints what a run says until it ends. Returns the exit code if the user stops that: the run stays at work."""
    from bitladder.rundir import follow

    try:
        for line in follow(folder):
            output.line(line)
    except KeyboardInterrupt as stop:
        return 143 if isinstance(stop, Terminated) else 130
    return 0


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
def card_command(run_dir: pathlib.Path, *, output: Output, repo: str | None) -> None:
    """Write README.md and report.html of RUN_DIR again, from the files in it."""
    from bitladder.hub import check_repository
    from bitladder.report import publish, write_card, write_report
    from bitladder.rundir import Layout

    layout = Layout(run_dir)
    check_output(layout.card, "card")
    check_output(layout.report, "report")
    if repo is not None:
        check_repository(repo)
        publish.record_repository(run_dir, repo)
    written = [(layout.card, write_card(run_dir)), (layout.report, write_report(run_dir))]
    if output.json:
        output.print_json([{"path": str(path), "changed": changed} for path, changed in written])
        return
    for path, changed in written:
        output.line(f"{path}: {'written' if changed else 'unchanged'}")


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
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave out files of this name. Can be repeated.")
@click.option("--dry-run", is_flag=True, help="List the files; send nothing.")
@common_options
def push_command(
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
        output.line(publish.recommendation(folder, entries, repo))
        output.line(f"{number_of(len(entries), 'file')}, {_size(total)}, for {repo}; nothing was sent")
        return
    from bitladder.hub import upload

    if not publish.name_repository(folder, repo):
        output.progress.warn(
            f"README.md was edited, so its commands do not name {repo}; `bitladder card {folder}` writes it again"
        )
    output.progress.info(f"{number_of(len(entries), 'file')}, {_size(total)}, to {repo}")
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
